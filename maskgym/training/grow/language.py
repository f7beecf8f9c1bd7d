"""The phase of language: vision and language together, in full first, then under random plans as well.

Shape legend: B images, N visual tokens, S places, T answer tokens of all questions, V vocabulary.
"""

from __future__ import annotations

import time
import traceback
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.small.smollm2 import find_file, load_language_model
from maskgym.training.grow.dense import DenseDecoder
from maskgym.training.grow.model import Grown
from maskgym.training.grow.plans import Laid, Pool, choose_tokens, draw_restored, gates_of, lay_out
from maskgym.training.grow.run import (
    POOLS,
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    GrowConfig,
    Run,
    batches,
    rate_at,
    step_along,
)
from maskgym.training.grow.stream import Batch, Pieces
from maskgym.training.grow.tower import untrained_vision

CHECKS = 1_000_003
"""Added to the seed of batches to validate on."""


def language(given: GrowConfig) -> None:
    """Train everything together."""
    run, device = Run(given), given.device
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    before = Checkpoint.load(given)
    begun = 0 if before is None else before.step
    # Workers begin while the language model is read; those of a resumed run draw other batches than at first.
    drawn = batches(given, given.room, given.images, given.seed + 1 + begun, given.workers)
    checks = batches(given, given.room, given.images, given.seed + CHECKS, min(given.workers, 1))
    batch, validation = next(drawn), [next(checks) for _ in range(8 if device == "cuda" else 1)]
    grown = build(given).to(device)
    run.log(built=True)
    if given.compile and not compiles(grown, batch, dtype):
        grown.decoder.compiled = False
        run.log(compiled=False)
    pools = {path.stem: Pool.load(path, grown.decoder.q_heads).to(device) for path in (given.out / POOLS).glob("*.npz")}
    generator = torch.Generator(device).manual_seed(given.seed + begun)
    optimizer, parameters = adamw(given, grown), [p for p in grown.parameters() if p.requires_grad]
    if before is not None:
        before.restore(grown, optimizer)
    step, checked = begun, time.time()
    shown = checked

    def check(**more: Any) -> None:
        nonlocal checked
        run.stop()
        grown.save(given.out / WEIGHTS)
        Checkpoint.of(step, run.trained, grown, optimizer).save(given)
        run.log(step=step, **validate(grown, validation, pools, dtype, given.seed), **more)
        run.start()
        checked = time.time()

    run.start(0.0 if before is None else before.trained)
    while (progress := run.progress(step)) < 1:
        joined = (progress - given.plain_share) / max(given.ramp_share, 1e-9)
        parts = losses(grown, batch, pools["train"] if joined >= 0 else None, joined, generator, dtype)
        norm = step_along(optimizer, torch.stack(list(parts.values())).sum(), parameters, rate_at(progress, 0.03, 0.4))
        step += 1
        if time.time() - shown > 10 or step in (1, 10, 50):
            shown = time.time()
            said = {name: round(part.item(), 4) for name, part in parts.items()}
            run.log(step=step, progress=round(progress, 4), **said, norm=round(norm.item(), 3))
        if time.time() - checked > given.validate_every:
            check()
        batch = next(drawn)
    check(images=step * given.images, ended=True)


def build(given: GrowConfig) -> Grown:
    """The VLM with what the phases before have left."""
    published: Any = load_language_model(given.file or find_file())
    decoder = DenseDecoder(published.model, given.rank, given.seed, given.compile)
    grown = Grown(
        untrained_vision(given.seed, published.config.hidden_size), decoder, Pieces(str(given.out / TOKENIZER)).before
    )
    grown.load(given.out / WEIGHTS)
    return grown


def compiles(grown: Grown, batch: Batch, dtype: torch.dtype) -> bool:
    """Whether the compiled layer runs here, backwards as well; where it does not, the plain one does the same."""
    try:
        grown.asked(batch, grown.lay_out(batch), grown.full_gates(len(batch.ids)), dtype).float().mean().backward()
    except Exception:
        traceback.print_exc()
        return False
    finally:
        grown.zero_grad(set_to_none=True)
    return True


