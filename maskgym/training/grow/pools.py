"""The phase of plans: random plans for the training, drawn once by the rule of ``ElasticTrainer`` and kept in files.

Shape legend: K plans of a pool, L layers, Q query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding, Query
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.plans.masks import AXES
from maskgym.backbones.small.build import build_small
from maskgym.policies.baselines import random_waits
from maskgym.policies.planning.projection import least_share, project
from maskgym.training.coherent import SHARPNESS
from maskgym.training.grow.lessons import WORDS
from maskgym.training.grow.plans import Pool
from maskgym.training.grow.run import LESSON_WORDS, POOLS, ROWS, TOKENIZER, GrowConfig

Drawn = tuple[Tensor, Tensor, Tensor]


def plans(given: GrowConfig) -> None:
    """Draw the pools, and keep the tokenizer and the words of the lessons beside them."""
    model, processor = build_small(given.seed, given.file)
    tokenizer: Any = processor.tokenizer
    (given.out / POOLS).mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(given.out / TOKENIZER))
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for words in WORDS for word in words]
    words: Any = model.get_input_embeddings()
    embedding_VD: Tensor = words.weight.detach()
    np.savez(given.out / LESSON_WORDS, words=embedding_VD[ids].numpy(), loudness=embedding_VD.square().mean().sqrt())
    coarse, fine = (Backbone(LlavaFamily(model, processor), "small", heads=heads) for heads in (None, 9))
    for name, pool in standard_pools(coarse, fine, given.seed, given.pool).items():
        pool.save(given.out / POOLS / f"{name}.npz")


def standard_pools(coarse: Backbone, fine: Backbone, seed: int, scale: int) -> dict[str, Pool]:
    """Pools by name: ``train``, budgets uniform in 0.1 to 1; and to validate on, ``half`` and ``quarter`` of the FLOPs,
    and ``layers``, layers alone at three quarters.

    Args:
        coarse: has a head slot for every key-value head; three quarters of the training's plans are its, and
        fine: one for every query head; the others.
        seed: of everything.
        scale: plans of a pool to validate on; a multiple of ``ROWS``.
    """
    image = Image.new("RGB", (8, 8))
    queries = [Query(str(number), image, "word " * (8 + number % 8), ("red",), 0) for number in range(ROWS)]
    encodings = {id(backbone): backbone.encode(queries) for backbone in (coarse, fine)}

    def drawn(backbone: Backbone, count: int, low: float, high: float, own: int, axes: Sequence[str] = AXES) -> Drawn:
        return draw(backbone, encodings[id(backbone)], count, (low, high), seed + own, axes)

    return {
        "train": _pool(drawn(coarse, 12 * scale, 0.1, 1.0, 0), drawn(fine, 4 * scale, 0.1, 1.0, 1)),
        "half": _pool(drawn(coarse, scale, 0.5, 0.5, 2)),
        "quarter": _pool(drawn(coarse, scale, 0.25, 0.25, 3)),
        "layers": _pool(drawn(coarse, scale, 0.75, 0.75, 4, ("layers",))),
    }


def draw(
    backbone: Backbone,
    encoding: Encoding,
    count: int,
    between: tuple[float, float],
    seed: int,
    axes: Sequence[str] = AXES,
) -> Drawn:
    """Budgets (K,), kept visual tokens (K,) and kept query heads (K, L, Q) of random plans.

    Args:
        backbone: prices them.
        encoding: some queries, whose numbers of tokens they are priced at.
        count: K, a multiple of the queries.
        between: share of the FLOPs, lowest and highest.
        seed: of everything.
        axes: what may be dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    budgets, tokens, heads = [], [], []
    low, high = between
    for _ in range(count // len(encoding)):
        budgets_B = low + (high - low) * torch.rand(len(encoding), generator=generator, dtype=torch.float64)
        budgets_B = budgets_B.maximum(least_share(backbone, encoding, axes=axes))
        waits_BA = random_waits(backbone, len(encoding), generator, axes, SHARPNESS)
        masks = project(backbone, backbone.full(encoding), waits_BA, budgets_B, encoding, axes=axes)
        budgets.append(budgets_B)
        tokens.append(masks.tokens.sum(1))
        heads.append(masks.effective_heads.repeat_interleave(backbone.decoder.query_heads, dim=2))
    return torch.cat(budgets), torch.cat(tokens), torch.cat(heads)


def _pool(*drawn: Drawn) -> Pool:
    budgets_K, tokens_K, heads_KLQ = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    order_K = budgets_K.argsort(descending=True, stable=True)
    return Pool(tokens_K[order_K], heads_KLQ[order_K])
