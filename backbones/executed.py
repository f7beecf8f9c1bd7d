"""Answers' logits with plans really executed, for teacher forcing; differentiable.

Shape legend: B rows, P packed tokens, D hidden width, T answer tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backbones.backbone import Backbone
from backbones.encoding import Encoding
from backbones.masks import Masks


def executed_answer_logits(
    backbone: Backbone, encoding: Encoding, masks: Masks, answers: Sequence[list[int]]
) -> Tensor:
    """Logits (T, V) at the places that predict each answer's tokens and its end, row after row.

    Args:
        backbone: runs what the plans keep, and nothing else.
        encoding: B prompts followed by their answers.
        masks: B plans, without stages.
        answers: ids of each row's answer, without an end token.
    """
    masks = backbone.restrict(encoding, masks)
    x_PD, ragged, rope_PR = backbone.pack(encoding, masks)
    hidden_PD, _ = backbone.decoder.prefill(x_PD, ragged, rope_PR, masks)
    places = [
        last - torch.arange(len(ids), -1, -1, device=last.device)
        for last, ids in zip(ragged.last, answers, strict=True)
    ]
    return backbone.model.lm_head(hidden_PD[torch.cat(places)])
