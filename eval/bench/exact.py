"""How far masked execution is from Hugging Face's own model, and from the same plans by gates, on this device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Query
from maskgym.backbones.soft_decoder import Gates, soft_answer_logits
from maskgym.eval.bench.shapes import QUESTION
from maskgym.policies.baselines import random_plans
from maskgym.policies.planning.projection import least_share


@torch.no_grad()
def exactness(backbone: Backbone, rows: int = 4) -> dict[str, float]:
    """Largest differences of first-answer-token logits, each over the largest logit of the reference.

    Args:
        backbone: of any weights.
        rows: random plans, at budgets between the least that can be met and the full plan's cost.

    Returns:
        ``full_plan_vs_hf``: of the full plan from the stock model on pixels and prompt; ``batch_vs_alone``: of random
        plans run together from each run alone; ``plans_vs_gates``: of random plans from the relaxed model at gates
        of 0 and 1.
    """
    query = noise_query()
    one = backbone.encode([query])
    full_1V = backbone.prefill(one, backbone.full(one))[0]
    encoding = one.rows(torch.zeros(rows, dtype=torch.long))
    least_B = least_share(backbone, encoding)
    budgets_B = least_B + (1 - least_B) * torch.linspace(0.2, 0.8, rows, dtype=torch.float64, device=backbone.device)
    masks = random_plans(backbone, encoding, budgets_B, torch.Generator().manual_seed(0))
    together_BV = backbone.prefill(encoding, masks)[0]
    alone_BV = torch.cat([backbone.prefill(one, masks[row : row + 1])[0] for row in range(rows)])
    gated_BV = torch.cat(
        [soft_answer_logits(backbone, one, Gates.of(masks[row : row + 1]), [[]]) for row in range(rows)]
    )
    return {
        "full_plan_vs_hf": difference(full_1V, stock_logits(backbone, query)),
        "batch_vs_alone": difference(together_BV, alone_BV),
        "plans_vs_gates": difference(together_BV, gated_BV),
    }


def in_both_types(backbone: Backbone) -> list[dict[str, Any]]:
    """``exactness`` in float32 and then, of the same weights, in bfloat16, as that is where models run; there beside
    ``hf_vs_float32``, how far rounding alone moves Hugging Face's own logits.

    Args:
        backbone: in float32; in bfloat16 afterwards.
    """
    exact = {"type": "float32", **exactness(backbone)}
    reference_1V = stock_logits(backbone, noise_query())
    for weight in backbone.model.parameters():  # buffers, the rotary frequencies, stay in float32, as in a loaded model
        weight.data = weight.data.bfloat16()
    moved = difference(stock_logits(backbone, noise_query()), reference_1V)
    return [exact, {"type": "bfloat16", **exactness(backbone), "hf_vs_float32": moved}]


def noise_query() -> Query:
    """A question of 40 tokens in its prompt about an image of noise."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8))
    return Query("noise", image, QUESTION)


@torch.no_grad()
def stock_logits(backbone: Backbone, query: Query) -> Tensor:
    """(1, V) logits of the first answer token by Hugging Face's own forward pass, from pixels and prompt."""
    batch: Any = backbone.family.process([query.the_image()], [backbone.prompt(query.question)])
    pixels = batch["pixel_values"].to(backbone.device, backbone.model.dtype)
    ids, attended = (batch[name].to(backbone.device) for name in ("input_ids", "attention_mask"))
    return backbone.model(input_ids=ids, attention_mask=attended, pixel_values=pixels).logits[:, -1]


def difference(found: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the reference's largest absolute value."""
    return float((found.double() - reference.double()).abs().max() / reference.double().abs().max())
