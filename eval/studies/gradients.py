"""How good the gradient estimators are, on plans few enough to enumerate: bias and spread against the exact one.

The policy is as plain as can be, one logit a unit whatever the query says, so that the expected loss is a sum over
all plans. What is estimated is the derivative of that sum by the logits.

Shape legend: B samples, A flat action length, G samples in a group.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding, Query
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.soft_decoder import Gates, soft_answer_logits
from maskgym.backbones.tiny.build import build_tiny
from maskgym.eval.measure.report import markdown
from maskgym.policies.controller.decisions import Decider
from maskgym.policies.controller.network import ControllerConfig
from maskgym.policies.relaxation.estimators import gumbel_straight_through


def smallest_case() -> tuple[Backbone, Query]:
    """A random LLaVA of 4 visual tokens and 2 layers of 2 heads, nothing protected, so 1,024 plans; and a query."""
    torch.manual_seed(0)
    words = ["what color is the shape? red"]
    sizes = {"image_size": 8, "patch_size": 4, "hidden": 16, "layers": 2, "heads": 2, "intermediate": 16}
    model, processor = build_tiny(words, **sizes, vision_hidden=16, vision_layers=1)
    family = LlavaFamily(model.requires_grad_(False), processor)
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    query = Query("noise", Image.fromarray(noise), "what color is the shape?", ("red",))
    return Backbone(family, "smallest", protected_layers=()), query


class FixedLogits(nn.Module):
    """In the place of a controller: logits (B, A) that read nothing.

    Args:
        config: the layout's sizes.
        logits_BA: one row a sample.
    """

    def __init__(self, config: ControllerConfig, logits_BA: Tensor):
        super().__init__()
        self.config = config
        self.logits_BA = nn.Parameter(logits_BA)

    def read(self, *_: Tensor) -> None:
        """Nothing."""

    def token_logits(self, reading: None) -> Tensor:
        return self.logits_BA[:, : self.config.tokens]

    def llm_logits(self, reading: None, kept_BN: Tensor, left_B: Tensor) -> Tensor:
        return self.logits_BA[:, self.config.tokens :]

    def flops(self, text_tokens: Tensor) -> Tensor:
        return torch.zeros_like(text_tokens)


def gradient_quality(
    backbone: Backbone,
    query: Query,
    logits_A: Tensor,
    answer: list[int],
    samples: int = 2048,
    temperatures: tuple[float, ...] = (0.5, 1.0, 2.0),
    group: int = 4,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Bias, spread and direction of each estimator's gradient.

    Args:
        backbone: one of few units and none protected; 2^A plans are executed.
        query: what is asked.
        logits_A: where the gradient is taken.
        answer: ids of the right answer.
        samples: B, draws for each estimator.
        temperatures: of the straight-through estimator.
        group: G, draws that are each other's baseline for the policy gradient.
        seed: of the draws.

    Returns:
        By estimator: ``bias`` (norm of mean minus exact) and ``spread`` (root of the summed variance of one sample),
        both over the norm of the exact gradient, and ``cosine`` of the mean with the exact gradient.
    """
    torch.manual_seed(seed)
    exact_A = exact_gradient(backbone, query, logits_A, answer)
    estimates = {"policy gradient": policy_gradient(backbone, query, logits_A, answer, samples, group)}
    for temperature in temperatures:
        name = f"straight-through, temperature {temperature:g}"
        estimates[name] = straight_through_gradient(backbone, query, logits_A, answer, samples, temperature)
    scale = exact_A.norm()
    table = {}
    for name, gradient_BA in estimates.items():
        mean_A = gradient_BA.mean(0)
        table[name] = {
            "bias": float((mean_A - exact_A).norm() / scale),
            "spread": float(gradient_BA.var(0).sum().sqrt() / scale),
            "cosine": float(F.cosine_similarity(mean_A, exact_A, dim=0)),
        }
    return table


def exact_gradient(backbone: Backbone, query: Query, logits_A: Tensor, answer: list[int]) -> Tensor:
    """(A,) derivative of the expected loss, by enumeration of all plans."""
    bits_BA = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(logits_A))))
    losses_B = answer_losses(backbone, query, bits_BA, answer)
    logits_A = logits_A.clone().requires_grad_()
    log_probs_BA = -F.binary_cross_entropy_with_logits(logits_A.expand_as(bits_BA), bits_BA, reduction="none")
    (log_probs_BA.sum(1).exp() * losses_B).sum().backward()
    assert logits_A.grad is not None
    return logits_A.grad


def policy_gradient(
    backbone: Backbone, query: Query, logits_A: Tensor, answer: list[int], samples: int, group: int
) -> Tensor:
    """(B, A) single-sample estimates: the score function times the loss minus the mean of the group's others."""
    chances_A = logits_A.sigmoid()
    bits_BA = torch.bernoulli(chances_A.expand(samples, -1))
    losses = answer_losses(backbone, query, bits_BA, answer).view(-1, group)
    others = (losses.sum(1, keepdim=True) - losses) / (group - 1)
    return (losses - others).view(-1, 1) * (bits_BA - chances_A)


def straight_through_gradient(
    backbone: Backbone, query: Query, logits_A: Tensor, answer: list[int], samples: int, temperature: float
) -> Tensor:
    """(B, A) single-sample estimates by Gumbel straight-through."""
    config = ControllerConfig.for_layout(backbone.layout, backbone.hidden)
    fixed: Any = FixedLogits(config, logits_A.expand(samples, -1).clone())
    decider = Decider(fixed, backbone)
    encoding = _repeated(backbone, query, samples)
    budgets_B = torch.ones(samples, dtype=torch.float64)
    relaxed = gumbel_straight_through(decider, encoding, budgets_B, temperature, fit=False)
    _losses(backbone, query, relaxed.gates(decider), answer).sum().backward()
    assert fixed.logits_BA.grad is not None
    return fixed.logits_BA.grad


def answer_losses(backbone: Backbone, query: Query, bits_BA: Tensor, answer: list[int]) -> Tensor:
    """(B,) loss of the answer under hard plans."""
    masks = backbone.layout.unflatten(bits_BA.bool())
    with torch.no_grad():
        return _losses(backbone, query, Gates.of(masks), answer)


def _losses(backbone: Backbone, query: Query, gates: Gates, answer: list[int]) -> Tensor:
    rows = len(gates.tokens)
    encoding = _repeated(backbone, query, rows, answer)
    logits_TV = soft_answer_logits(backbone, encoding, gates, [answer] * rows)
    end = backbone.processor.tokenizer.eos_token_id
    targets_T = torch.tensor([*answer, end] * rows)
    return F.cross_entropy(logits_TV, targets_T, reduction="none").view(rows, -1).sum(1)


def _repeated(backbone: Backbone, query: Query, rows: int, answer: list[int] | None = None) -> Encoding:
    images = backbone.encode_images([query.the_image()])
    encoding = backbone.assemble(images, [query.question], continuations=None if answer is None else [answer])
    return encoding.rows(torch.zeros(rows, dtype=torch.long))


def gradient_table(figures: dict[str, dict[str, float]]) -> str:
    """As Markdown."""
    rows: list[tuple[str, ...]] = [("estimator", "bias", "spread of one sample", "cosine of the mean")]
    rows += [(name, *(f"{value:.3f}" for value in own.values())) for name, own in figures.items()]
    return markdown(rows)
