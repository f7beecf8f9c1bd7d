"""Grow ``small``: python -m policies.grow PHASE --out FOLDER. Phases go on from what the last one left there.

plans     draw the pools of random plans (once, on the CPU)
tower     lessons for the vision tower
language  everything together: in full first, then under random plans as well
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from backbones.small import VISION, build_small
from backbones.smollm2 import find_file, load_language_model
from policies.grow.dense import DenseDecoder
from policies.grow.lessons import WORDS, Lessons
from policies.grow.model import Grown, Vision, save_shards, vision_tensors
from policies.grow.plans import Pool, choose_tokens, draw_restored, draw_standard_pools, gates_of, lay_out
from policies.grow.stream import Batch, Pieces, Stream
from policies.muon import MuonAdamW

TOKENIZER, LESSON_WORDS, POOLS, WEIGHTS = "tokenizer.json", "words.npz", "pools", "weights"
"""Names within the folder of a run."""

HIDDEN = 576


def options(arguments: Any = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("plans", "tower", "language"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--file", type=Path, help="the published language model; by default the installed package's")
    parser.add_argument("--seconds", type=float, default=60, help="of training: rates and phases follow the clock")
    parser.add_argument("--steps", type=int, default=10**9, help="most optimiser steps, where the clock allows them")
    parser.add_argument("--images", type=int, default=64, help="images a step")
    parser.add_argument("--room", type=int, default=253, help="tokens of questions and answers an image")
    parser.add_argument("--rank", type=int, default=32, help="of the deltas")
    parser.add_argument("--rate", type=float, default=7e-4, help="peak learning rate of deltas and projector")
    parser.add_argument(
        "--vision-rate", type=float, default=3e-4, help="peak learning rate of the tower, with language"
    )
    parser.add_argument("--plain-share", type=float, default=0.35, help="share of the time before random plans join")
    parser.add_argument(
        "--ramp-share", type=float, default=0.2, help="share of the time until all budgets have come in"
    )
    parser.add_argument("--workers", type=int, default=14, help="processes that draw batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every", type=float, default=60, help="seconds between validations")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layer")
    return parser.parse_args(arguments)


class Run:
    """Clock and metrics of a phase."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.began, self.training = given, time.time(), 0.0
        self._metrics = (given.out / f"{given.phase}.jsonl").open("a", encoding="utf-8")
        self.log(settings={name: str(value) for name, value in vars(given).items()}, torch=torch.__version__)

    def log(self, **entries: Any) -> None:
        line = json.dumps({"seconds": round(time.time() - self.began, 1), **entries})
        print(line, flush=True)
        self._metrics.write(line + "\n")
        self._metrics.flush()

    def progress(self, step: int) -> float:
        """Share of the training that is over, by the clock or by steps, whichever is further."""
        if not self.training:
            self.training = time.time()
        return max((time.time() - self.training) / self.given.seconds, step / self.given.steps)

    def pause(self, since: float) -> None:
        """Do not count the time since then."""
        self.training += time.time() - since


def batches(given: argparse.Namespace, room: int, images: int, seed: int, workers: int) -> Iterator[Batch]:
    stream = Stream(str(given.out / TOKENIZER), images, room, seed)
    cuda = given.device == "cuda"
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=3 if workers else None, pin_memory=cuda
    )
    for batch in loader:
        yield batch.to(given.device)


def rate_at(progress: float, warmup: float = 0.03, decay: float = 0.4) -> float:
    """Warm-up, plateau, and a linear decay to nothing."""
    return min(1.0, progress / warmup, max(0.0, (1 - progress) / decay))


