"""What rules that read the vision tower share: a signal with or without a class token, and tokens rewritten by merging.

Shape legend: B rows, N visual tokens, M merged tokens of the row with most, C tower width, D hidden width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.encodings.saliency import SIGNALS, Saliency
from maskgym.backbones.engine.picking import put
from maskgym.backbones.plans.survivors import Survivors
from maskgym.common.errors import InputError
from maskgym.policies.static.counts import TokenPlanner

SUBSTITUTE = "@mean-attention"
"""Ends the name of a rule that takes the mean attention received in place of the class token's."""


class TowerPlanner(TokenPlanner):
    """A rule that needs one layer's attention and keys.

    Args:
        backbone: prices the plans; its tower is asked from now on.
        name: without substitute.
        layer: ``last`` or ``features``: the tower's last layer, or the one that the features come from.
        cls: whether the class token's attention is taken, or else the mean attention received.

    Raises:
        InputError: a tower without a class token.
    """

    positions = "renumbered"

    def __init__(self, backbone: Backbone, name: str, layer: str, cls: bool):
        self.signal = f"{'cls' if cls else 'mean'}-{layer}"
        self.signals = (self.signal,)
        if cls and self.signal not in backbone.family.signals:
            raise InputError(
                f"policy {name!r} needs a class token, which the vision tower of "
                f"{backbone.model.config.model_type!r} has not; use {name + SUBSTITUTE!r}"
            )
        super().__init__(backbone, name if cls else name + SUBSTITUTE)

    def saliency(self, encoding: Encoding) -> Saliency:
        """What the tower says of these images.

        Raises:
            InputError: an encoding that was made before the tower was asked.
        """
        if self.signal not in encoding.saliency:
            raise InputError(
                f"policy {self.name!r} needs {SIGNALS[self.signal]}, which this encoding lacks; make the policy first, "
                "then encode"
            )
        return encoding.saliency[self.signal]

    def mergeable(self, encoding: Encoding) -> Tensor:
        """(B, N, C or D) what is merged: the tower's features where the projector takes tokens one by one, else the
        visual tokens themselves."""
        features = self.saliency(encoding).features
        return encoding.visual_BND if features is None else features

    def rewritten(
        self, encoding: Encoding, numbers_BM: Tensor, chosen_BM: Tensor, merged: Tensor, order_BN: Tensor
    ) -> Survivors:
        """The layout with some tokens replaced by merged ones, which go through the projector."""
        new_BMD = self.backbone.family.project(merged.to(encoding.visual_BND.dtype))
        tokens_BND = put(encoding.visual_BND, numbers_BM, chosen_BM, new_BMD)
        rows, device = len(encoding), encoding.visual_BND.device
        plain = Survivors.plain(rows, self.positions, device=device)
        return replace(plain, own=torch.ones_like(plain.own), tokens=tokens_BND, order=order_BN)
