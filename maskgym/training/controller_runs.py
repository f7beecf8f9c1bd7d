"""What every training of a controller shares, whatever its estimator: options, metrics, validation, the final table."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from maskgym.backbones import Backbone, EncodingBank
from maskgym.backbones.encodings.encoding import QuerySource
from maskgym.backbones.encodings.left_out import MAX_FAILED, check_max_failed
from maskgym.backbones.plans.masks import AXES, check_axes
from maskgym.backbones.plans.survivors import Survivors
from maskgym.common.errors import InputError
from maskgym.common.run_folder import RunFolder
from maskgym.common.tracking import Tracker
from maskgym.envs import DatasetQueries, load_queries
from maskgym.envs.data.answer_length import say_cuts
from maskgym.eval.answering import Answering
from maskgym.eval.cli import Placement
from maskgym.eval.measure import report
from maskgym.eval.measure.evaluate import Record, check_budgets, outcomes_met
from maskgym.eval.measure.timing import first_queries
from maskgym.eval.pricing import Pricing
from maskgym.policies.baselines import FullPlanner, RandomPlanner
from maskgym.policies.controller.learned import Controller, load_controller, planner_of, save_controller
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planner import Planner
from maskgym.policies.planning.even import EvenPlanner
from maskgym.policies.planning.projection import least_share
from maskgym.policies.static.searched import SearchedOrder
from maskgym.policies.wrappers.layout import LaidOutPlanner
from maskgym.training.clock import TrainingClock, throughput
from maskgym.training.settling import Settling

if TYPE_CHECKING:
    from maskgym.training.joint_tuning import JointTuning


@dataclasses.dataclass
class ControllerRunConfig(Placement, Pricing, Answering):
    """Options of every training of a controller."""

    backbone: str = "tiny"
    """Which VLM answers: `tiny` or `small` (embedded, nothing to download), a folder, or a hub id."""
    data: str = "easy-vqa"
    """Queries: a name (`easy-vqa`, `scenes`), or a path with the columns image, question, answers."""
    axes: tuple[str, ...] = AXES
    """What the controller decides on: some of tokens, heads, layers. An axis left out stays full."""
    rule: Literal["threshold", "fill"] = "fill"
    """How logits become a plan. threshold: units with a positive logit, projected into the budget where they exceed it;
    fill: all logits are shifted by one number, different for each query, until the plan spends its budget."""
    positions: Literal["original", "renumbered", "restored"] = "original"
    """How the kept tokens are laid out. original: each where it was; renumbered: gaps closed; restored: dropped tokens
    averaged into kept ones, each at the median position of its group, attention corrected for it (RESTORE). Relaxed
    training leaves tokens where they were; what it has learned is then used so."""
    merge: bool = False
    """Average dropped tokens into the kept ones that they resemble; restored does so anyway."""
    budgets: tuple[float, float] = (0.2, 1.0)
    """Each training query's budget is log-uniform between these shares of the full plan's LLM FLOPs."""
    total_queries: int = 60_000
    """Queries to draw in training (rounded up to whole batches), each with a budget."""
    seed: int = 0
    """Of the controller's weights, the queries, the budgets and the plans."""
    deterministic: bool = False
    """Use only operations that give equal bits each time, and end with an error where there is none. On a CPU runs are
    equal anyway; on a GPU they need it, and become slower."""
    out: Path = Path("runs/run")
    """Run folder to make."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, as if it had never stopped; with other `total-queries`, for
    longer: the learning rate, and all that follows the progress, are then as if so many had been asked for at first."""
    init_from: Path | None = None
    """Start from the controller of this finished run (of any estimator) instead of a fresh one."""
    tune_backbone: Literal["off", "lora", "full"] = "off"
    """Let the language model's weights learn with the controller, as AdaLLaVA does: adapters of rank 16, or all weights
    of its layers. Saved in the run's `model/`. Off for comparisons of controllers."""
    tune_rate: float = 1e-4
    """Learning rate of the backbone's weights, falling linearly to zero."""
    initial_plan: Path | None = None
    """Begin with the plan that python -m maskgym.eval search-static --out wrote to this file; by default with an even
    grid of tokens, of which heads leave late and layers last."""
    initial_spread: float = 8.0
    """How firmly an untrained controller keeps to its first plan: the first unit to leave has the logit 0, the last
    twice this. Small: much is tried; large: little but what is near the plan."""
    token_spread: float | None = None
    """The same for visual tokens alone. Small: many are tried, so more is learned of which matter to a query."""
    width: int = 48
    """Width of the controller."""
    learning_rate: float = 3e-3
    """Of Adam, falling linearly to zero."""
    validate_every: int = 10_000
    """Queries between validations."""
    validate_queries: int = 500
    """Queries in a validation."""
    patience: int = 3
    """Validations in a row without more right answers, or clearly fewer FLOPs, after which the training ends, before
    `total-queries`. 0: it goes on to the end, as comparisons of trainings need."""
    checkpoint_every: int = 10_000
    """Queries between checkpoints."""
    test_budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Budgets of the final table."""
    test_queries: int | None = 1000
    """Queries of the test split in the final table, spread over it. None: all."""
    max_failed: float = MAX_FAILED
    """Share of the training's draws, in [0, 1), that may be of queries that fail, of unreadable images, say: they are
    named, counted, and replaced by others. 20 draws always may, unless it is 0."""
    wandb: str | None = None
    """Also track the run in this Weights & Biases project; without a key, offline."""
    group: str | None = None
    """Group of runs there that this one belongs to."""

    LENGTH: ClassVar = "total_queries"

    @property
    def answers(self) -> int:
        """Plans that each of the training's queries is answered under."""
        return 1

    def check(self) -> None:
        """Refuse options that cannot work, before anything is loaded or written.

        Raises:
            InputError: naming the option, its value and what it must be.
        """
        check_axes(self.axes)
        check_budgets(self.test_budgets)
        self.check_cut()
        self.check_price()
        self._price_as_begun()
        check_max_failed("--max-failed", self.max_failed)
        if "tokens" not in self.axes and self.merge:
            raise InputError(f"--merge has no effect where --axes are {' '.join(self.axes)}; leave it out")
        if self.initial_plan is not None and self.init_from is not None:
            raise InputError("--initial-plan has no effect on a controller that --init-from gives; leave one out")
        self.check_at_least_one("total_queries", "width", "validate_every", "validate_queries", "checkpoint_every")
        if self.test_queries is not None:
            self.check_at_least_one("test_queries")
        if self.patience < 0:
            raise InputError(f"--patience is {self.patience}; it must be at least 1, or 0 for no early end")
        for name in ("initial_spread", "token_spread"):
            spread = getattr(self, name)
            if spread is not None and not 0 <= spread < 1000:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is {spread:g}; it must be at least 0, and below 1000")
        for name in ("learning_rate", "tune_rate"):
            if not getattr(self, name) > 0:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is {getattr(self, name):g}; it must be above 0")
        self.settle_dtype(self.backbone)

    def _price_as_begun(self) -> None:
        """A run that is resumed, and was begun by a version without the option, goes on at one token."""
        if self.resume and self.answer_tokens is None and RunFolder(self.out).is_run():
            self.answer_tokens = RunFolder(self.out).config().get("answer_tokens", 1)

    def load_priced(self) -> Backbone:
        """The backbone, with the answer length that plans are priced at."""
        backbone = self.load(self.backbone)
        validation = load_queries(self.data, "validation")
        self.price(backbone, self.data, validation, max_new_tokens=self.max_new_tokens)
        return backbone

    def check_at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")

    def tuning(self, backbone: Backbone) -> JointTuning | None:
        """What lets the backbone learn, if it shall."""
        if self.tune_backbone == "off":
            return None
        from maskgym.training.joint_tuning import JointTuning  # PEFT takes seconds to import, and few need it

        return JointTuning(backbone, self.tune_backbone, self.tune_rate)

    def laying_out(self) -> dict[str, Any]:
        """How kept tokens are laid out, if any are dropped."""
        return {"positions": self.positions if "tokens" in self.axes else "original", "merge": self.merge}

    def sizes(self, backbone: Backbone, **more: Any) -> ControllerConfig:
        """Of the controller to train."""
        same = ("width", "rule", "initial_spread", "token_spread")
        own = {**self.laying_out(), "axes": check_axes(self.axes), "initial_logit": self.initial_spread}
        more = {**own, **{name: getattr(self, name) for name in same}, **more}
        return ControllerConfig.for_layout(backbone.layout, backbone.hidden, **more)

    def initial_weights(self, backbone: Backbone, sizes: ControllerConfig) -> dict[str, Any] | None:
        """The weights that ``init_from`` names, or those that begin with ``initial_plan``, or None.

        Raises:
            InputError: a controller of another size, or a plan for another layout.
        """
        if self.init_from is None:
            if self.initial_plan is None:
                return None
            fresh = TwoLevelController(sizes)
            fresh.begin_with(SearchedOrder.load(self.initial_plan).confidence(backbone))
            return fresh.state_dict()
        controller = load_controller(self.init_from, backbone, any_weights=True)
        if not isinstance(controller, TwoLevelController):
            raise InputError(f"--init-from {str(self.init_from)!r} is a scheduler of AdaLLaVA's; give a run of another")
        if controller.config.width != sizes.width or controller.config.pools != sizes.pools:
            raise InputError(
                f"--init-from {str(self.init_from)!r} has a controller of width {controller.config.width}, this run "
                f"one of width {sizes.width}; give --width {controller.config.width}"
            )
        if controller.config.rule != sizes.rule:
            raise InputError(
                f"--init-from {str(self.init_from)!r} was trained with the rule {controller.config.rule}, this run has "
                f"{sizes.rule}; give --rule {controller.config.rule}"
            )
        return controller.state_dict()


