"""Answers' logits with plans really executed, for teacher forcing; differentiable.

Shape legend: B rows, P packed tokens, D hidden width, T answer tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks


def executed_answer_logits(
    backbone: Backbone, encoding: Encoding, masks: Masks, answers: Sequence[list[int]]
) -> Tensor:
    """Logits (T, V), in float32, at the places that predict each answer's tokens and its end, row after row.

    Args:
        backbone: runs what the plans keep, and nothing else.
        encoding: B prompts followed by their answers.
        masks: B plans, without stages.
        answers: ids of each row's answer, without an end token.
    """
    masks = backbone.restrict(encoding, masks)
    tokens = backbone.pack(encoding, masks)
    if tokens.calibration is not None:
        prompts_B = tokens.ragged.lengths - torch.tensor([len(ids) for ids in answers])
        tokens = replace(tokens, calibration=replace(tokens.calibration, prompts_B=prompts_B))
    tokens, _, _ = backbone.decoder.run(tokens, masks)
    places = [
        last - torch.arange(len(ids), -1, -1, device=last.device)
        for last, ids in zip(tokens.ragged.last, answers, strict=True)
    ]
    return backbone.model.lm_head(tokens.x_PD[torch.cat(places)]).float()
