"""Applies a plan's stages during a prefill: listens to the layers whose attention is asked for, drops tokens in time.

Shape legend: B rows, L layers, P packed tokens, H query heads, W head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from maskgym.backbones.engine.frame import Frame
from maskgym.backbones.engine.packed import Packed
from maskgym.backbones.engine.token_scores import Heard, View
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.plan_cost import first_from, last_before
from maskgym.backbones.plans.stages import Stage, best_tokens

Listener = Callable[[Frame, Tensor, Tensor, float], None]
"""Takes where a block's tokens stand, its queries and keys, and the scale of the logits."""

ProjectAhead = Callable[[Packed, Tensor, Tensor, Tensor], list[Heard]]


@dataclass(frozen=True)
class _Due:
    """A stage, and for each row the last layer before it in which the row attends, if ``attended_B``."""

    stage: Stage
    layer_B: Tensor
    attended_B: Tensor


class Staging:
    """The stages of one prefill.

    Args:
        masks: B plans.
        project_ahead: queries of asking tokens and keys of all in given layers.
    """

    def __init__(self, masks: Masks, project_ahead: ProjectAhead):
        self.project_ahead = project_ahead
        self.heard: list[Heard] = []
        self.watched: set[int] = set()
        self.replan(masks)
        if masks.midway is not None and any(stage.scorer is not None for stage in masks.stages):
            # where rows skip all layers between the decision and a stage, the last before the decision is asked
            self.watched.add(masks.midway.layer - 1)

    def replan(self, masks: Masks) -> None:
        """Follow these plans from now on; what layers before have told is kept."""
        self.attends_BL = masks.effective_heads.any(2)
        self.due = [_Due(stage, *last_before(self.attends_BL, stage.layer)) for stage in masks.stages]
        scored = [due.layer_B for due in self.due if due.stage.scorer is not None]
        self.watched |= set(torch.cat(scored).unique().tolist()) if scored else set()

    def listener(self, number: int) -> Listener | None:
        """What a layer must tell its queries and keys, if a stage will ask for them."""
        return partial(self._hear, number) if number in self.watched else None

    def _hear(self, number: int, frame: Frame, q_PHW: Tensor, k_PGW: Tensor, scale: float) -> None:
        assert frame.ids_P is not None
        k_PHW = k_PGW.repeat_interleave(q_PHW.shape[1] // k_PGW.shape[1], dim=1)
        everyone_P = torch.ones_like(frame.ids_P, dtype=torch.bool)
        self.heard.append(Heard(number, frame.ragged, frame.ids_P, everyone_P, q_PHW, k_PHW, scale))

    def enter(self, number: int, tokens: Packed) -> Packed:
        """The tokens that enter a layer: the same object if none leaves."""
        for due in self.due:
            if due.stage.layer == number:
                tokens = self._apply(due, tokens)
        return tokens

    def _apply(self, due: _Due, tokens: Packed) -> Packed:
        stage = due.stage
        present_BN = tokens.present()
        affected_B = stage.keep < present_BN.sum(1)
        if not bool(affected_B.any()):
            return tokens
        if stage.scores is not None:
            scores_BN = stage.scores
        else:
            assert stage.scorer is not None
            scores_BN = stage.scorer.score(self._view(due, tokens, affected_B))
        return tokens.only(best_tokens(scores_BN, present_BN, stage.keep))

    def _view(self, due: _Due, tokens: Packed, affected_B: Tensor) -> View:
        layer_B, there_B = first_from(self.attends_BL, due.stage.layer)
        needed = set(due.layer_B.unique().tolist())
        return View(
            tokens,
            due.stage.marked,
            affected_B,
            [heard for heard in self.heard if heard.layer in needed],
            due.layer_B,
            due.attended_B,
            lambda seen, asking_P: self.project_ahead(seen, asking_P, layer_B, there_B),
        )
