"""``python -m maskgym.eval audit``: does a policy's choice depend on image and question, and does that pay?

Shape legend: B queries, N visual tokens, A flat action length, Q queries of a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from maskgym.backbones import Backbone, EncodingBank
from maskgym.backbones.encodings.encoding import Encoding, Query
from maskgym.backbones.plans.masks import Masks
from maskgym.common.errors import InputError
from maskgym.envs import load_queries
from maskgym.envs.data.answer_length import say_cuts
from maskgym.envs.data.queries import DatasetQueries
from maskgym.eval import cli
from maskgym.eval.answering import Answering
from maskgym.eval.measure import report
from maskgym.eval.measure.evaluate import Record, check_budgets, evaluate, outcomes
from maskgym.eval.measure.failures import working
from maskgym.eval.measure.report import markdown
from maskgym.eval.policies import backbone_of, load_planner
from maskgym.eval.pricing import Pricing
from maskgym.eval.studies.elasticity import room_for_choice
from maskgym.policies.planner import Planner, PlannerWrapper
from maskgym.policies.planning.projection import project


@dataclass
class Audit(cli.Placement, Pricing, Answering):
    """Hold a policy against controls that take from it what it claims to use.

    Its plans are made from another query's image, from another question, and replaced by one plan of equal cost for
    all queries; each control answers the true queries. Where the data say which patches matter (scenes), the kept
    tokens are held against them. An oracle over random plans says what could be had.

    Example: python -m maskgym.eval audit runs/rl --data scenes --budgets 0.25 0.5 --static static:plan=runs/static.json
    """

    policy: tyro.conf.Positional[str]
    """A run folder, or any policy that follows budgets."""
    data: str = "scenes"
    """Queries: a name, or a path with the columns image, question, answers."""
    split: str = "test"
    """train, validation or test."""
    budgets: tuple[float, ...] = (0.25, 0.5)
    """Shares of the full plan's LLM FLOPs, in (0, 1]."""
    limit: int | None = None
    """Use so many queries, spread over the split."""
    static: str | None = None
    """Also the best plan that is the same for all, as python -m maskgym.eval search-static found it:
    static:plan=FILE."""
    plans: int = 64
    """Random plans of the oracle, on at most 1,000 queries; 0: no oracle."""
    backbone: str | None = None
    """Which VLM; by default the one that the run was trained on."""
    seed: int = 0
    """Of the shuffles and the oracle."""
    json: Path | None = None
    """Also write the records there."""

    def run(self) -> None:
        check_budgets(self.budgets)
        cli.check_output("--json", self.json)
        self.check_cut()
        self.check_price()
        if self.plans < 0:
            raise cli.InputError(f"--plans is {self.plans}; give a number of plans, or 0")
        backbone = self.load(*backbone_of([self.policy], self.backbone))
        queries = load_queries(self.data, self.split).spread(self.limit)
        self.price(backbone, self.data, queries, [self.policy], self.max_new_tokens)
        planner = load_planner(self.policy, backbone, self.seed)
        if not planner.budgeted:
            raise cli.InputError(f"policy {self.policy!r} does not follow budgets; name one that does")
        (bank, queries), cut = working(backbone, queries), self.max_new_tokens
        say_cuts(backbone, [queries], cut)
        records = audit(planner, backbone, bank, queries, self.budgets, self.seed, cut)
        if self.static is not None:
            static = load_planner(self.static, backbone, self.seed)
            records += evaluate(static, backbone, bank, self.budgets, max_new_tokens=cut)
        cli.write_json(self.json, records)
        print(report.table(records))
        for budget in self.budgets if self.plans else ():
            fewer = EncodingBank(backbone, queries.spread(1000))
            room = room_for_choice(backbone, fewer, budget, self.plans, self.seed, cut)
            said = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in room.items())
            print(f"\nof {self.plans} random plans at {budget:g}, on {len(fewer)} queries: {said}")
        if queries.patches is not None and backbone.layout.tokens == SIDE * SIDE:
            for budget in self.budgets:
                print(f"\nkept tokens against the patches that matter, at {budget:g}:")
                print(markdown(relevance_table(planner, backbone, bank, queries, budget)))


SIDE = 8
"""Cells a side of the grid on which data number their patches."""


def audit(
    planner: Planner,
    backbone: Backbone,
    bank: EncodingBank,
    queries: DatasetQueries,
    budgets: Sequence[float],
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> list[Record]:
    """Records of a planner and of its controls, at each budget.

    Args:
        planner: follows budgets.
        backbone: answers.
        bank: of the queries.
        queries: none of which fails.
        budgets: shares of the full plan's LLM FLOPs.
        seed: of the shuffles.
        max_new_tokens: as in ``outcomes``.
    """
    records = []
    swaps = swapped(queries, backbone, seed)
    for budget in budgets:
        (own,) = outcomes(planner, backbone, bank, (budget,), max_new_tokens=max_new_tokens)
        controls: list[Planner] = [
            Misled(planner, EncodingBank(backbone, swaps[0]), queries, "shuffled image"),
            Misled(planner, EncodingBank(backbone, swaps[1]), queries, "shuffled question"),
            constant_planner(planner, backbone, bank, budget, float(own.columns["llm_flops_ratio"].mean())),
        ]
        records.append(own.record)
        for control in controls:
            records += evaluate(control, backbone, bank, (budget,), max_new_tokens=max_new_tokens)
    return records


class Swapped:
    """Queries with the image, or the question, of another.

    Args:
        queries: Q queries.
        images: (Q,) whose image each shows.
        questions: (Q,) whose question each asks.
    """

    def __init__(self, queries: DatasetQueries, images: np.ndarray, questions: np.ndarray):
        self.queries, self.images, self.questions = queries, images, questions

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, number: int) -> Query:
        id, question, answers = self.text(number)
        image = self.queries[int(self.images[number])].image
        return Query(id, image, question, answers, self.image_key(number))

    def text(self, number: int) -> tuple[str, str, tuple[str, ...]]:
        id, _, answers = self.queries.text(number)
        return id, self.queries.text(int(self.questions[number]))[1], answers

    def image_key(self, number: int) -> object:
        return self.queries.image_key(int(self.images[number]))