class RunJournal:
    """Metrics of a run: lines in its folder, further trackers, validations.

    Args:
        config: the run's options.
        folder: where to write.
        backbone: answers in validations.
        tracker: further place for metrics.
        name: of the policy, in records.
    """

    def __init__(self, config: ControllerRunConfig, folder: RunFolder, backbone: Backbone, tracker: Tracker, name: str):
        self.config, self.folder, self.backbone, self.tracker, self.name = config, folder, backbone, tracker, name
        validation = load_queries(config.data, "validation").spread(config.validate_queries)
        self.validation = EncodingBank(backbone, validation)
        self.test = test_queries(config)  # a split that cannot be used is met before the training
        self._check_reach()
        self.lines = 0
        self.settling = Settling(config.patience)
        self.validated: int | None = None
        self.clock = TrainingClock(backbone.device)
        self.next_validation, self.next_checkpoint = config.validate_every, 0

    def _check_reach(self) -> None:
        """Before the training, not after it.

        Raises:
            InputError: test budgets that are all below what the smallest plan costs, by the first queries; or no query
                that works.
        """
        encoding = self.backbone.encode(first_queries(self.validation, 8))
        least = float(least_share(self.backbone, encoding, axes=check_axes(self.config.axes)).min())
        if max(self.config.test_budgets) < least:
            given = " ".join(f"{budget:g}" for budget in self.config.test_budgets)
            raise InputError(f"--test-budgets {given} can never be met; the least budget here is {least:.4f}")

    def say_cuts(self, *answered: QuerySource) -> None:
        """Where answers are cut: in the training, if it answers queries, in validations, and in the final table."""
        say_cuts(self.backbone, [*answered, self.validation.source, self.test], self.config.max_new_tokens)

    def write(self, queries: int, metrics: dict[str, Any]) -> None:
        """One line of metrics after so many queries."""
        self.folder.log(queries=queries, **metrics)
        self.folder.log_timing(queries=queries, **self.clock.read())
        self.lines += 1
        self.tracker.log(queries, metrics)

    def validate(self, queries: int, controller: Controller) -> None:
        """A line with accuracy and FLOPs on the validation split at each budget, unless these queries have one."""
        if self.validated == queries:
            return
        self.clock.pause()
        training = controller.training
        planner = planner_of(controller, self.backbone, self.name)
        budgets = self.config.test_budgets
        how: dict[str, Any] = {"max_new_tokens": self.config.max_new_tokens, "progress": False}
        found, _ = outcomes_met(planner, self.backbone, self.validation, budgets, **how)
        records = [outcome.record for outcome in found]
        self.settling.see(records)
        self.validated = queries
        controller.train(training)
        kept = ("accuracy", "llm_flops_ratio", "budget_violations")
        self.write(queries, {"validation": {str(r["budget"]): {name: r[name] for name in kept} for r in records}})
        self.clock.go_on()

    def due_validation(self, queries: int) -> bool:
        """Whether one is due; asking settles it, however many have been passed: a resumed run asks again."""
        due = queries >= self.next_validation
        if due:
            every = self.config.validate_every
            self.next_validation = (queries // every + 1) * every
        return due

    def due_checkpoint(self, queries: int) -> bool:
        """Whether one is due; asking settles it."""
        due = queries >= self.next_checkpoint
        if due:
            self.next_checkpoint = queries + self.config.checkpoint_every
        return due

    def end(self, queries: int) -> None:
        """Say so, if the training ends before its last query."""
        if self.settling.settled and queries < self.config.total_queries:
            done = f"{queries:,} of {self.config.total_queries:,} queries (--patience {self.config.patience})"
            print(f"validation has settled after {done}; to go on, add --resume --patience 0", file=sys.stderr)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "lines": self.lines,
            "next_validation": self.next_validation,
            "next_checkpoint": self.next_checkpoint,
            "settling": self.settling.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from there; later lines are dropped."""
        self.lines = state["lines"]
        if "settling" in state:  # not in checkpoints of earlier versions
            self.settling.load_state(state["settling"])
        if self.folder.other_length is not None:
            self.settling.stale = 0  # who asks for a longer run wants it to go on
        self.next_validation, self.next_checkpoint = state["next_validation"], state["next_checkpoint"]
        self.folder.truncate_metrics(self.lines)
        last = self.folder.metrics()[-1:]
        self.validated = last[0]["queries"] if last and "validation" in last[0] else None
        timing = self.folder.timing()
        self.clock.go_on_from(timing[-1] if timing else {"seconds": 0.0})


def test_queries(config: ControllerRunConfig) -> DatasetQueries:
    """What the final table is measured on."""
    return load_queries(config.data, "test").spread(config.test_queries)


def nothing_left(config: ControllerRunConfig, folder: RunFolder) -> bool:
    """Whether the run has its result and is not to go on, and says so."""
    settled = folder.done() < config.total_queries
    if not folder.is_finished() or (settled and not config.patience):
        return False
    more = "--patience 0" if settled else "--total-queries"
    print(f"run folder: {folder.path} is done, {folder.done()} queries; more with --resume and {more}")
    return True


def conclude(
    config: ControllerRunConfig,
    folder: RunFolder,
    tracker: Tracker,
    controller: Controller,
    backbone: Backbone,
    name: str,
    began: float,
    tuning: JointTuning | None = None,
) -> None:
    """Save the controller and a backbone that was tuned, evaluate beside the plain model, and random plans and an even
    one of equal cost, draw and print."""
    if tuning is not None:
        tuning.save(folder.model)
    save_controller(controller, folder.path, backbone)
    bank = EncodingBank(backbone, test_queries(config))
    axes, layout = check_axes(config.axes), config.laying_out()
    even: Planner = EvenPlanner(backbone, axes=axes)
    if Survivors.asked(0, **layout) is not None:
        even = LaidOutPlanner(even, backbone, **layout)
    untrained: list[Planner] = [FullPlanner(backbone), RandomPlanner(backbone, config.seed, axes), even]
    # without training, plans of the whole budget are full ones
    below = [budget for budget in config.test_budgets if budget < 1] or config.test_budgets
    records: list[Record] = []
    left_out: list[str] = []
    for planner in [*untrained, planner_of(controller, backbone, name)]:
        budgets = below if planner in untrained else config.test_budgets
        cut = config.max_new_tokens
        found, gaps = outcomes_met(planner, backbone, bank, budgets, config.seed, max_new_tokens=cut)
        records += [outcome.record for outcome in found]
        left_out += [f"{planner.name} left out: {reason}" for reason in gaps.values()]
    report.plot_tradeoff(records, folder.path / "tradeoff.png")
    report.plot_training(folder.metrics(), folder.path / "training.png")
    tracker.finish({"tradeoff": folder.path / "tradeoff.png", "training": folder.path / "training.png"})
    folder.write_result(records)
    # files first: nobody may be there any more to read what is printed
    print(*left_out, report.tables(records), sep="\n")
    print(f"\n{throughput(folder.timing(), config.answers)}")
    print(f"run folder: {folder.path}  (plots: tradeoff.png, training.png; {time.time() - began:.0f} s)")
