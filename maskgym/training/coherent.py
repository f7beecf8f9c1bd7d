"""What random plans of a training are like; above all, orders in which visual tokens may leave together: by what they
show, or by where they are.

A controller keeps what a question is about. A model that has met only tokens drawn independently, every part of an
image thinned out alike, can answer worse from tokens chosen well than from as many drawn at random.

Shape legend: B rows, N visual tokens, D hidden width, A flat action length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskgym.backbones.encodings.encoding import Encoding

SHARPNESS = 3.0
"""Of the split between tokens, heads and layers in training plans (``random_waits``): a third of them cut
almost nothing but one, for a model loses most under kinds of plans that it has not met."""

RESTORED_SHARE = 0.5
"""Of the training plans whose dropped tokens are merged into kept ones with restored positions."""

KINDS = ("alone", "content", "place")
CHANCES = (0.4, 0.3, 0.3)
"""Of each kind of order."""
NOISE = 0.4
"""Standard deviation of what is added to the scores of tokens that leave together, which have 1."""


def reorder_tokens(waits_BA: Tensor, encoding: Encoding, generator: torch.Generator) -> Tensor:
    """(B, A) the same waiting times, those of the visual tokens in another order where tokens shall leave together.

    Args:
        waits_BA: drawn independently, tokens first; on the CPU.
        encoding: B queries.
        generator: of the draws.
    """
    tokens = encoding.visual_valid_BN.shape[1]
    alone_B1, scores_BN = draw_orders(encoding.visual_BND, encoding.visual_valid_BN, generator)
    together_BN = waits_BA[:, :tokens].sort(dim=1).values.gather(1, scores_BN.argsort(1).argsort(1))
    tokens_BN = torch.where(alone_B1, waits_BA[:, :tokens], together_BN)
    return torch.cat([tokens_BN, waits_BA[:, tokens:]], dim=1)


def draw_orders(visual_BND: Tensor, valid_BN: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (B, 1), bool, whose tokens leave alone; and scores (B, N) by which those of the others leave together, the
    lowest first. On the generator's device.

    Args:
        visual_BND: visual tokens.
        valid_BN: bool, which of them are there.
        generator: of the draws.
    """
    rows, tokens = valid_BN.shape
    chances = torch.tensor(CHANCES, device=generator.device)
    kind_B1 = torch.multinomial(chances, rows, replacement=True, generator=generator)[:, None]
    content_BN = _standard(_content(visual_BND, valid_BN, generator))
    place_BN = _standard(_place(rows, tokens, generator))
    noise_BN = NOISE * torch.randn(rows, tokens, generator=generator, device=generator.device)
    scores_BN = torch.where(kind_B1 == KINDS.index("content"), content_BN, place_BN) + noise_BN
    return kind_B1 == KINDS.index("alone"), scores_BN


def _content(visual_BND: Tensor, valid_BN: Tensor, generator: torch.Generator) -> Tensor:
    """(B, N) how far each token goes in a direction of its row's own, from the mean of its image."""
    device = generator.device
    visual_BND, valid_BN1 = visual_BND.float().to(device), valid_BN[..., None].to(device)
    mean_B1D = (visual_BND * valid_BN1).sum(1, keepdim=True) / valid_BN1.sum(1, keepdim=True).clamp_min(1)
    direction_BD1 = torch.randn(len(visual_BND), visual_BND.shape[2], 1, generator=generator, device=device)
    return ((visual_BND - mean_B1D) @ direction_BD1)[..., 0]


def _place(rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(B, N) three waves over the image, or over the reading order where the tokens are not a square."""
    side, device = math.isqrt(tokens), generator.device
    number_N = torch.arange(tokens, device=device)
    if side * side == tokens:
        at_N2 = torch.stack([number_N // side, number_N % side], dim=1) / side
    else:
        at_N2 = torch.stack([number_N / tokens, torch.zeros(tokens, device=device)], dim=1)
    waves_B23 = torch.randn(rows, 2, 3, generator=generator, device=device)
    phase_B13 = torch.rand(rows, 1, 3, generator=generator, device=device)
    return (2 * math.pi * (at_N2 @ waves_B23 + phase_B13)).cos().sum(2)


def _standard(scores_BN: Tensor) -> Tensor:
    return (scores_BN - scores_BN.mean(1, keepdim=True)) / scores_BN.std(1, keepdim=True).clamp_min(1e-6)
