"""How gradually a backbone loses accuracy when parts are dropped, and how much a good choice of parts could win.

Shape legend: B queries of a batch, M plans, A flat action length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding, EncodingBank
from maskgym.backbones.plans.masks import AXES, Masks
from maskgym.common.errors import InputError
from maskgym.envs.data.answer_length import answer_cut
from maskgym.envs.data.queries import DatasetQueries
from maskgym.envs.data.scoring import score
from maskgym.eval.measure.evaluate import evaluate
from maskgym.eval.measure.report import markdown
from maskgym.policies.baselines import FullPlanner, RandomPlanner, random_waits
from maskgym.policies.planning.projection import project

Record = dict[str, Any]
BATCH = 250


def accuracy_by_kind(
    backbone: Backbone, bank: EncodingBank, queries: DatasetQueries, max_new_tokens: int | None = None
) -> dict[str, tuple[float, int]]:
    """Full-plan accuracy and number of queries over all, and of each kind of question where the data names kinds."""
    cut = answer_cut(backbone, bank.source, max_new_tokens)
    scores = np.concatenate(
        [_scores(backbone, encoding, backbone.full(encoding), cut) for encoding in _batches(bank, "full plan")]
    )
    return by_kind(scores, queries)


def by_kind(scores: np.ndarray, queries: DatasetQueries) -> dict[str, tuple[float, int]]:
    """Mean score and number of queries over all, and of each kind of question where the data names kinds.

    Args:
        scores: (queries,) one each.
        queries: what was asked.
    """
    table = {"all": (float(scores.mean()), len(scores))}
    for kind in sorted(set(queries.kinds or ())):
        own = scores[[each == kind for each in queries.kinds or ()]]
        table[kind] = (float(own.mean()), len(own))
    return table


def accuracy_by_axis(
    backbone: Backbone,
    bank: EncodingBank,
    shares: Sequence[float] = (0.75, 0.5, 0.25),
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> list[Record]:
    """Records of the full plan, and of random plans that drop tokens, heads, layers, or all three; a share that one
    axis alone cannot reach has no record."""
    records = evaluate(FullPlanner(backbone), backbone, bank, (1.0,), max_new_tokens=max_new_tokens)
    for axes in (*((axis,) for axis in AXES), AXES):
        for share in shares:
            try:
                planner = RandomPlanner(backbone, seed, axes)
                records += evaluate(planner, backbone, bank, (share,), seed, max_new_tokens=max_new_tokens)
            except InputError:
                continue
    return records


def room_for_choice(
    backbone: Backbone,
    bank: EncodingBank,
    share: float = 0.5,
    plans: int = 64,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> dict[str, float]:
    """Accuracy at one share of the FLOPs if plans are drawn, if all queries share the best, and if each gets its best.

    The same M random orders of dropping are applied to every query, cut where its budget is reached.

    Returns:
        ``random``: mean over all plans and queries; ``static``: of the plan that is best on one half of the queries,
        on the other half (both ways, averaged; a single query has no halves, and leaves it out); ``oracle``: whether
        any of the M plans answers right.
    """
    generator = torch.Generator().manual_seed(seed)
    waits_MA = random_waits(backbone, plans, generator)
    cut = answer_cut(backbone, bank.source, max_new_tokens)
    columns = []
    for encoding in _batches(bank, f"{plans} plans"):
        full = backbone.full(encoding)
        budgets_B = torch.full((len(encoding),), share, dtype=torch.float64, device=backbone.device)
        rows = []
        for waits_A in waits_MA.to(backbone.device):
            masks = project(backbone, full, waits_A.expand(len(encoding), -1), budgets_B, encoding)
            rows.append(_scores(backbone, encoding, masks, cut))
        columns.append(np.stack(rows))
    right = np.concatenate(columns, axis=1)
    room = {"random": float(right.mean())}
    if len(bank) > 1:
        halves = right[:, ::2], right[:, 1::2]
        static = [held_out[chosen_on.mean(1).argmax()].mean() for chosen_on, held_out in (halves, halves[::-1])]
        room["static"] = float(np.mean(static))
    return {**room, "oracle": float(right.max(axis=0).mean())}


def _batches(bank: EncodingBank, name: str) -> Iterator[Encoding]:
    for start in tqdm(range(0, len(bank), BATCH), desc=name, unit="batch"):
        yield bank.gather(range(start, min(start + BATCH, len(bank))))


def _scores(backbone: Backbone, encoding: Encoding, masks: Masks, cut: int) -> np.ndarray:
    """(B,) accuracy of the answers under some plans, cut at so many tokens."""
    answers = backbone.answer(encoding, masks, cut)
    return np.array([score(text, accepted) for text, accepted in zip(answers.texts, encoding.answers, strict=True)])


def kinds_table(kinds: dict[str, tuple[float, int]]) -> str:
    """Accuracy by kind of question as Markdown."""
    return markdown(
        [("questions", "accuracy %", "n"), *((kind, f"{100 * a:.1f}", str(n)) for kind, (a, n) in kinds.items())]
    )


def axes_table(records: Sequence[Record]) -> str:
    """Random plans as Markdown: a row for what is dropped, a column for each share of the FLOPs."""
    full, dropped = records[0], records[1:]
    shares = sorted({record["budget"] for record in dropped}, reverse=True)
    cells = {(record["policy"], record["budget"]): f"{100 * record['accuracy']:.1f}" for record in dropped}
    rows = [("dropped", "100 %", *(f"{share:.0%}".replace("%", " %") for share in shares))]
    for policy in dict.fromkeys(record["policy"] for record in dropped):
        what = policy.removeprefix("random-").replace("random", "all three")
        rows.append((what, f"{100 * full['accuracy']:.1f}", *(cells.get((policy, share), "–") for share in shares)))
    return markdown(rows)
