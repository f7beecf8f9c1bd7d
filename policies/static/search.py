"""Search for the order in which tokens, head slots and layers may leave for every query alike.

After GSOP and DOP (Liu et al., arXiv 2507.02909), who prune operations of a multimodal model by how far its output on a
few examples moves: first every unit is dropped alone (DOP's additive approximation), which ranks them; then units leave
one by one, each step trying anew the few that rank best (GSOP's greedy sorting with earlier rankings), and taking the
one whose loss moves the output least for the FLOPs that it saves. One order serves every budget.

Shape legend: K plans, A flat action length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.policies.static.searched import SearchedOrder


@dataclass(frozen=True)
class SearchSettings:
    """How the search goes.

    Attributes:
        token_groups: groups that visual tokens leave in, the i-th, the (i + groups)-th, … together.
        tries: units tried anew at each step.
    """

    token_groups: int = 64
    tries: int = 8


class StaticSearch:
    """Divergence and cost of plans on some queries, and the search over them.

    Args:
        backbone: answers.
        encodings: the queries, in batches.
        settings: how the search goes.
    """

    def __init__(self, backbone: Backbone, encodings: Sequence[Encoding], settings: SearchSettings):
        self.backbone, self.encodings, self.settings = backbone, encodings, settings
        self.layout = backbone.layout
        everything_A = torch.ones(self.layout.size, dtype=torch.bool, device=backbone.device)
        self.reference = [self._log_probs(encoding, everything_A) for encoding in encodings]
        self.full_flops = float(self.flops(everything_A[None]))

    def units(self) -> list[list[int]]:
        """What may leave: groups of tokens, head slots, layers; protected ones may not."""
        layout, protected_A = self.layout, self.layout.protected()
        groups = min(self.settings.token_groups, layout.tokens)
        tokens = [list(range(group, layout.tokens, groups)) for group in range(groups)]
        rest = [[number] for number in range(layout.tokens, layout.size) if not protected_A[number]]
        return tokens + rest

    @torch.no_grad()
    def _log_probs(self, encoding: Encoding, bits_A: Tensor) -> Tensor:
        masks = self.layout.unflatten(bits_A.expand(len(encoding), -1))
        return self.backbone.prefill(encoding, masks)[0].float().log_softmax(-1)

    def divergence(self, bits_A: Tensor) -> float:
        """Mean Kullback-Leibler divergence, in nats, of the first answer token from the full plan's."""
        total, count = 0.0, 0
        for encoding, full_BV in zip(self.encodings, self.reference, strict=True):
            log_BV = self._log_probs(encoding, bits_A)
            total += float((full_BV.exp() * (full_BV - log_BV)).sum())
            count += len(encoding)
        return total / count

    def flops(self, bits_KA: Tensor) -> Tensor:
        """(K,) LLM FLOPs of some plans, on the first query."""
        first, shape = self.encodings[0].rows(torch.tensor([0])), self.backbone.decoder.shape
        masks = self.layout.unflatten(bits_KA)
        n_K = (masks.tokens & first.visual_valid_BN).sum(1) + first.text_tokens
        return shape.prefill(masks, n_K) + shape.decode(masks, n_K, first.expected_tokens)

    def order(self, progress: bool = True) -> tuple[list[list[int]], list[float], list[float]]:
        """The units in the order in which they leave, and share of FLOPs and divergence after each."""
        left = self.units()
        kept_A = torch.ones(self.layout.size, dtype=torch.bool, device=self.backbone.device)
        loss, cost = 0.0, self.full_flops
        bar = tqdm(total=2 * len(left), desc="search", unit="unit", disable=not progress)
        harm = []
        for unit in left:
            harm.append(self.divergence(_without(kept_A, unit)) if self._may_go(kept_A, unit) else float("inf"))
            bar.update()
        order: list[list[int]] = []
        shares: list[float] = []
        losses: list[float] = []
        while left:
            chosen = self._next(left, harm, kept_A, loss, cost)
            if chosen is None:
                break
            unit, loss = left.pop(chosen), harm.pop(chosen) + loss
            kept_A = _without(kept_A, unit)
            cost = float(self.flops(kept_A[None]))
            order.append(unit)
            shares.append(cost / self.full_flops)
            losses.append(loss)
            bar.update()
        bar.close()
        return order, shares, losses

    def _next(self, left: list[list[int]], harm: list[float], kept_A: Tensor, loss: float, cost: float) -> int | None:
        """Number of the unit to leave next; ``harm`` is brought up to date for those tried."""
        gone = torch.stack([_without(kept_A, unit) for unit in left])
        saved = (cost - self.flops(gone)).tolist()
        possible = [number for number, unit in enumerate(left) if self._may_go(kept_A, unit)]
        free = [number for number in possible if saved[number] <= 0]
        if free:  # a head of a layer that is gone, say: nothing changes
            harm[free[0]] = 0.0
            return free[0]

        def per_flop(number: int) -> float:
            return harm[number] / saved[number]

        tried = sorted(possible, key=per_flop)[: self.settings.tries]
        for number in tried:
            harm[number] = self.divergence(gone[number]) - loss
        return min(tried, key=per_flop, default=None)

    def _may_go(self, kept_A: Tensor, unit: list[int]) -> bool:
        """Whether a layer is left without the unit."""
        return bool(self.layout.unflatten(_without(kept_A, unit)[None]).layers.any())


def _without(kept_A: Tensor, unit: list[int]) -> Tensor:
    rest_A = kept_A.clone()
    rest_A[unit] = False
    return rest_A


def search_order(
    backbone: Backbone,
    encodings: Sequence[Encoding],
    data: str,
    split: str,
    settings: SearchSettings = SearchSettings(),
    progress: bool = True,
) -> SearchedOrder:
    """Search on some queries.

    Args:
        backbone: answers.
        encodings: the queries, in batches.
        data, split: what they are of, for the record.
        settings: how the search goes.
        progress: whether to show a progress bar.
    """
    order, flops, divergence = StaticSearch(backbone, encodings, settings).order(progress)
    layout = backbone.layout
    return SearchedOrder(
        backbone.name,
        (layout.tokens, layout.layers, layout.heads),
        data,
        split,
        sum(map(len, encodings)),
        order,
        flops,
        divergence,
    )
