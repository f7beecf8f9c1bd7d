"""A planner over queries and budgets, as records.

Shape legend: B queries of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskgym.backbones.answers import Limit
from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding, EncodingBank
from maskgym.backbones.plans.masks import Masks
from maskgym.common.errors import InputError, as_python
from maskgym.envs.data.answer_length import answer_cut
from maskgym.envs.data.queries import DatasetQueries
from maskgym.envs.data.scoring import score, token_f1
from maskgym.eval.measure.failures import report_failed
from maskgym.policies.planner import Planner, adopted
from maskgym.policies.planning.projection import budget_flops
from maskgym.policies.wrappers.milliseconds import MillisecondPlanner

Record = dict[str, Any]
Columns = dict[str, np.ndarray]
Scores = Mapping[str, Callable[[str, Sequence[str]], float]]


def check_budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    """The budgets, if each is in (0, 1]; numbers of NumPy's and torch's are taken, too.

    Raises:
        InputError: none given, one that is no number, or one outside.
    """
    budgets = [as_python(each) for each in budgets]
    if not budgets:
        raise InputError("no budget given; give shares of the full plan's FLOPs in (0, 1], such as 0.5")
    for budget in budgets:
        if not isinstance(budget, Real | Decimal) or isinstance(budget, bool):
            raise InputError(f"budget {budget!r} is no number; a budget is a share of the full plan's LLM FLOPs")
        if not 0 < budget <= 1:
            raise InputError(f"budget {budget:g} is outside (0, 1]; a budget is a share of the full plan's LLM FLOPs")
    return tuple(float(budget) for budget in budgets)


def evaluate(
    planner: Planner, backbone: Backbone, bank: EncodingBank, budgets: Sequence[float], seed: int = 0, **options: Any
) -> list[Record]:
    """The records of ``outcomes``."""
    return [outcome.record for outcome in outcomes(planner, backbone, bank, budgets, seed, **options)]


def outcomes_met(
    planner: Planner, backbone: Backbone, bank: EncodingBank, budgets: Sequence[float], seed: int = 0, **options: Any
) -> tuple[list[Outcome], dict[float, str]]:
    """``outcomes`` at the budgets that the planner can meet, and by other budget why it cannot."""
    found, gaps = [], {}
    for budget in check_budgets(budgets) if planner.budgeted else (1.0,):
        try:
            found += outcomes(planner, backbone, bank, (budget,), seed, **options)
        except InputError as error:
            gaps[budget] = str(error)
    return found, gaps


@dataclass(frozen=True)
class Outcome:
    """What a planner did at one budget.

    Attributes:
        record: means over the queries.
        columns: by name, (queries,) what it did for each.
    """

    record: Record
    columns: Columns


def outcomes(
    planner: Planner,
    backbone: Backbone,
    bank: EncodingBank,
    budgets: Sequence[float],
    seed: int = 0,
    batch_size: int = 256,
    max_new_tokens: int | None = None,
    progress: bool = True,
    strict: bool = False,
    hard: bool = False,
) -> list[Outcome]:
    """One outcome per budget, over all queries of the bank but those that fail; these are reported and counted.

    A benchmark's official scores are in the record's ``parts``, by part of the data set and metric. Where answers may
    have several tokens, the record says where they were cut; how many they had (``answer_tokens``), and how many, with
    the one that ends it, plans were priced at (``expected_tokens``); the share of the full plan's LLM FLOPs, so priced,
    that was spent with all tokens that were generated (``spent_llm_flops_ratio``); the shares of answers that were
    longer than priced (``longer_than_priced``), that spent more than their budget (``overspent``), and that were
    ``cut`` before; and, unless a rule scores them, their mean ``f1``
    (``maskgym.envs.data.scoring.token_f1``).

    Args:
        planner: chooses the plans; its notes go into its records. The record of a ``MillisecondPlanner`` also has the
            mean time predicted, and as budget the mean share that it chose. Tokens kept are the mean over layers.
        backbone: answers under them.
        bank: the queries.
        budgets: shares in (0, 1]; a planner without budgets is evaluated once, at 1.
        seed: named in the records.
        batch_size: queries a call.
        max_new_tokens: answers are cut there; by default as ``maskgym.envs.data.answer_length.cut_of`` has it.
        progress: whether to show a progress bar.
        strict: whether a query that fails is an error.
        hard: whether an answer is cut where its budget has no room for another token. A planner without budgets has no
            such limit, and one with budgets in milliseconds none in FLOPs.

    Raises:
        InputError: a budget outside (0, 1], no query that does not fail, or, if strict, one that does.
    """
    planner = adopted(planner)
    budgets = check_budgets(budgets) if planner.budgeted else (1.0,)
    source = bank.source
    assert isinstance(source, DatasetQueries)
    cut = answer_cut(backbone, source, max_new_tokens)
    scores = {"accuracy": score} | ({"f1": token_f1} if cut > 1 and source.rules == (None,) else {})
    batches = [range(start, min(start + batch_size, len(bank))) for start in range(0, len(bank), batch_size)]
    measured: list[list[Columns]] = [[] for _ in budgets]
    said: list[list[str]] = [[] for _ in budgets]
    answered: list[int] = []
    reported = len(bank.failed)
    with tqdm(total=len(bank) * len(budgets), desc=planner.name, unit="query", disable=not progress) as bar:
        for numbers in batches:
            encoding, valid, failed = bank.gather_valid(numbers)
            if strict and failed:
                raise InputError(next(iter(failed.values())))
            answered += valid
            for parts, texts, budget in zip(measured, said, budgets, strict=True):
                if encoding is not None:
                    columns, own = _measure(planner, backbone, encoding, budget, cut, scores, hard)
                    parts.append(columns)
                    texts += own
                bar.update(len(numbers))
    report_failed(bank, reported)
    head: Record = {"policy": planner.name, "backbone": backbone.name, "data": source.name, "split": source.split}
    head |= {"seed": seed, "failed": len(bank.failed)}
    head |= dict(planner.notes) | ({"max_new_tokens": cut} if cut > 1 else {})
    found = []
    for budget, parts, texts in zip(budgets, measured, said, strict=True):
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        record = {**head, "budget": budget, **_summarise(columns)}
        metrics = source.metrics(answered, texts, columns["accuracy"])
        found.append(Outcome(record if metrics is None else {**record, "parts": metrics}, columns))
    return found


def _measure(
    planner: Planner,
    backbone: Backbone,
    encoding: Encoding,
    budget: float,
    max_new_tokens: int,
    scores: Scores,
    hard: bool,
) -> tuple[Columns, list[str]]:
    """What records summarise, each (B,), and the answers."""
    budgets_B = torch.full((len(encoding),), budget, dtype=torch.float64, device=backbone.device)
    masks, columns = _plan(planner, encoding, budgets_B)
    controller = planner.controller_flops(encoding)
    full = backbone.cost(encoding, backbone.full(encoding))
    limits_B = budget_flops(budgets_B, full.llm)
    limit = Limit(limits_B, controller) if hard and _in_flops(planner) else None
    answers = backbone.answer(encoding, masks, max_new_tokens, limit=limit)
    masks = answers.masks
    cost = backbone.cost(encoding, masks, controller)
    pairs = list(zip(answers.texts, encoding.answers, strict=True))
    columns = {
        **{name: torch.tensor([each(text, accepted) for text, accepted in pairs]) for name, each in scores.items()},
        "llm_flops_ratio": cost.llm / full.llm,
        "total_flops_ratio": cost.total / full.total,
        "violations": cost.llm > limits_B,
        "kept_tokens": backbone.visual_counts(masks).double().mean(1),
        "kept_heads": masks.effective_heads.sum((1, 2)),
        "kept_layers": masks.layers.sum(1),
        **columns,
    }
    if max_new_tokens > 1:
        columns["answer_tokens"] = torch.tensor([len(ids) for ids in answers.tokens], device=backbone.device)
        spent_B, expected_B = answers.spent_tokens, torch.as_tensor(encoding.expected_tokens, device=backbone.device)
        spent = backbone.cost(encoding, masks, controller, spent_B)
        columns["expected_tokens"] = expected_B.expand(len(encoding))
        columns["spent_llm_flops_ratio"] = spent.llm / full.llm
        columns["longer_than_priced"] = spent_B > expected_B
        if _in_flops(planner):
            columns["overspent"] = spent.llm > limits_B
        if limit is not None:
            columns["cut"] = torch.tensor(answers.cut)
    return {name: column.double().cpu().numpy() for name, column in columns.items()}, answers.texts


def _in_flops(planner: Planner) -> bool:
    """Whether a planner's budgets are shares of FLOPs, and it has budgets at all."""
    return planner.budgeted and not isinstance(planner, MillisecondPlanner)


def _plan(planner: Planner, encoding: Encoding, budgets_B: Tensor) -> tuple[Masks, dict[str, Tensor]]:
    """The plans; with budgets in milliseconds also what they say of themselves, each (B,)."""
    if not isinstance(planner, MillisecondPlanner):
        return planner.plan(encoding, budgets_B), {}
    masks, shares_B = planner.choose(encoding, budgets_B)
    predicted_B = planner.predict(encoding, masks)
    return masks, {"budget": shares_B, "predicted_ms": predicted_B, "violations": predicted_B > planner.milliseconds}


def _summarise(columns: Columns) -> Record:
    accuracy, violations = columns["accuracy"], columns["violations"]
    error = accuracy.std(ddof=1) / math.sqrt(len(accuracy)) if len(accuracy) > 1 else 0.0
    return {
        "n": len(accuracy),
        "accuracy_stderr": float(error),
        "budget_violations": int(violations.sum()),
        **{name: float(column.mean()) for name, column in columns.items() if name != "violations"},
    }
