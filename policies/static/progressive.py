"""Rules that drop visual tokens at several layers: PyramidDrop, SparseVLM.

Shape legend: B rows, N visual tokens, T text tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.stages import AttentionScore, Stage, token_counts
from maskgym.common.errors import InputError
from maskgym.policies.planning.bisection import most_that_fits
from maskgym.policies.static.inside import InsidePlanner


class ProgressivePlanner(InsidePlanner):
    """Rules with several stages. A share of the tokens is that of the mean over layers, as their papers count it."""

    def shares(self, encoding: Encoding, share: float) -> Tensor:
        """(B,) counts at the first stage with the largest layer mean that does not exceed the share.

        Raises:
            InputError: a share outside (0, 1], or below what the layers before the first stage already take.
        """
        most_B, layers = encoding.visual_valid_BN.sum(1), self.backbone.layout.layers
        target_B = super().shares(encoding, share) * layers

        def tokens(counts_B: Tensor) -> Tensor:
            keeps = zip(self.layers, self.keeps(encoding, counts_B), strict=True)
            return token_counts(most_B, [Stage(layer, keep_B) for layer, keep_B in keeps], layers).sum(1)

        least_B = tokens(torch.ones_like(most_B))
        if bool((least_B > target_B).any()):
            least = float((least_B / (most_B * layers)).max())
            raise InputError(
                f"a share of {share:g} of the visual tokens, averaged over layers, is below what policy "
                f"{self.name!r} can meet{self._why()}; the least share here is {least:.4f}"
            )
        return most_that_fits(lambda counts_B: tokens(counts_B) <= target_B, torch.ones_like(most_B), most_B)


class PyramidDropPlanner(ProgressivePlanner):
    """PyramidDrop (Xing et al., arXiv 2410.17247, CVPR 2025): at each stage the same share of the visual tokens goes
    on, those to which the prompt's last token attends most in the layer ahead.

    As published, queries and keys of that layer are computed on the side before it runs on what is left; that is
    charged. The authors renumber positions at each stage; here tokens keep theirs.

    Args:
        backbone: prices the plans.
        seed: not used; nothing is drawn.
        layers: of the stages; by default at a quarter, a half and three quarters of the depth (8, 16, 24 of 32).
        ratio: share that goes on at each stage (0.5 as published); without it the budget sets it.

    Raises:
        InputError: layers or ratio out of range.
    """

    def __init__(
        self, backbone: Backbone, seed: int = 0, layers: tuple[int, ...] | None = None, ratio: float | None = None
    ):
        if ratio is not None and not 0 < ratio <= 1:
            raise InputError(f"pyramiddrop: ratio is {ratio:g}; it must be a share of the visual tokens in (0, 1]")
        depth = backbone.layout.layers
        quarters = sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)})
        super().__init__(backbone, "pyramiddrop", layers or quarters, AttentionScore("last", here=True))
        self.ratio, self.budgeted = ratio, ratio is None

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans; with a fixed ratio whatever the budget."""
        if self.ratio is None:
            return super().plan(encoding, budgets_B)
        most_B = encoding.visual_valid_BN.sum(1)
        return self.plan_counts(encoding, (most_B * self.ratio).floor().long().clamp_min(1))

    def keeps(self, encoding: Encoding, counts_B: Tensor) -> list[Tensor]:
        most_B = encoding.visual_valid_BN.sum(1).double()
        # a hair more, so that the first stage's count comes out as it went in
        ratio_B = (counts_B / most_B + 1e-9).clamp_max(1)
        return [(most_B * ratio_B**stage).floor().long().clamp_min(1) for stage in range(1, len(self.layers) + 1)]


class SparseVLMPlanner(ProgressivePlanner):
    """SparseVLM (Zhang et al., arXiv 2410.04417, ICML 2025): after each of some layers, the visual tokens go on to
    which the question's *raters* attend most in that layer.

    Raters are the words after the image that visual tokens resemble more than the average word: softmax over words of
    the inner products, averaged over visual tokens. As in version 1.5, counts are fixed beforehand (version 1 took
    them from the rank of the attention). Left out is its token recycling, which puts a few clusters of dropped tokens
    back; tokens keep their positions, where the authors renumber.

    Args:
        backbone: prices the plans.
        seed: not used; nothing is drawn.
        layers: entered by the chosen; by default at 3, 7 and 16 of 32 layers, scaled to the depth.
        shape: counts at the later stages, relative to the first; by default those of the authors' 192-token setting,
            300, 200 and 110.

    Raises:
        InputError: layers out of range, or a shape that does not fit them.
    """

    PUBLISHED: ClassVar[dict[int, int]] = {3: 300, 7: 200, 16: 110}

    def __init__(
        self,
        backbone: Backbone,
        seed: int = 0,
        layers: tuple[int, ...] | None = None,
        shape: tuple[float, ...] | None = None,
    ):
        depth = backbone.layout.layers
        scaled = {max(1, round(depth * layer / 32)): count for layer, count in self.PUBLISHED.items()}
        layers = layers or tuple(scaled)
        counts = list(scaled.values()) if len(layers) == len(scaled) else list(self.PUBLISHED.values())
        shape = shape or tuple(count / counts[0] for count in counts[1 : len(layers)])
        super().__init__(backbone, "sparsevlm", layers, AttentionScore("marked"))
        if len(shape) != len(layers) - 1 or any(not 0 < part <= 1 for part in shape):
            raise InputError(
                f"sparsevlm: shape is {'-'.join(f'{part:g}' for part in shape) or '(none)'}; it must be one share of "
                f"the first count, in (0, 1], for each of the {len(layers) - 1} later stages"
            )
        self.shape = (1.0, *shape)

    def keeps(self, encoding: Encoding, counts_B: Tensor) -> list[Tensor]:
        # all at the first stage means that the budget pays for all
        whole_B = counts_B >= encoding.visual_valid_BN.sum(1)
        keeps = [(counts_B * part).round().long().clamp_min(1) for part in self.shape]
        return [torch.where(whole_B, counts_B, keep_B) for keep_B in keeps]

    def marked(self, encoding: Encoding) -> Tensor:
        valid_BN = encoding.visual_valid_BN
        first_B1 = encoding.visual_places_BN.masked_fill(~valid_BN, -1).amax(1, keepdim=True)
        asks_BT = encoding.text_valid_BT & (encoding.text_places_BT > first_B1)
        alike_BNT = encoding.visual_BND.float() @ encoding.text_BTD.float().transpose(1, 2)
        shares_BNT = alike_BNT.masked_fill(~asks_BT[:, None], -torch.inf).softmax(2)
        mean_BT = (shares_BNT * valid_BN[..., None]).sum(1) / valid_BN.sum(1, keepdim=True)
        raters_BT = asks_BT & (mean_BT > mean_BT.sum(1, keepdim=True) / asks_BT.sum(1, keepdim=True))
        return torch.where(raters_BT.any(1, keepdim=True), raters_BT, asks_BT)

    def making(self, encoding: Encoding) -> Tensor:
        _, n, width = encoding.visual_BND.shape
        return 2 * n * encoding.text_tokens * width
