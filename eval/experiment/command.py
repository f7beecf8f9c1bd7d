"""``python -m maskgym.eval experiment``: train what is missing, evaluate it, and write the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from maskgym.backbones import Backbone, EncodingBank
from maskgym.common.atomic import temporary, write_json, write_text
from maskgym.common.plain_files import MALFORMED, read_json
from maskgym.common.run_folder import check_place, environment, make_folder
from maskgym.envs import load_queries
from maskgym.envs.data.answer_length import say_cuts
from maskgym.envs.data.queries import DatasetQueries
from maskgym.eval import cli
from maskgym.eval.answering import Answering
from maskgym.eval.experiment.arms import EXPERIMENTS, TUNED, Arm, Prepared, settings_of
from maskgym.eval.experiment.cells import Cell, attempt, lay_out, measure, measure_times, train
from maskgym.eval.experiment.jobs import side_by_side
from maskgym.eval.experiment.report import Report
from maskgym.eval.measure.evaluate import check_budgets
from maskgym.eval.pricing import Pricing
from maskgym.eval.studies.search_static import search
from maskgym.eval.studies.tune import GRID, best_settings, evaluate_settings, read_grid
from maskgym.policies.static.search import SearchSettings

HEAD = "experiment.json"
SEARCH_QUERIES = 512
"""On which the static plan is searched for, at most."""


@dataclass
class Experiment(cli.Placement, Pricing, Answering):
    """Run one of the three experiments: train what is missing, evaluate it, write records, tables, plots, report.html.

    What is there is not done again, so an experiment that was stopped goes on where it was. A cell that fails is marked
    in the report and tried again by the next call; the others go on. Experiments of one --out share their trainings.

    Example: python -m maskgym.eval experiment training --data scenes --seeds 0 1 2 --out results/scenes
    """

    name: tyro.conf.Positional[Literal["pruning", "dimensions", "training"]]
    """pruning: learned against static token pruning; dimensions: one, two, three; training: RL against relaxation."""
    out: Path
    """Folder of trainings and what was measured of them, and of a folder with the report for each experiment."""
    backbone: str = "tiny"
    """Which VLM."""
    data: str = "scenes"
    """Queries: a name, or a path with the columns image, question, answers."""
    arms: tuple[str, ...] = ()
    """Train and evaluate only these rows of the tables, for now; all by default. The report shows what there is."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One training an arm for each. More can be added later."""
    budgets: tuple[float, ...] = (0.2, 0.25, 0.35, 0.5, 0.75, 1.0)
    """Shares of the full plan's LLM FLOPs, in (0, 1]."""
    total_queries: int = 40_000
    """Drawn in each training; RL answers each under four plans, a relaxation once, forward and back."""
    test_queries: int | None = None
    """Use so many of the test split, spread over it; all by default."""
    tuning_queries: int = 1000
    """Validation queries on which baselines' options are chosen, and, up to 512, the static plan is searched for."""
    timing: int = 0
    """Also time so many queries one by one with the first seed, also where all else is done; needs a quiet machine."""
    jobs: int = 1
    """Cells that are worked on at a time, each with its share of the cores; a small VLM gains from as many as cores."""
    quick: bool = False
    """A smaller form to look at: one seed, 5,000 queries a training, 500 test queries, 100 for tuning."""
    wandb: str | None = None
    """Also track trainings in this Weights & Biases project, and the report as a run of the same group."""

    def __post_init__(self) -> None:
        if self.quick:
            self.seeds, self.total_queries = self.seeds[:1], min(self.total_queries, 5000)
            self.test_queries, self.tuning_queries = min(self.test_queries or 500, 500), min(self.tuning_queries, 100)

    def run(self) -> None:
        head = self._check()
        queries = self._queries()
        backbone = self._priced(queries)
        self._chosen(EXPERIMENTS[self.name](Prepared({}, Path())))
        self._begin(head)
        say_cuts(backbone, [queries], self.max_new_tokens)
        tuned = self._tune(backbone)
        arms = EXPERIMENTS[self.name](Prepared(tuned, self._search(backbone)))
        cells = lay_out(self.out, arms, self.seeds)
        chosen = self._chosen(arms)
        missing = [cell for cell in cells if cell.arm.name in chosen and (not cell.done or self._to_time(cell))]
        with tqdm(total=len(cells), initial=len(cells) - len(missing), desc=self.name, unit="cell") as bar:
            for cell in self._each(missing, cells, backbone, queries):
                bar.set_postfix_str(f"{cell.arm.name}, seed {cell.seed}")
                bar.update()
        place, cut = self.out / self.name, self.max_new_tokens
        report = Report(self.name, place, cells, self.seeds, self.budgets, backbone, queries, cut)
        report.write()
        report.track(self.wandb, self.out.name)
        print(report.text())
        print(f"report: {self.out / self.name / 'report.html'}")

    def _check(self) -> dict[str, Any]:
        """What the experiment is begun with.

        Raises:
            InputError: options that cannot work, or a folder of something else.
        """
        check_budgets(self.budgets)
        self.check_cut()
        self.check_price()
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise cli.InputError(f"--seeds {' '.join(map(str, self.seeds))}: give one or more, each once")
        if len(self.budgets) < 2 or len(set(self.budgets)) != len(self.budgets):
            raise cli.InputError("--budgets: give two or more, each once")
        self.budgets = tuple(sorted(self.budgets))
        if self.timing and self.jobs > 1:
            raise cli.InputError(f"--timing needs the machine for itself: leave out --jobs {self.jobs}")
        if self.timing < 0:
            raise cli.InputError(f"--timing is {self.timing}; give a number of queries, such as 20, or 0")
        for option in ("total_queries", "tuning_queries", "jobs", "test_queries"):
            if getattr(self, option) is not None and getattr(self, option) < 1:
                raise cli.InputError(f"--{option.replace('_', '-')} is {getattr(self, option)}; it must be at least 1")
        self.settle_dtype(self.backbone)
        own = ["backbone", "data", "budgets", "total_queries", "test_queries", "tuning_queries", "dtype"]
        own += ["max_new_tokens", "answer_tokens"]
        head = json.loads(json.dumps({option: getattr(self, option) for option in own}))
        head["maskgym"] = environment()["maskgym"]
        file = self.out / HEAD
        check_place(self.out)
        if self.out.exists() and not self.out.is_dir():
            raise cli.InputError(f"--out {str(self.out)!r} is a file; name a folder")
        if self.out.exists() and any(path != temporary(file) for path in self.out.iterdir()) and not file.is_file():
            raise cli.InputError(f"--out {str(self.out)!r} holds something that is no experiment; choose another")
        if file.is_file():
            begun = read_head(file)
            if "answer_tokens" not in begun:  # of a version that priced all plans at one token
                begun["answer_tokens"] = 1
                self.answer_tokens = head["answer_tokens"] = self.answer_tokens or 1
            changed = [option for option in head if begun.get(option) != head[option]]
            if changed:
                raise cli.InputError(
                    f"--out {str(self.out)!r} was begun with {changed[0]} {begun.get(changed[0])!r}, now "
                    f"{head[changed[0]]!r}; go on with the same, or choose another folder"
                )
        return head

    def _begin(self, head: dict[str, Any]) -> None:
        make_folder(self.out)
        write_json(self.out / HEAD, head)

    def _search(self, backbone: Backbone) -> Path:
        """The file of the static plan, searched for if it is not there."""
        file = self.out / "static.json"
        if not file.is_file():
            found = search(
                backbone, self.data, "validation", min(self.tuning_queries, SEARCH_QUERIES), SearchSettings()
            )
            write_text(file, found.json())
        return file

    def _chosen(self, arms: Sequence[Arm]) -> set[str]:
        """The arms to work on, with those whose trainings they use."""
        names = {arm.name: arm for arm in arms}
        for name in self.arms:
            if name not in names:
                raise cli.InputError(f"--arms has {name!r}; {self.name} has {', '.join(map(repr, names))}")
        chosen = set(self.arms or names)
        return chosen.union(*(names[name].needs(arms) for name in chosen))

    def _tune(self, backbone: Backbone) -> dict[str, str]:
        """By baseline, the setting that is best on validation queries."""
        file = self.out / "tuning.json"
        if not TUNED[self.name]:
            return {}
        if not file.is_file():
            bank = EncodingBank(backbone, load_queries(self.data, "validation").spread(self.tuning_queries))
            settings = settings_of(TUNED[self.name], read_grid(GRID))
            cut = self.max_new_tokens
            records, left_out = evaluate_settings(settings, backbone, bank, self.budgets, max_new_tokens=cut)
            found = {"best": best_settings(records), "left_out": left_out, "records": records}
            write_json(file, found)
        return self._best(file)

    def _best(self, file: Path) -> dict[str, str]:
        """What tuning has found: settings of the grid, and nothing else that a file could name as a policy."""
        settings = settings_of(TUNED[self.name], read_grid(GRID))
        try:
            best = dict(read_json(file)["best"])
            if not set(best.values()) <= set(settings):
                raise ValueError("settings that are not of the grid")
        except MALFORMED as error:
            raise cli.InputError(f"{str(file)!r} cannot be read ({error!r}); remove it to tune again") from error
        return best

    def _queries(self) -> DatasetQueries:
        return load_queries(self.data, "test").spread(self.test_queries)

    def _each(
        self, missing: Sequence[Cell], cells: Sequence[Cell], backbone: Backbone, queries: DatasetQueries
    ) -> Iterator[Cell]:
        """Works on the cells that are missing, and gives each when it is done."""
        if self.jobs > 1:
            yield from side_by_side(missing, self.jobs, self._prepare, partial(self._attempt, cells))
            return
        bank = EncodingBank(backbone, queries)
        for cell in missing:
            self._attempt(cells, (backbone, bank), cell)
            yield cell

    def _prepare(self) -> tuple[Backbone, EncodingBank]:
        queries = self._queries()
        backbone = self._priced(queries)
        return backbone, EncodingBank(backbone, queries)

    def _priced(self, queries: DatasetQueries) -> Backbone:
        """The backbone, with the answer length at which the experiment's trainings price plans, too."""
        backbone = self.load(self.backbone)
        self.price(backbone, self.data, queries, max_new_tokens=self.max_new_tokens)
        return backbone

    def _attempt(self, cells: Sequence[Cell], prepared: tuple[Backbone, EncodingBank], cell: Cell) -> None:
        attempt(cell, partial(self._work, cell, cells, *prepared))

    def _work(self, cell: Cell, cells: Sequence[Cell], backbone: Backbone, bank: EncodingBank) -> None:
        if not cell.done and cell.arm.script is not None and not cell.trained:
            train(cell, cells, self._training_options())
        if not cell.done:
            measure(cell, cells, backbone, bank, self.budgets, self.max_new_tokens)
        if self._to_time(cell):
            measure_times(cell, cells, backbone, bank, self.timing)

    def _to_time(self, cell: Cell) -> bool:
        return self.timing > 0 and cell.seed == self.seeds[0] and not cell.timed

    def _training_options(self) -> list[str]:
        twelfth = max(1, self.total_queries // 12)
        options = ["--backbone", self.backbone, "--data", self.data, "--total-queries", str(self.total_queries)]
        options += ["--validate-every", str(max(1000, twelfth)), "--checkpoint-every", str(twelfth)]
        options += ["--patience", "0"]  # the same queries for each
        options += ["--test-queries", "100", "--test-budgets", *map(str, self.budgets)]
        options += ["--device", self.device, "--dtype", self.dtype]
        if self.max_new_tokens is not None:
            options += ["--max-new-tokens", str(self.max_new_tokens)]
        if self.answer_tokens is not None:
            options += ["--answer-tokens", str(self.answer_tokens)]
        if self.wandb is not None:
            options += ["--wandb", self.wandb, "--group", self.out.name]
        return options


def read_head(file: Path) -> dict[str, Any]:
    """What an experiment was begun with.

    Raises:
        InputError: an unreadable file.
    """
    try:
        head = read_json(file)
    except (OSError, ValueError) as error:
        raise cli.InputError(f"{str(file)!r} cannot be read ({error}); choose another --out") from error
    if not isinstance(head, dict):
        raise cli.InputError(f"{str(file)!r} must hold an object; choose another --out")
    return head
