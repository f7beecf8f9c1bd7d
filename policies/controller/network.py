"""The two-level controller: visual tokens first, then heads and layers given what the first level kept.

A plain ``nn.Module``, the same for every estimator; how it is sampled and trained is decided elsewhere.

Shape legend: B rows, N visual tokens, T text tokens, D hidden width of the backbone, W width of the controller,
K question pools, A2 = L*H + L decisions of the second level, 4 features of a share.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgym.backbones.plans.cost import mlp_flops
from maskgym.backbones.plans.masks import AXES, MaskLayout, check_axes
from maskgym.backbones.plans.survivors import Survivors
from maskgym.common.errors import InputError, check_count
from maskgym.policies.planning.even import even_confidence

SHARE_FEATURES = 4
RULES = ("threshold", "fill")


@dataclass(frozen=True)
class ControllerConfig:
    """The sizes of a controller; saved as ``controller.json``.

    Attributes:
        tokens: N of the layout that it decides on.
        layers: L of the layout.
        heads: H of the layout.
        hidden: D, the width of the backbone whose encodings it reads.
        width: W, its own.
        pools: K, learned poolings of the question.
        initial_logit: mean keep-logit of visual tokens before training.
        initial_spread: how far they lie around it, in an order of which every part is spread evenly over the image;
            head slots begin half as far above the mean, layers as far (``maskgym.policies.planning.even``);
            0: all units are alike.
        token_spread: of the visual tokens alone, if it is another.
        text_tokens: longest prompt with positions of their own; later tokens share the last.
        axes: what it decides on; units of other axes are always kept.
        rule: how logits become a plan. ``"threshold"``: units with a positive logit, as many as there are, projected
            into the budget where they exceed it. ``"fill"``: all logits are shifted by one number until the
            plan that they stand for spends the budget; the second level again, given the tokens kept.
        positions: how the kept tokens are laid out; see ``maskgym.backbones.plans.survivors``.
        merge: whether dropped tokens are averaged into kept ones.
    """

    tokens: int
    layers: int
    heads: int
    hidden: int
    width: int = 48
    pools: int = 4
    initial_logit: float = 2.0
    initial_spread: float = 2.0
    token_spread: float | None = None
    text_tokens: int = 64
    axes: tuple[str, ...] = AXES
    rule: str = "threshold"
    positions: str = "original"
    merge: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "layers", "heads", "hidden", "width", "pools", "text_tokens"):
            check_count(f"the controller's {name}", getattr(self, name))
        object.__setattr__(self, "axes", check_axes(self.axes))
        if self.rule not in RULES:
            raise InputError(f"the controller's rule is {self.rule!r}; it must be one of {', '.join(RULES)}")
        Survivors.asked(0, self.positions, self.merge)  # checks

    @classmethod
    def for_layout(cls, layout: MaskLayout, hidden: int, **sizes: Any) -> ControllerConfig:
        return cls(layout.tokens, layout.layers, layout.heads, hidden, **sizes)


@dataclass(frozen=True)
class Reading:
    """What the controller made of a batch before its first decision.

    Attributes:
        context_BW: question, image summary and budget.
        tokens_BNW: features of the visual tokens in that context.
    """

    context_BW: Tensor
    tokens_BNW: Tensor


class TwoLevelController(nn.Module):
    """Level 1 gives a keep-logit per visual token; level 2, given the tokens kept and the budget left, one per head
    slot and per layer.

    Args:
        config: its sizes.
    """

    def __init__(self, config: ControllerConfig):
        super().__init__()
        self.config = config
        d, w = config.hidden, config.width
        self.text_norm = nn.LayerNorm(d)
        self.text_places = nn.Parameter(torch.zeros(config.text_tokens, d))
        self.pool = nn.Linear(d, config.pools)
        self.read_question = nn.Linear(config.pools * d, w)
        self.visual_norm = nn.LayerNorm(d)
        self.read_visual = nn.Linear(d, w)
        self.visual_places = nn.Parameter(torch.zeros(config.tokens, w))
        self.read_context = nn.Linear(2 * w + SHARE_FEATURES, w)
        self.modulate = nn.Linear(w, 2 * w)
        self.token_head = nn.Linear(w, 1)
        self.token_bias = nn.Parameter(torch.empty(config.tokens))
        self.read_kept = nn.Linear(2 * w + 2 * SHARE_FEATURES, w)
        self.llm_head = nn.Linear(w, config.layers * config.heads + config.layers)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.text_places, std=0.02)
        nn.init.normal_(self.visual_places, std=0.02)
        for head in (self.token_head, self.llm_head):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.begin_with(even_confidence(MaskLayout(self.config.tokens, self.config.layers, self.config.heads)))

    @torch.no_grad()
    def begin_with(self, confidence_A: Tensor) -> None:
        """Make the first plan, before training, that in which units leave from -1 to 1, the same for every query."""
        config = self.config
        token_spread = config.initial_spread if config.token_spread is None else config.token_spread
        self.token_bias.copy_(config.initial_logit + token_spread * confidence_A[: config.tokens])
        self.llm_head.bias.copy_(config.initial_logit + config.initial_spread * confidence_A[config.tokens :])

    def read(
        self, visual_BND: Tensor, visual_valid_BN: Tensor, text_BTD: Tensor, text_valid_BT: Tensor, budgets_B: Tensor
    ) -> Reading:
        """Read a batch of encodings and budgets; in float32, whatever the backbone computes in.

        Args:
            visual_BND: visual tokens, padded.
            visual_valid_BN: bool, False where padded.
            text_BTD: text embeddings, padded.
            text_valid_BT: bool, False where padded.
            budgets_B: shares in (0, 1].
        """
        places_T = torch.arange(text_BTD.shape[1], device=text_BTD.device).clamp_max(self.config.text_tokens - 1)
        words_BTD = self.text_norm(text_BTD.float()) + self.text_places[places_T]
        weights_BTK = self.pool(words_BTD).masked_fill(~text_valid_BT[..., None], -torch.inf).softmax(1)
        question_BW = self.read_question((weights_BTK.transpose(1, 2) @ words_BTD).flatten(1))
        tokens_BNW = self.read_visual(self.visual_norm(visual_BND.float())) + self.visual_places
        image_BW = (tokens_BNW * visual_valid_BN[..., None]).sum(1) / visual_valid_BN.sum(1).clamp_min(1)[:, None]
        inputs = torch.cat([question_BW, image_BW, share_features(budgets_B)], dim=1)
        context_BW = F.gelu(self.read_context(inputs))
        scale_BW, shift_BW = self.modulate(context_BW).chunk(2, dim=1)
        return Reading(context_BW, F.gelu(tokens_BNW * (1 + scale_BW[:, None]) + shift_BW[:, None]))

    def token_logits(self, reading: Reading) -> Tensor:
        """Level 1: keep-logits (B, N)."""
        return self.token_head(reading.tokens_BNW)[..., 0] + self.token_bias

    def llm_logits(self, reading: Reading, kept_BN: Tensor, left_B: Tensor) -> Tensor:
        """Level 2: keep-logits (B, A2) of the head slots, layer by layer, then of the layers.

        Args:
            reading: of the same rows.
            kept_BN: the tokens kept, bool, or relaxed in [0, 1].
            left_B: the share of the LLM-side compute at these tokens that the budget still pays for; see
                ``budget_left``.
        """
        weights_BN = kept_BN.to(reading.tokens_BNW.dtype)
        count_B = weights_BN.sum(1)
        kept_BW = (weights_BN[..., None] * reading.tokens_BNW).sum(1) / count_B.clamp_min(1)[:, None]
        shares = [share_features(left_B), share_features(count_B / self.config.tokens)]
        return self.llm_head(F.gelu(self.read_kept(torch.cat([reading.context_BW, kept_BW, *shares], dim=1))))

    def flops(self, text_tokens: Tensor) -> Tensor:
        """(B,) FLOPs (2 x MACs) of one decision for prompts of (B,) text tokens."""
        c = self.config
        d, w = c.hidden, c.width
        question = text_tokens * (2 * mlp_flops(1, d, c.pools)) + mlp_flops(1, c.pools * d, w)  # score, then pool
        level1 = mlp_flops(c.tokens, d, w) + mlp_flops(1, 2 * w + SHARE_FEATURES, w, 2 * w) + mlp_flops(c.tokens, w, 1)
        level2 = mlp_flops(1, 2 * w + 2 * SHARE_FEATURES, w, self.llm_head.out_features)
        twice = c.rule == "fill" and "tokens" in c.axes and len(c.axes) > 1
        return question + level1 + level2 * (1 + twice)

    def config_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)


def share_features(share_B: Tensor) -> Tensor:
    """A share in [0, about 2] on four scales, (B, 4) float32."""
    share_B = share_B.float().clamp(1e-6, 2)  # not 0, where the root has no slope to differentiate
    return torch.stack([share_B, share_B.square(), share_B.sqrt(), (share_B + 0.05).log()], dim=1)