def step_along(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[Tensor], rate: float) -> float:
    """One step, none where gradients are not finite; returns the gradient's norm."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    for parameter in parameters:
        if parameter.grad is not None:
            torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)
    optimizer.step()
    return norm


def adamw(groups: list[tuple[list[Any], float, float]], device: str) -> torch.optim.AdamW:
    """Of parameters, peak rates and weight decays."""
    return torch.optim.AdamW(
        [{"params": own, "lr": 0.0, "peak": peak, "weight_decay": decay} for own, peak, decay in groups],
        lr=0.0,
        betas=(0.9, 0.98),
        fused=device == "cuda",
    )


def plans(given: argparse.Namespace) -> None:
    """Draw the pools, and keep the tokenizer and the words of the lessons beside them."""
    model, processor = build_small(given.seed, given.file)
    tokenizer: Any = processor.tokenizer
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(given.out / TOKENIZER))
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for words in WORDS for word in words]
    rows = model.get_input_embeddings().weight[ids].detach().numpy()
    loudness = float(model.get_input_embeddings().weight.detach().square().mean().sqrt())
    np.savez(given.out / LESSON_WORDS, words=rows, loudness=loudness)
    draw_standard_pools(model, processor, given.out / POOLS, given.seed)


def untrained_vision(seed: int) -> Vision:
    """Tower and projector with random weights, without the language model."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=8, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=1, num_attention_heads=9
    )
    return Vision(
        LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text))
    )


def tower(given: argparse.Namespace) -> None:
    """Lessons for tower and projector."""
    run = Run(given)
    with np.load(given.out / LESSON_WORDS) as stored:
        words_KD, loudness = torch.from_numpy(stored["words"]), float(stored["loudness"])
    vision, lessons = untrained_vision(given.seed).to(given.device), Lessons(words_KD).to(given.device)
    parameters = [*vision.parameters(), *lessons.parameters()]
    named = [*vision.named_parameters(), *lessons.named_parameters()]
    optimizer = MuonAdamW(named, muon_rate=4e-3, adamw_rate=1e-3)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    shown = time.time()
    for step, batch in enumerate(batches(given, 0, given.images, given.seed, given.workers)):
        progress = run.progress(step)
        if progress >= 1:
            break
        loss, right = lessons(vision(batch.pixels), batch.lessons)
        step_along(optimizer, loss, parameters, rate_at(progress, 0.05, 0.5))
        if time.time() - shown > 10 or step in (0, 10, 100):
            shown = time.time()
            run.log(step=step, loss=round(loss.item(), 4), right=[round(x, 3) for x in right.tolist()])
    vision.scale_to(loudness, batch.pixels)
    run.log(step=step, loss=round(loss.item(), 4), right=[round(x, 3) for x in right.tolist()], ended=True)
    save_shards(vision_tensors(vision), given.out / WEIGHTS)


def language(given: argparse.Namespace) -> None:
    """Train everything together."""
    run, device = Run(given), given.device
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    stream = batches(given, given.room, given.images, given.seed + 1, given.workers)
    checks = batches(given, given.room, given.images, given.seed + 1_000_003, min(given.workers, 1))
    first = next(stream)  # the workers begin while the language model is read
    validation = [next(checks) for _ in range(8 if device == "cuda" else 1)]
    grown = build(given).to(device)
    run.log(built=True)
    if given.compile and not compiles(grown, first, dtype):
        grown.decoder.compiled = False
        run.log(compiled=False)
    pools = {path.stem: Pool.load(path, grown.decoder.q_heads).to(device) for path in (given.out / POOLS).glob("*.npz")}
    generator = torch.Generator(device).manual_seed(given.seed)
    optimizer = adamw(_groups(given, grown), device)
    parameters = [p for p in grown.parameters() if p.requires_grad]
    checked = shown = time.time()
    sums: dict[str, float] = {}
    step, batch = 0, first
    while (progress := run.progress(step)) < 1:
        joined = (progress - given.plain_share) / (given.ramp_share or 1e-9)
        parts = losses(grown, batch, pools["train"] if joined >= 0 else None, joined, generator, dtype)
        norm = step_along(optimizer, torch.stack(list(parts.values())).sum(), parameters, rate_at(progress))
        step += 1
        if time.time() - shown > 10 or step in (1, 2, 10, 50):
            shown = time.time()
            sums = {name: round(part.item(), 4) for name, part in parts.items()}
            run.log(step=step, progress=round(progress, 4), **sums, norm=round(float(norm), 3))
        if time.time() - checked > given.validate_every:
            checked = time.time()
            run.log(step=step, **validate(grown, validation, pools, dtype, given.seed))
            grown.save(given.out / WEIGHTS)
            run.pause(checked)
            checked = time.time()
        batch = next(stream)
    grown.save(given.out / WEIGHTS)
    run.log(step=step, images=step * given.images, **validate(grown, validation, pools, dtype, given.seed), ended=True)


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


