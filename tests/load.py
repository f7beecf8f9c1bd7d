"""What the project bears: ``python -m tests.load --plans 100000 --queries 1000000 --clients 8``.

Plans for every family and kind of head slot, none of which may exceed its budget; a training whose VLM is simulated,
which must take no more memory the longer it runs; and threads on one ``AdaptiveVLM``, each of which must be told what
it would be told alone. ``tests/test_load.py`` has a smaller form of each.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import tyro
from PIL import Image
from stable_baselines3.common.callbacks import BaseCallback

import maskgym.training.rl as train_rl
from maskgym import AdaptiveVLM
from maskgym.backbones import Backbone, EncodingBank
from maskgym.backbones.answers import Answers, Limit
from maskgym.backbones.encodings.encoding import EncodedImage, Encoding, Query
from maskgym.backbones.plans.masks import Masks
from maskgym.envs.data.queries import DatasetQueries
from maskgym.eval.bench.data import private_mb
from maskgym.policies.baselines import RandomPlanner
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import RULES, ControllerConfig, TwoLevelController
from maskgym.policies.planner import Planner
from maskgym.policies.planning.projection import least_share
from tests.conftest import KINDS, build, make_dataset

MARKS = (10_000, 100_000, 600_000, 1_000_000)
"""Queries after which memory is read; after the third the backbone's cache of prompts is full."""

BANK_BYTES = 16 * 2**20
"""Of encodings that a simulated training keeps; the images that it meets have ten times as many."""

REQUESTS = 400


# Plans


def planners(backbone: Backbone) -> list[Planner]:
    """Random plans, and controllers of either rule."""
    sizes = [
        ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=4, pools=1, rule=rule) for rule in RULES
    ]
    return [
        RandomPlanner(backbone),
        *(ControllerPlanner(TwoLevelController(each), backbone, each.rule) for each in sizes),
    ]


def plan(kind: str, count: int, batch: int = 500) -> tuple[int, int, int]:
    """Plans for one kind of backbone, a third by each planner, at budgets from the least that is possible up to 1; the
    controllers' weights are drawn anew for each batch.

    Returns:
        How many plans, how many cost more than their budget, how many different ones there are.
    """
    torch.manual_seed(0)
    backbone = KINDS[kind]()
    everything = EncodingBank(backbone, DatasetQueries(make_dataset(), "made", "train")).gather(range(12))
    made, above, seen = 0, 0, set()
    while made < count:
        for planner in planners(backbone):
            for weight in planner.decider.controller.parameters() if isinstance(planner, ControllerPlanner) else ():
                weight.data += 0.5 * torch.randn_like(weight)
            encoding = everything.rows(torch.randint(12, (min(batch, count),)))
            own = planner.controller_flops(encoding)
            least_B = least_share(backbone, encoding, own)
            budgets_B = least_B * (1 / least_B) ** torch.rand(len(encoding), dtype=torch.float64)
            masks = planner.plan(encoding, budgets_B)
            above += int(
                (backbone.cost(encoding, masks, own).llm > budgets_B * backbone.full_llm_flops(encoding)).sum()
            )
            made += len(encoding)
            seen |= {bits.tobytes() for bits in backbone.layout.flatten(masks).numpy()}
    return made, above, len(seen)


# A simulated training


class SimulatedVLM(Backbone):
    """A backbone in name and price, whose tower and decoder are not run: an image is noise, and a plan that keeps more
    of it is right more often."""

    def __init__(self) -> None:
        real = build()
        super().__init__(real.family, real.name)
        self.like: EncodedImage = real.encode_images([Image.new("RGB", (16, 16))])[0]

    def encode_images(self, images: Sequence[Image.Image], ids: Sequence[str] | None = None) -> list[EncodedImage]:
        return [replace(self.like, visual_nD=torch.randn_like(self.like.visual_nD)) for _ in images]

    def answer(
        self,
        encoding: Encoding,
        masks: Masks,
        max_new_tokens: int = 1,
        references: Sequence[str] | None = None,
        limit: Limit | None = None,
    ) -> Answers:
        kept_B = masks.tokens.float().mean(1)
        right = (torch.rand(len(encoding)) < kept_B).tolist()
        texts = [accepted[0] if ok else "" for accepted, ok in zip(encoding.answers, right, strict=True)]
        return Answers(texts, [[0] for _ in texts], kept_B.clamp_min(1e-3).log(), masks)


class SimulatedQueries:
    """So many queries, each of another image and another question.

    Args:
        count: how many.
    """

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Query:
        id, question, answers = self.text(number)
        return Query(id, self._image, question, answers, number)

    def image_key(self, number: int) -> int:
        return number

    def text(self, number: int) -> tuple[str, str, tuple[str, ...]]:
        return f"q{number}", f"what color is the shape {number} ?", ("red",)

    @cached_property
    def _image(self) -> Image.Image:
        return Image.new("RGB", (16, 16))


