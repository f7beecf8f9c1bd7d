"""How long a plan's prefill takes on one device, from a few measured plans.

Shape legend: B plans, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.common.atomic import write_json
from maskgym.common.errors import InputError
from maskgym.common.plain_files import MALFORMED, read_json

FEATURES = ("one call", "layers run", "weights read", "linear FLOPs", "attention FLOPs")


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of a single query's prefill as a sum of non-negative shares, so that dropping a unit never makes a
    plan slower: of the call itself, of each layer run, of the weights read, of the linear and of the attention FLOPs.

    Attributes:
        device: the device's name; the figures hold there only.
        backbone: the backbone's name.
        weights: milliseconds for each of ``FEATURES``.
        error: median relative error on plans that were held out of the fit.
    """

    device: str
    backbone: str
    weights: tuple[float, ...]
    error: float

    @classmethod
    def fit(cls, device: str, backbone: str, features_BF: np.ndarray, milliseconds_B: np.ndarray) -> LatencyModel:
        """Fit on every plan but each fourth, and state the error on those.

        Args:
            device: its name.
            backbone: its name.
            features_BF: of the measured plans, from ``plan_features``.
            milliseconds_B: measured.
        """
        held_out = np.arange(len(milliseconds_B)) % 4 == 3
        weights = _fit(features_BF[~held_out], milliseconds_B[~held_out])
        misses = np.abs(features_BF[held_out] @ weights / milliseconds_B[held_out] - 1)
        return cls(device, backbone, tuple(weights.tolist()), float(np.median(misses)))

    def predict(self, backbone: Backbone, encoding: Encoding, masks: Masks) -> Tensor:
        """(B,) float64 milliseconds of each plan alone."""
        features_BF = plan_features(backbone, encoding, masks)
        return features_BF @ torch.tensor(self.weights, dtype=torch.float64, device=features_BF.device)

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> LatencyModel:
        """Read a saved model.

        Raises:
            InputError: a missing or unreadable file.
        """
        try:
            fields = read_json(path)
            weights = tuple(float(weight) for weight in fields["weights"])
            if len(weights) != len(FEATURES) or not all(0 <= weight < math.inf for weight in weights):
                raise ValueError(f"{len(FEATURES)} non-negative weights expected")
            return cls(str(fields["device"]), str(fields["backbone"]), weights, float(fields["error"]))
        except MALFORMED as error:
            raise InputError(f"no readable latency model in {str(path)!r} ({error}); calibrate anew") from error


def plan_features(backbone: Backbone, encoding: Encoding, masks: Masks) -> Tensor:
    """(B, F) float64 ``FEATURES`` of plans; FLOPs in 10^9, weights in 10^6."""
    masks = backbone.restrict(encoding, masks)
    n_BL = backbone.sequence_lengths(encoding, masks)
    per_token_BL, per_pair_BL = backbone.decoder.shape.layer_terms(masks)
    runs = masks.effective_heads.any(2) if backbone.decoder.width == "heads+mlp" else masks.layers
    columns: Sequence[Tensor] = (
        torch.ones_like(n_BL[:, 0]),
        runs.sum(1),
        per_token_BL.sum(1) / 2e6,
        (n_BL * per_token_BL).sum(1) / 1e9,
        (n_BL * n_BL * per_pair_BL).sum(1) / 1e9,
    )
    return torch.stack([column.double() for column in columns], dim=1)


def _fit(features_BF: np.ndarray, milliseconds_B: np.ndarray) -> np.ndarray:
    """Non-negative least squares of the relative error."""
    scaled = features_BF / milliseconds_B[:, None]
    sizes = np.maximum(np.linalg.norm(scaled, axis=0), 1e-12)  # columns of one size, for the solver's sake
    return nnls(scaled / sizes, np.ones(len(milliseconds_B)))[0] / sizes
