"""``python -m eval``: evaluate policies, measure speed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from backbones import EncodingBank, load_backbone
from envs import load_queries
from eval import cli, report
from eval.bench import bench, bench_table
from eval.evaluate import check_budgets, evaluate
from eval.policies import backbone_of, load_planner
from eval.runs import write_atomically


@dataclass
class Run:
    """Evaluate policies over queries and budgets; prints a table.

    Example: python -m eval run runs/rl full random --data easy-vqa --budgets 0.25 0.5
    """

    policies: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, or baselines: full, random."""
    data: str = "easy-vqa"
    """Queries: a name, or a path with the columns image, question, answers."""
    split: str = "test"
    """train, validation or test."""
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Shares of the full plan's LLM FLOPs, in (0, 1]."""
    limit: int | None = None
    """Use the first so many queries only."""
    backbone: str | None = None
    """Which VLM; by default the one that the runs were trained on."""
    seed: int = 0
    """Of baselines that draw."""
    json: Path | None = None
    """Also write the records there."""
    plot: Path | None = None
    """Also draw accuracy over FLOPs there (PNG)."""

    def run(self) -> None:
        if not self.policies:
            raise cli.InputError("no policy given; name run folders or baselines, e.g. python -m eval run full")
        check_budgets(self.budgets)
        backbone = load_backbone(backbone_of(list(self.policies), self.backbone))
        planners = [load_planner(policy, backbone, self.seed) for policy in self.policies]
        bank = EncodingBank(backbone, load_queries(self.data, self.split, self.limit))
        records = [
            record for planner in planners for record in evaluate(planner, backbone, bank, self.budgets, self.seed)
        ]
        print(report.table(records))
        write_json(self.json, records)
        if self.plot is not None:
            report.plot_tradeoff(records, self.plot)


@dataclass
class Bench:
    """Measure every speed claim, as ratios within one run."""

    backbone: str = "tiny"
    """Which VLM."""
    data: str = "easy-vqa"
    """Queries to measure on."""
    parts: tuple[Literal["env", "engine"], ...] = ("env", "engine")
    """What to measure: the environment around the backbone, the masked decoder on a LLaVA-1.5-like shape."""
    json: Path | None = None
    """Also write the figures there."""

    def run(self) -> None:
        entries = bench(self.backbone, self.data, self.parts)
        print(bench_table(entries))
        write_json(self.json, entries)


def write_json(path: Path | None, rows: list[dict[str, object]]) -> None:
    if path is None:
        return
    if not path.parent.is_dir():
        raise cli.InputError(f"--json {str(path)!r}: the folder {str(path.parent)!r} does not exist")
    write_atomically(path, (json.dumps(rows, indent=2) + "\n").encode())


Command = Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Bench, tyro.conf.subcommand("bench")]


def main() -> None:
    tyro.cli(Command, prog="python -m eval", description=__doc__).run()


if __name__ == "__main__":
    cli.run(main)