def swapped(queries: DatasetQueries, backbone: Backbone, seed: int) -> tuple[Swapped, Swapped]:
    """The queries with other images, and with others' questions of as many tokens, so that plans cost the same.

    Raises:
        InputError: a single image, which leaves no other to show.
    """
    rng = np.random.default_rng(seed)
    everyone = np.arange(len(queries))
    lengths = np.array([len(backbone.prompt_ids(queries.text(row)[1])[1]) for row in range(len(queries))])
    questions = everyone.copy()
    for length in np.unique(lengths):
        group = rng.permutation(everyone[lengths == length])
        questions[group] = np.roll(group, len(group) // 2)
    groups = queries.by_image()
    if len(groups) == 1:
        raise InputError(
            f"data {queries.name!r} has a single image here, and the audit shows the policy another; "
            "name data of two or more, or allow them by --limit"
        )
    order = rng.permutation(len(groups))
    images = everyone.copy()
    for own, other in zip(order, np.roll(order, 1), strict=True):
        images[groups[own]] = groups[other][0]
    return Swapped(queries, images, everyone), Swapped(queries, everyone, questions)


class Misled(PlannerWrapper):
    """A planner that is shown something else than what is answered.

    Args:
        planner: plans for what it sees.
        seen: a bank of what it sees, numbered as the queries.
        queries: that are answered.
        name: in records.
    """

    def __init__(self, planner: Planner, seen: EncodingBank, queries: DatasetQueries, name: str):
        super().__init__(planner)
        self.seen, self.name, self.budgeted = seen, name, True
        self.number = {queries.text(number)[0]: number for number in range(len(queries))}

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        return self.planner.plan(self.seen.gather([self.number[id] for id in encoding.ids]), budgets_B)


class ConstantPlanner(Planner):
    """One plan for all queries: what a planner keeps most often, as much as it spends.

    Args:
        backbone: prices.
        frequency_A: how often each unit was kept.
        share: of the LLM FLOPs to spend.
    """

    name = "constant plan"

    def __init__(self, backbone: Backbone, frequency_A: Tensor, share: float):
        self.backbone, self.frequency_A, self.share = backbone, frequency_A, share

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        shares_B = torch.full_like(budgets_B, self.share).double().minimum(budgets_B.double())
        confidence_BA = self.frequency_A.expand(len(encoding), -1)
        return project(self.backbone, self.backbone.full(encoding), confidence_BA, shares_B, encoding)


def constant_planner(
    planner: Planner, backbone: Backbone, bank: EncodingBank, budget: float, share: float, limit: int = 2000
) -> ConstantPlanner:
    """From what a planner keeps of the first ``limit`` queries at a budget."""
    kept = []
    for start in range(0, min(limit, len(bank)), BATCH):
        encoding = bank.gather(range(start, min(start + BATCH, limit, len(bank))))
        kept.append(backbone.layout.flatten(_executed(planner, backbone, encoding, budget)).double())
    return ConstantPlanner(backbone, torch.cat(kept).mean(0), share)


BATCH = 250


def _executed(planner: Planner, backbone: Backbone, encoding: Encoding, budget: float) -> Masks:
    """A planner's plans as they are executed."""
    budgets_B = torch.full((len(encoding),), budget, dtype=torch.float64, device=backbone.device)
    masks = planner.plan(encoding, budgets_B)
    return masks if masks.midway is None else backbone.answer(encoding, masks).masks


def relevance_table(
    planner: Planner, backbone: Backbone, bank: EncodingBank, queries: DatasetQueries, budget: float
) -> list[tuple[str, ...]]:
    """By kind of question: how many of the kept tokens lie on patches that matter (precision), how many of these are
    kept (recall), and what a random choice of as many tokens would have.

    Raises:
        InputError: data that do not say which patches matter.
    """
    if queries.patches is None:
        raise InputError(f"data {queries.name!r} do not say which patches matter (a column `patches`)")
    relevant_QN = np.zeros((len(queries), SIDE * SIDE), bool)
    for row, cells in enumerate(queries.patches):
        relevant_QN[row, list(cells)] = True
    kept_QN = np.concatenate(
        [
            _executed(planner, backbone, bank.gather(range(start, min(start + BATCH, len(bank)))), budget)
            .tokens.cpu()
            .numpy()
            for start in range(0, len(bank), BATCH)
        ]
    )
    kinds = np.array(queries.kinds if queries.kinds is not None else ["all"] * len(queries))
    rows: list[tuple[str, ...]] = [("questions", "precision %", "by chance %", "recall %", "by chance %", "n")]
    for kind in ("all", *sorted(set(kinds.tolist()) - {"all"})):
        some = (kinds == kind) | (kind == "all")
        some &= relevant_QN.any(1) & kept_QN.any(1)
        if not some.any():
            continue
        kept, relevant = kept_QN[some], relevant_QN[some]
        both = (kept & relevant).sum(1)
        precision, recall = both / kept.sum(1), both / relevant.sum(1)
        figures = (precision.mean(), relevant.mean(), recall.mean(), kept.mean())
        rows.append((kind, *(f"{100 * figure:.1f}" for figure in figures), str(int(some.sum()))))
    return rows
