"""A planner over queries and budgets, as records.

Shape legend: B queries of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from backbones.backbone import Backbone
from backbones.encoding import EncodingBank
from backbones.errors import InputError
from envs.queries import DatasetQueries
from envs.scoring import score
from eval.failures import report_failed
from policies.baselines import Planner
from policies.projection import budget_flops

Record = dict[str, Any]


def check_budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    """The budgets, if each is in (0, 1].

    Raises:
        InputError: none given, or one outside.
    """
    if not budgets:
        raise InputError("no budget given; give shares of the full plan's FLOPs in (0, 1], such as 0.5")
    for budget in budgets:
        if not 0 < budget <= 1:
            raise InputError(f"budget {budget:g} is outside (0, 1]; a budget is a share of the full plan's LLM FLOPs")
    return tuple(float(budget) for budget in budgets)


def evaluate(
    planner: Planner,
    backbone: Backbone,
    bank: EncodingBank,
    budgets: Sequence[float],
    seed: int = 0,
    batch_size: int = 256,
    max_new_tokens: int = 1,
    progress: bool = True,
) -> list[Record]:
    """One record per budget, over all queries of the bank but those that fail; these are reported and counted.

    Args:
        planner: chooses the plans.
        backbone: answers under them.
        bank: the queries.
        budgets: shares in (0, 1]; a planner without budgets is evaluated once, at 1.
        seed: named in the records.
        batch_size: queries a call.
        max_new_tokens: answers are cut there.
        progress: whether to show a progress bar.

    Raises:
        InputError: a budget outside (0, 1], or no query that does not fail.
    """
    budgets = check_budgets(budgets) if planner.budgeted else (1.0,)
    batches = [range(start, min(start + batch_size, len(bank))) for start in range(0, len(bank), batch_size)]
    columns: list[list[np.ndarray]] = [[] for _ in budgets]
    reported = len(bank.failed)
    with tqdm(total=len(bank) * len(budgets), desc=planner.name, unit="query", disable=not progress) as bar:
        for numbers in batches:
            encoding, _, _ = bank.gather_valid(numbers)
            for column, budget in zip(columns, budgets, strict=True):
                if encoding is not None:
                    column.append(_measure(planner, backbone, encoding, budget, max_new_tokens))
                bar.update(len(numbers))
    report_failed(bank, reported)
    source = bank.source
    assert isinstance(source, DatasetQueries)
    head: Record = {"policy": planner.name, "backbone": backbone.name, "data": source.name, "split": source.split}
    head |= {"seed": seed, "failed": len(bank.failed)}
    return [
        {**head, "budget": budget, **_summarise(np.concatenate(column, axis=1))}
        for budget, column in zip(budgets, columns, strict=True)
    ]


FIELDS = ("accuracy", "llm_flops_ratio", "total_flops_ratio", "violations", "kept_tokens", "kept_heads", "kept_layers")


def _measure(planner: Planner, backbone: Backbone, encoding: Any, budget: float, max_new_tokens: int) -> np.ndarray:
    """(fields, B) of ``FIELDS``."""
    budgets_B = torch.full((len(encoding),), budget, dtype=torch.float64)
    masks = planner.plan(encoding, budgets_B)
    answers = backbone.answer(encoding, masks, max_new_tokens)
    masks = backbone.restrict(encoding, masks)
    cost = backbone.cost(encoding, masks, planner.controller_flops(encoding))
    full = backbone.cost(encoding, backbone.full(encoding))
    accuracy = [score(text, accepted) for text, accepted in zip(answers.texts, encoding.answers, strict=True)]
    columns = [
        torch.tensor(accuracy),
        cost.llm / full.llm,
        cost.total / full.total,
        cost.llm > budget_flops(budgets_B, full.llm),
        masks.tokens.sum(1),
        masks.effective_heads.sum((1, 2)),
        masks.layers.sum(1),
    ]
    return np.stack([column.double().numpy() for column in columns])


def _summarise(values: np.ndarray) -> Record:
    means = dict(zip(FIELDS, values.mean(axis=1).tolist(), strict=True))
    count = values.shape[1]
    violations = int(values[FIELDS.index("violations")].sum())
    error = values[0].std(ddof=1) / math.sqrt(count) if count > 1 else 0.0
    del means["violations"]
    return {
        "n": count,
        "accuracy": means.pop("accuracy"),
        "accuracy_stderr": float(error),
        "budget_violations": violations,
        **means,
    }
