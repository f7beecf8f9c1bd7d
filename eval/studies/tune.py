"""``python -m maskgym.eval tune``: every baseline's options, chosen on validation queries."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from maskgym.backbones import Backbone, EncodingBank
from maskgym.envs import load_queries
from maskgym.envs.data.answer_length import say_cuts
from maskgym.eval import cli
from maskgym.eval.answering import Answering
from maskgym.eval.measure import report
from maskgym.eval.measure.evaluate import Record, check_budgets, outcomes_met
from maskgym.eval.policies import load_planners, split_variants
from maskgym.eval.pricing import Pricing
from maskgym.policies.wrappers.keep import check_share

GRID = Path(__file__).parent / "tuning-grid.txt"


@dataclass
class Tune(cli.Placement, Pricing, Answering):
    """Evaluate settings of baselines on validation queries, and name each baseline's best.

    A setting is a policy as eval run takes it; those whose names begin alike, up to the first : or @, are settings of
    one baseline. Best is the highest accuracy, averaged over the budgets and shares.

    Example: python -m maskgym.eval tune fastv:k=1 fastv:k=2 fastv:k=3 --data scenes --budgets 0.5 --json tuning.json
    """

    policies: tyro.conf.Positional[tuple[str, ...]] = ()
    """Settings; by default those of --grid."""
    grid: Path = GRID
    """A file with one setting a line; # begins a comment."""
    data: str = "easy-vqa"
    """Queries: a name, or a path with the columns image, question, answers."""
    split: str = "validation"
    """train, validation or test; not the one that policies are compared on."""
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the full plan's LLM FLOPs, in (0, 1]."""
    keep: tuple[float, ...] = ()
    """Shares of the visual tokens to keep in place of --budgets."""
    limit: int | None = None
    """Use so many queries, spread over the split."""
    backbone: str = "tiny"
    """Which VLM."""
    seed: int = 0
    """Of baselines that draw."""
    json: Path | None = None
    """Also write the records there."""

    def run(self) -> None:
        check_budgets(self.budgets)
        for share in self.keep:
            check_share(share)
        cli.check_output("--json", self.json)
        self.check_cut()
        self.check_price()
        policies = self.policies or read_grid(self.grid)
        backbone, queries = self.load(self.backbone), load_queries(self.data, self.split)
        bank = EncodingBank(backbone, queries.spread(self.limit))
        cut = self.max_new_tokens
        self.price(backbone, self.data, queries, policies, cut)
        say_cuts(backbone, [queries], cut)
        records, left_out = evaluate_settings(policies, backbone, bank, self.budgets, self.keep, self.seed, cut)
        if not any(records.values()):
            raise cli.InputError(next(iter(left_out.values())))
        best = best_settings(records)
        cli.write_json(self.json, [{"best": best, "records": records}])
        for policy, reason in left_out.items():
            print(f"{policy} is left out: {reason}")
        print(report.table([record for own in records.values() for record in own]))
        print(f"best: {shlex.join(['python', '-m', 'maskgym.eval', 'run', *best.values(), '--data', self.data])}")


def evaluate_settings(
    policies: Sequence[str],
    backbone: Backbone,
    bank: EncodingBank,
    budgets: Sequence[float],
    keep: Sequence[float] = (),
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> tuple[dict[str, list[Record]], dict[str, str]]:
    """Records by setting, and why settings have fewer than the others: this backbone, or a budget, does not allow
    them."""
    records: dict[str, list[Record]] = {}
    left_out: dict[str, str] = {}
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": False}
    for policy in tqdm(policies, desc="tuning", unit="setting"):
        records[policy] = []
        try:
            for planner in load_planners([policy], backbone, seed, keep=keep):
                found, gaps = outcomes_met(planner, backbone, bank, budgets, seed, **how)
                records[policy] += [outcome.record for outcome in found]
                left_out |= {f"{policy} at {budget:g}": reason for budget, reason in gaps.items()}
        except cli.InputError as error:
            left_out[policy] = str(error)
    return records, left_out


def read_grid(path: Path) -> list[str]:
    """The settings in a file.

    Raises:
        InputError: a missing file, or one without settings.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise cli.InputError(f"--grid {str(path)!r} cannot be read ({error}); name a text file") from error
    if not any(lines):
        raise cli.InputError(f"--grid {str(path)!r} has no settings; write one a line, such as fastv:k=2")
    return [line for line in lines if line]


def best_settings(records: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """By baseline, the setting with the highest mean accuracy among those that meet the most budgets."""
    most: dict[str, int] = {}
    for policy, own in records.items():
        most[baseline_of(policy)] = max(most.get(baseline_of(policy), 0), len(own))
    means = {
        policy: float(np.mean([record["accuracy"] for record in own]))
        for policy, own in records.items()
        if own and len(own) == most[baseline_of(policy)]
    }
    best: dict[str, str] = {}
    for policy in sorted(means, key=lambda policy: means[policy]):
        best[baseline_of(policy)] = policy
    return dict(sorted(best.items()))


def baseline_of(policy: str) -> str:
    """The baseline that a setting is of."""
    return split_variants(policy)[0].partition(":")[0]