class SimulatedConfig(train_rl.RLConfig):
    """A training whose backbone is simulated; its answers have one token, whatever a data set would say."""

    def load(self, backbone: str) -> Backbone:
        return SimulatedVLM()

    def load_priced(self) -> Backbone:
        return self.load(self.backbone)


class Memory(BaseCallback):
    """Reads the process's memory after so many queries, and shows it.

    Args:
        marks: after how many.

    Attributes:
        own: MB (2^20 bytes) that are the process's own, by mark.
    """

    def __init__(self, marks: Sequence[int]):
        super().__init__()
        self.left, self.own, self.began = list(marks), dict[int, float](), time.perf_counter()

    def _on_step(self) -> bool:
        while self.left and self.num_timesteps >= self.left[0]:
            mark = self.left.pop(0)
            self.own[mark] = private_mb()
            peak, rate = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, mark / self._seconds()
            print(f"training: {mark:,} queries, peak {peak:,.0f} MB, now {self.own[mark]:,.0f}; {rate:,.0f} a second")
        return True

    def _seconds(self) -> float:
        return time.perf_counter() - self.began


def train(queries: int, marks: Sequence[int], bank_bytes: int = BANK_BYTES) -> tuple[dict[int, float], EncodingBank]:
    """Train by PPO with everything real but the VLM: environment, bank, rollouts, buffer, updates.

    Args:
        queries: plans to answer.
        marks: after how many of them memory is read.
        bank_bytes: of encodings to keep.

    Returns:
        The process's own memory in MB (2^20 bytes) by mark, and the bank.
    """
    source: Any = SimulatedQueries(queries)
    config = SimulatedConfig(budgets=(0.6, 1.0), data=source, width=8, epochs=1, total_queries=queries)
    model, venv = train_rl.build(config)
    bank = venv.core.bank
    bank.capacity_bytes = bank_bytes
    memory = Memory(marks)
    model.learn(queries, memory)
    return memory.own, bank


# Clients


def requests(count: int) -> Iterator[tuple[list[Image.Image], list[str], list[float]]]:
    """Batches of one to three questions, each with a budget of its own."""
    rows = make_dataset()
    images = [image.convert("RGB") for image in rows["image"]]
    for number in range(count):
        size = 1 + number % 3
        picked = [(number + each) % 12 for each in range(size)]
        budgets = [0.6 + 0.4 * ((7 * number + each) % 11) / 10 for each in range(size)]
        yield [images[row] for row in picked], [f"{rows['question'][row]} {number}" for row in picked], budgets


def serve(vlm: AdaptiveVLM, clients: int, count: int) -> tuple[int, float, float]:
    """Ask from several threads, then the same from one.

    Returns:
        How many replies differ, and questions a second from several threads and from one.
    """

    def ask(request: tuple[list[Image.Image], list[str], list[float]]) -> list[Any]:
        replies = vlm.generate(*request, max_new_tokens=3)
        return [(reply.text, reply.figures(), reply.plan.tokens.tolist()) for reply in replies]

    asked = list(requests(count))
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        together = list(pool.map(ask, asked))
    between = time.perf_counter()
    alone = [ask(request) for request in asked]
    ended = time.perf_counter()
    total = sum(map(len, alone))
    differ = sum(a != b for left, right in zip(together, alone, strict=True) for a, b in zip(left, right, strict=True))
    return differ, total / (between - began), total / (ended - between)


def untrained() -> AdaptiveVLM:
    """A small VLM of random weights with a controller of random weights."""
    backbone = build()
    controller = TwoLevelController(ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=8, rule="fill"))
    return AdaptiveVLM(controller, backbone, "untrained")


@dataclass
class Load:
    """What the project bears."""

    plans: int = 0
    """Plans over all families and kinds of head slots."""
    queries: int = 0
    """Plans answered in a simulated training."""
    clients: int = 0
    """Threads on one AdaptiveVLM, 400 requests in all, of one to three questions."""

    def run(self) -> bool:
        """Whether all was borne."""
        fine = True
        if self.plans:
            each = -(-self.plans // len(KINDS))
            for kind in KINDS:
                began = time.perf_counter()
                made, above, different = plan(kind, each)
                fine &= above == 0
                rate = made / (time.perf_counter() - began)
                print(f"plans: {kind}: {made:,}, {different:,} different, {above} above budget, {rate:,.0f} a second")
        if self.queries:
            train(self.queries, [mark for mark in MARKS if mark <= self.queries])
        if self.clients:
            differ, several, one = serve(untrained(), self.clients, REQUESTS)
            fine &= differ == 0
            print(
                f"clients: {self.clients} threads, {differ} replies differ; {several:,.0f} a second, alone {one:,.0f}"
            )
        return fine


if __name__ == "__main__":
    raise SystemExit(0 if tyro.cli(Load, description=__doc__).run() else 1)