def build(given: argparse.Namespace) -> Grown:
    """The VLM with what the phases before have left."""
    published: Any = load_language_model(given.file or find_file())
    decoder = DenseDecoder(published.model, given.rank, given.seed, given.compile)
    grown = Grown(untrained_vision(given.seed), decoder, Pieces(str(given.out / TOKENIZER)).before)
    grown.load(given.out / WEIGHTS)
    return grown


def _groups(given: argparse.Namespace, grown: Grown) -> list[tuple[list[Any], float, float]]:
    decoder, vision = grown.decoder, grown.vision
    return [
        ([*decoder.A.values(), *decoder.B.values()], given.rate, 0.0),
        ([decoder.norm_in, decoder.norm_post, decoder.norm_final], 0.3 * given.rate, 0.0),
        (list(vision.projector.parameters()), given.rate, 0.0),
        (list(vision.tower.parameters()), given.vision_rate, 0.01),
    ]


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
    grown: Grown,
    batch: Batch,
    laid: Any,
    pool: Pool,
    rows_B: Tensor,
    generator: torch.Generator,
    dtype: torch.dtype,
    restored: bool | None = None,
) -> Tensor:
    """(T, V) logits, each image under a plan of the pool."""
    counts_B, heads_BLQ = pool.tokens_K[rows_B], pool.heads_KLQ[rows_B]
    kept_BN = choose_tokens(laid.visual_BND, counts_B, generator)
    restored_B = draw_restored(len(rows_B), generator, rows_B.device)
    if restored is not None:
        restored_B = torch.full_like(restored_B, restored)
    before = len(grown.before)
    answers_BS = F.pad(batch.answers, (before + kept_BN.shape[1], 0))
    pruned = lay_out(laid, kept_BN, restored_B, answers_BS, before, grown.decoder.rates_R)
    return grown.asked(batch, pruned, gates_of(heads_BLQ, grown.decoder.intermediate), dtype).float()


def validate(
    grown: Grown, validation: list[Batch], pools: dict[str, Pool], dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Shares of answers that are exact in full and under each pool's plans, short and long ones apart.

    Gradients stay on: compiled once, the layer serves here too.
    """
    result: dict[str, Any] = {}
    for name, pool in {"full": None, **pools}.items():
        generator = torch.Generator(validation[0].ids.device).manual_seed(seed)
        exact, long = [], []
        for batch in validation:
            laid = grown.lay_out(batch)
            if pool is None:
                logits_TV = grown.asked(batch, laid, grown.full_gates(len(batch.ids)), dtype)
            else:
                rows = torch.randint(len(pool), (len(batch.ids),), generator=generator, device=batch.ids.device)
                logits_TV = under_plans(grown, batch, laid, pool, rows, generator, dtype)
            wrong_T = (logits_TV.detach().argmax(-1) != batch.targets).long()
            wrong_Q = torch.zeros(len(batch.long), dtype=torch.long, device=wrong_T.device)
            exact.append(wrong_Q.scatter_add_(0, batch.question, wrong_T) == 0)
            long.append(batch.long)
        exact_Q, long_Q = torch.cat(exact).float(), torch.cat(long)
        result[name] = [round(exact_Q[~long_Q].mean().item(), 4), round(exact_Q[long_Q].mean().item(), 4)]
    return result


def main(arguments: Any = None) -> None:
    given = options(arguments)
    {"plans": plans, "tower": tower, "language": language}[given.phase](given)


if __name__ == "__main__":
    main()
