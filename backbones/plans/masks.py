"""Plans as boolean masks, and their layout as one flat action.

Shape legend: B rows (one plan each), N visual tokens, L layers, H head slots per layer, A flat action length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from maskgym.backbones.plans.midway import Midway
from maskgym.backbones.plans.stages import Stage, cat_stages
from maskgym.backbones.plans.survivors import Survivors
from maskgym.common.errors import InputError, check_count

AXES = ("tokens", "heads", "layers")
"""The three dimensions of a plan, in the order of the flat action."""


def check_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """The axes in their own order, each once.

    Raises:
        InputError: none, or an unknown one.
    """
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not axes:
        raise InputError(f"the axes are {', '.join(axes) or 'none'}; they must be some of {', '.join(AXES)}")
    return tuple(axis for axis in AXES if axis in axes)


@dataclass(frozen=True)
class Masks:
    """The plans of a batch: boolean, True = keep.

    The flat action is ``tokens``, ``heads`` and ``layers``; the rest is for rules that do more than masks say.

    Attributes:
        tokens: (B, N) visual tokens that the language model sees.
        heads: (B, L, H) head slots; those of a dropped layer mean nothing.
        layers: (B, L) decoder layers that are run.
        stages: by layer: visual tokens that leave inside the decoder.
        survivors: how the kept tokens are laid out; None: as they are.
        making: (B,) int64 FLOPs that making the plan took, beyond what its planner charges for every query alike.
        midway: a decision inside the decoder; until then ``heads`` and ``layers`` after it are of the same cost.
    """

    tokens: Tensor
    heads: Tensor
    layers: Tensor
    stages: tuple[Stage, ...] = ()
    survivors: Survivors | None = None
    making: Tensor | None = None
    midway: Midway | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Masks:
        return self.map(lambda part: part[rows])

    def to(self, device: torch.device | str) -> Masks:
        return self.map(lambda part: part.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Masks:
        """The plans with a function applied to each tensor."""
        return Masks(
            function(self.tokens),
            function(self.heads),
            function(self.layers),
            tuple(stage.map(function) for stage in self.stages),
            None if self.survivors is None else self.survivors.map(function),
            None if self.making is None else function(self.making),
            None if self.midway is None else self.midway.map(function),
        )

    def with_bits(self, bits: Masks) -> Masks:
        """These plans with the tokens, heads and layers of others."""
        return replace(self, tokens=bits.tokens, heads=bits.heads, layers=bits.layers)

    def where(self, condition_B: Tensor, other: Masks) -> Masks:
        """These plans in rows where the condition holds, the other's elsewhere."""
        rows_B = torch.arange(len(self), device=condition_B.device)
        return Masks.cat([self, other])[torch.where(condition_B, rows_B, rows_B + len(self))]

    @property
    def appended(self) -> int:
        """Text tokens that the plans add to each prompt."""
        return 0 if self.midway is None else 1

    @property
    def effective_heads(self) -> Tensor:
        """(B, L, H) head slots that are really computed: kept, in a kept layer."""
        return self.heads & self.layers[..., None]

    @staticmethod
    def cat(parts: Sequence[Masks]) -> Masks:
        rows = [len(part) for part in parts]
        made = [part.making for part in parts if part.making is not None]
        makings = [
            part.tokens.new_zeros(len(part), dtype=torch.int64) if part.making is None else part.making
            for part in parts
        ]
        return Masks(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.heads for part in parts]),
            torch.cat([part.layers for part in parts]),
            cat_stages([part.stages for part in parts], rows),
            Survivors.cat([part.survivors for part in parts], rows),
            torch.cat(makings) if made else None,
            Midway.cat([part.midway for part in parts]),
        )


@dataclass(frozen=True)
class MaskLayout:
    """The shape of a plan for one backbone; it defines the flat action.

    The flat action is ``[tokens (N), heads (L*H, layer by layer), layers (L)]``, 0 = drop, 1 = keep.

    Attributes:
        tokens: N, visual tokens.
        layers: L, decoder layers.
        heads: H, head slots per layer.
        protected_layers: layers that always run with all their head slots, whatever the action says.
    """

    tokens: int
    layers: int
    heads: int
    protected_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tokens", "layers", "heads"):
            check_count(f"MaskLayout.{name}", getattr(self, name))
        outside = [layer for layer in self.protected_layers if not 0 <= layer < self.layers]
        if outside:
            raise InputError(f"protected layers {outside} do not exist; the layout has layers 0 to {self.layers - 1}")

    @property
    def size(self) -> int:
        """A, the length of the flat action."""
        return self.tokens + self.layers * self.heads + self.layers

    @property
    def level1(self) -> slice:
        """The part of the flat action that the vision-side level decides."""
        return slice(0, self.tokens)

    @property
    def level2(self) -> slice:
        """The part of the flat action that the LLM-side level decides: heads, then layers."""
        return slice(self.tokens, self.size)

    def full(self, rows: int = 1, device: torch.device | str = "cpu") -> Masks:
        """The plan that keeps everything, ``rows`` times."""
        return self.unflatten(torch.ones(rows, self.size, dtype=torch.bool, device=device))

    def flatten(self, masks: Masks) -> Tensor:
        """Masks of B rows as flat bits, (B, A) bool."""
        return torch.cat([masks.tokens, masks.heads.flatten(1), masks.layers], dim=1)

    def unflatten(self, bits: Tensor) -> Masks:
        """Flat bits (B, A) bool as Masks, with the protected parts kept. Unchecked: see ``parse``."""
        tokens, heads, layers = bits.split([self.tokens, self.layers * self.heads, self.layers], dim=1)
        heads = heads.unflatten(1, (self.layers, self.heads))
        if self.protected_layers:
            protected = list(self.protected_layers)
            heads, layers = heads.clone(), layers.clone()
            heads[:, protected] = True
            layers[:, protected] = True
        return Masks(tokens, heads, layers)

    def parse(self, actions: np.ndarray) -> Masks:
        """Actions from outside, (B, A) or (A,) of 0 and 1, as Masks.

        Raises:
            InputError: a length other than A, or a value other than 0 and 1.
        """
        try:
            actions = np.atleast_2d(np.asarray(actions))
        except ValueError:  # rows of different lengths
            actions = np.empty((1, 0))
        if actions.ndim != 2 or actions.shape[1] != self.size:
            raise InputError(
                f"an action has shape {actions.shape[1:]}; this layout ({self.tokens} tokens + {self.layers} x "
                f"{self.heads} heads + {self.layers} layers) takes a flat vector of {self.size}"
            )
        bad = (actions != 0) & (actions != 1)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(
                f"action value {actions[row, column]!s} at row {row}, position {column}; "
                "every value must be 0 (drop) or 1 (keep)"
            )
        return self.unflatten(torch.from_numpy(actions.astype(bool)))

    def protected(self, device: torch.device | str = "cpu", axes: Sequence[str] = AXES) -> Tensor:
        """(A,) bool: the bits that are kept whatever the action says; all bits of an axis that is not in ``axes``."""
        bits_A = self.flatten(self.unflatten(torch.zeros(1, self.size, dtype=torch.bool, device=device)))[0]
        sizes = (self.tokens, self.layers * self.heads, self.layers)
        for axis, part in zip(AXES, bits_A.split(sizes), strict=True):
            part |= axis not in axes
        return bits_A
