"""Rules that drop visual tokens inside the decoder, by attention that the prefill computes: FastV, and what its heirs
share.

They hold back nothing before the language model, so ``--merge`` and ``--positions`` have nothing to lay out, and a
token that goes on keeps its position.

Shape legend: B rows, T text tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.stages import AttentionScore, Stage
from maskgym.common.errors import InputError
from maskgym.policies.static.counts import CountPlanner, Skeleton


class InsidePlanner(CountPlanner):
    """Stages at fixed layers; the count is that of the first stage, and sets those of the others.

    Args:
        backbone: prices the plans.
        name: in records.
        layers: each entered by fewer tokens than the one before.
        scorer: of the visual tokens.

    Raises:
        InputError: layers that do not rise from 1 on, or are not there.
    """

    def __init__(self, backbone: Backbone, name: str, layers: Sequence[int], scorer: AttentionScore):
        super().__init__(backbone, name)
        most = backbone.layout.layers - 1
        if not layers or list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] <= most:
            raise InputError(
                f"{name}: tokens cannot be dropped on entering layers {', '.join(map(str, layers)) or '(none)'}; give "
                f"rising numbers from 1 to {most}: attention of the layers before must be there"
            )
        self.layers, self.scorer = tuple(layers), scorer

    @abstractmethod
    def keeps(self, encoding: Encoding, counts_B: Tensor) -> list[Tensor]:
        """(B,) tokens that go on at each stage, if ``counts_B`` go on at the first."""

    def fill(self, skeleton: Skeleton, encoding: Encoding, counts_B: Tensor) -> Masks:
        return skeleton(counts_B)

    def skeleton(self, encoding: Encoding) -> Skeleton:
        full, making_B = self.backbone.full(encoding), self.making(encoding)
        most_B, marked = encoding.visual_valid_BN.sum(1), cache(partial(self.marked, encoding))

        def plans(counts_B: Tensor) -> Masks:
            keeps = self.keeps(encoding, counts_B)
            marked_BT = marked() if bool((counts_B < most_B).any()) else None
            stages = [
                Stage(layer, keep_B, scorer=self.scorer, marked=marked_BT)
                for layer, keep_B in zip(self.layers, keeps, strict=True)
            ]
            return replace(full, stages=tuple(stages), making=making_B * (counts_B < most_B))

        return plans

    def marked(self, encoding: Encoding) -> Tensor | None:
        """(B, T) bool text tokens whose attention counts, if not the last one's."""
        return None

    def making(self, encoding: Encoding) -> Tensor:
        """(B,) int64 FLOPs spent before the prefill."""
        return torch.zeros_like(encoding.text_tokens)

    def _why(self) -> str:
        whose = "layer runs" if self.layers[0] == 1 else f"{self.layers[0]} layers run"
        return f": its first {whose} on all visual tokens"


class FastVPlanner(InsidePlanner):
    """FastV (Chen et al., arXiv 2403.06764, ECCV 2024): after the first ``k`` layers only the share 1 - ``r`` of the
    visual tokens goes on, those to which the last token attends most in layer k - 1 (its row, averaged over heads).

    As in the authors' static-cache variant: chosen once at the prefill, round(N (1 - r)) tokens, original positions.
    The paper's text says attention from all tokens; their code takes the last row. ``fastv-mean`` does as the text
    says.

    Args:
        backbone: prices the plans.
        seed: not used; nothing is drawn.
        k: layers that run on all tokens.
        r: share removed, as published; without it the budget sets it.
        mean: average the attention of all tokens (``fastv-mean``).

    Raises:
        InputError: k or r out of range.
    """

    def __init__(self, backbone: Backbone, seed: int = 0, k: int = 2, r: float | None = None, mean: bool = False):
        name, most = "fastv-mean" if mean else "fastv", backbone.layout.layers - 1
        if not 1 <= k <= most:
            raise InputError(f"{name}: k is {k}; it must be from 1 to {most}, for attention of layer k - 1 is needed")
        if r is not None and not 0 <= r < 1:
            raise InputError(f"{name}: r is {r:g}; it must be a share of the visual tokens in [0, 1)")
        super().__init__(backbone, name, (k,), AttentionScore("all" if mean else "last"))
        self.r, self.budgeted = r, r is None

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans; with a fixed share whatever the budget."""
        if self.r is None:
            return super().plan(encoding, budgets_B)
        return self.plan_counts(encoding, self.shares(encoding, 1 - self.r))

    def keeps(self, encoding: Encoding, counts_B: Tensor) -> list[Tensor]:
        return [counts_B]