def adamw(given: GrowConfig, grown: Grown) -> torch.optim.AdamW:
    """AdamW of all that is trained, each group with its ``peak`` rate."""
    decoder, vision = grown.decoder, grown.vision
    groups: list[tuple[list[Any], float, float]] = [
        ([*decoder.A.values(), *decoder.B.values()], given.rate, 0.0),
        ([decoder.norm_in, decoder.norm_post, decoder.norm_final], 0.3 * given.rate, 0.0),
        (list(vision.projector.parameters()), given.rate, 0.0),
        (list(vision.tower.parameters()), given.vision_rate, 0.01),
    ]
    return torch.optim.AdamW(
        [{"params": own, "peak": peak, "weight_decay": decay} for own, peak, decay in groups],
        lr=0.0,
        betas=(0.9, 0.98),
        fused=given.device == "cuda",
    )


def losses(
    grown: Grown, batch: Batch, pool: Pool | None, joined: float, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The parts of a batch's loss: in full, and under a random plan an image, as ``ElasticTrainer`` has them.

    An answer of k tokens counts as the root of k. From the moment that plans join (``joined`` 0) until 1, ever smaller
    budgets come in.
    """
    laid = grown.lay_out(batch)
    counts_Q = torch.bincount(batch.question, minlength=len(batch.long))
    weight_T = counts_Q[batch.question].float().rsqrt()
    weight_T = weight_T / weight_T.sum()
    full_TV = grown.asked(batch, laid, grown.full_gates(len(batch.ids)), dtype).float()
    parts = {"full": (F.cross_entropy(full_TV, batch.targets, reduction="none") * weight_T).sum()}
    if pool is None:
        return parts
    among = round(len(pool) * min(1.0, 0.2 + 0.8 * joined))  # those with the largest budgets come first
    rows_B = torch.randint(among, (len(batch.ids),), generator=generator, device=batch.ids.device)
    pruned_TV = under_plans(grown, batch, laid, pool, rows_B, generator, dtype)
    parts["pruned"] = (F.cross_entropy(pruned_TV, batch.targets, reduction="none") * weight_T).sum()
    teacher_TV, student_TV = full_TV.detach().log_softmax(-1), pruned_TV.log_softmax(-1)
    apart_T = F.kl_div(student_TV, teacher_TV, reduction="none", log_target=True).sum(-1)
    return parts | {"divergence": (apart_T * weight_T).sum()}


def under_plans(
    grown: Grown, batch: Batch, laid: Laid, pool: Pool, rows_B: Tensor, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """(T, V) logits, each image under a plan of the pool."""
    kept_BN = choose_tokens(laid.visual_BND, pool.tokens_K[rows_B], generator)
    restored_B = draw_restored(len(rows_B), generator, rows_B.device)
    before = len(grown.before)
    answers_BS = F.pad(batch.answers, (before + kept_BN.shape[1], 0))
    pruned = lay_out(laid, kept_BN, restored_B, answers_BS, before, grown.decoder.rates_R)
    return grown.asked(batch, pruned, gates_of(pool.heads_KLQ[rows_B], grown.decoder.intermediate), dtype).float()


def validate(
    grown: Grown, validation: list[Batch], pools: dict[str, Pool], dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Shares of short and of long answers that are exact, in full and under each pool's plans.

    Gradients stay on: compiled once, the layer serves here too.
    """
    result: dict[str, Any] = {}
    for name, pool in {"full": None, **pools}.items():
        generator = torch.Generator(validation[0].ids.device).manual_seed(seed)
        exact = []
        for batch in validation:
            laid, rows = grown.lay_out(batch), len(batch.ids)
            if pool is None:
                logits_TV = grown.asked(batch, laid, grown.full_gates(rows), dtype)
            else:
                rows_B = torch.randint(len(pool), (rows,), generator=generator, device=batch.ids.device)
                logits_TV = under_plans(grown, batch, laid, pool, rows_B, generator, dtype)
            wrong_T = (logits_TV.detach().argmax(-1) != batch.targets).long()
            wrong_Q = torch.zeros(len(batch.long), dtype=torch.long, device=wrong_T.device)
            exact.append(wrong_Q.scatter_add_(0, batch.question, wrong_T) == 0)
        exact_Q, long_Q = torch.cat(exact).float(), torch.cat([batch.long for batch in validation])
        result[name] = [round(exact_Q[~long_Q].mean().item(), 4), round(exact_Q[long_Q].mean().item(), 4)]
    return result
