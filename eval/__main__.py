"""``python -m maskgym.eval``: evaluate policies, time them, measure speed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin while cores are busy cost tenfold

import torch
import tyro
from tqdm import tqdm

from maskgym.backbones import EncodingBank
from maskgym.envs import load_queries
from maskgym.envs.data.answer_length import say_cuts
from maskgym.eval import cli
from maskgym.eval.answering import Answering
from maskgym.eval.bench.gpu import Gpu
from maskgym.eval.bench.table import bench, bench_table
from maskgym.eval.demo.command import Demo
from maskgym.eval.experiment.command import Experiment
from maskgym.eval.measure import report
from maskgym.eval.measure.evaluate import Record, check_budgets, outcomes_met
from maskgym.eval.measure.failures import working
from maskgym.eval.measure.latency import calibrate, device_name, measure
from maskgym.eval.measure.timing import add_timing, first_queries, how_to_calibrate, latency_table, load_latency_model
from maskgym.eval.policies import backbone_of, load_planner, load_planners, with_layout
from maskgym.eval.pricing import Pricing
from maskgym.eval.studies import elasticity, gradients
from maskgym.eval.studies.audit import Audit
from maskgym.eval.studies.question_only import QuestionOnly, question_only_accuracy
from maskgym.eval.studies.scale_out import ScaleOut
from maskgym.eval.studies.search_static import SearchStatic
from maskgym.eval.studies.tune import Tune
from maskgym.policies.wrappers.keep import check_share


@dataclass
class Run(cli.Placement, Pricing, Answering):
    """Evaluate policies over queries and budgets; prints a table.

    Example: python -m maskgym.eval run runs/rl full random --data easy-vqa --budgets 0.25 0.5

    A query that fails (an unreadable image, say) is reported on standard error, counted, and left out for all policies.
    """

    policies: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, or what AdaptiveVLM.save_pretrained wrote; baselines, with options as in fastv:k=2,r=0.5
    (docs/baselines.md lists them); planners of your own as package.module:planner; any of them with @merge,
    @renumbered, @restored, or @0.25 (of the visual tokens)."""
    data: str = "easy-vqa"
    """Queries: a name, also of a benchmark (vqav2:root=FOLDER; see docs/benchmarks.md), or a path with the columns
    image, question, answers."""
    split: str = "test"
    """train, validation or test."""
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Shares of the full plan's LLM FLOPs, in (0, 1]."""
    hard_budgets: bool = False
    """Cut an answer that is longer than priced where its budget has no room for another token; by default it goes on,
    and what it spends is reported."""
    keep: tuple[float, ...] = ()
    """Shares of the visual tokens to keep, in (0, 1], in place of --budgets; for policies that choose by count."""
    merge: bool = False
    """Average dropped visual tokens into the kept ones that they resemble, before the language model sees them."""
    positions: Literal["original", "renumbered", "restored"] | None = None
    """Where kept visual tokens stand: where they were; closed up; or at the median of what was merged into them, with
    attention making up for it (RESTORE). By default as each policy's authors have it."""
    limit: int | None = None
    """Use the first so many queries only."""
    backbone: str | None = None
    """Which VLM; by default the one that the runs were trained on."""
    strict: bool = False
    """End with an error at the first query that fails, in place of leaving it out."""
    seed: int = 0
    """Of baselines that draw."""
    timing: int = 0
    """Also time so many queries, one by one, for each policy and budget: adds time to first token (image, controller
    and prefill), time per output token and peak memory. 20 give a fair median; leave the machine alone meanwhile."""
    milliseconds: tuple[float, ...] = ()
    """Budgets in milliseconds of the language model's prefill, in place of --budgets: each query gets the largest share
    whose plan is predicted to be fast enough. Needs --latency-model."""
    latency_model: Path | None = None
    """What predicts the prefill: a file that python -m maskgym.eval latency --out wrote on this device."""
    json: Path | None = None
    """Also write the records there."""
    plot: Path | None = None
    """Also draw accuracy over FLOPs there (PNG)."""

    def run(self) -> None:
        self._check()
        backbone = self.load(*backbone_of(list(self.policies), self.backbone))
        model = load_latency_model(self.latency_model, backbone) if self.latency_model is not None else None
        queries = load_queries(self.data, self.split, self.limit)
        self.price(backbone, self.data, queries, self.policies, self.max_new_tokens)
        policies = [with_layout(policy, self.merge, self.positions) for policy in self.policies]
        planners = load_planners(policies, backbone, self.seed, self.milliseconds, model, self.keep)
        bank = EncodingBank(backbone, queries)
        say_cuts(backbone, [bank.source], self.max_new_tokens)
        records: list[Record] = []
        left_out: dict[str, str] = {}
        how = {"max_new_tokens": self.max_new_tokens, "strict": self.strict, "hard": self.hard_budgets}
        for planner in planners:
            found, gaps = outcomes_met(planner, backbone, bank, self.budgets, self.seed, **how)
            left_out |= {f"{planner.name} at {budget:g}": reason for budget, reason in gaps.items()}
            own = [outcome.record for outcome in found]
            if self.timing:
                add_timing(planner, backbone, first_queries(bank, self.timing), own)
            records += own
        if not records:
            raise cli.InputError(next(iter(left_out.values())))
        cli.write_json(self.json, records)
        if self.plot is not None:
            report.plot_tradeoff(records, self.plot)
        for planned, reason in left_out.items():
            print(f"{planned} is left out: {reason}", file=sys.stderr)
        print(report.tables(records))

    def _check(self) -> None:
        if not self.policies:
            raise cli.InputError("no policy given; name run folders or baselines, e.g. python -m maskgym.eval run full")
        check_budgets(self.budgets)
        for share in self.keep:
            check_share(share)
        if self.keep and self.milliseconds:
            raise cli.InputError("--keep and --milliseconds both stand in place of --budgets; give one of them")
        self.check_cut()
        self.check_price()
        if self.hard_budgets and (self.keep or self.milliseconds):
            raise cli.InputError("--hard-budgets has no effect with --keep or --milliseconds; leave it out")
        if self.timing < 0:
            raise cli.InputError(f"--timing is {self.timing}; give a number of queries, such as 20, or 0")
        if self.milliseconds and self.latency_model is None:
            command = how_to_calibrate(backbone_of(list(self.policies), self.backbone)[0])
            raise cli.InputError(f"--milliseconds needs --latency-model FILE; make one with: {command}")
        if self.latency_model is not None and not self.milliseconds:
            raise cli.InputError("--latency-model serves --milliseconds; give limits too, e.g. --milliseconds 2.5")
        cli.check_output("--json", self.json)
        cli.check_output("--plot", self.plot)


@dataclass
class Latency(cli.Placement, Pricing):
    """Time policies part by part on this device; with --out, also calibrate a model of the prefill's time.

    Encode is image processing and vision tower, controller what chooses the plan, prefill the language model up to the
    first answer token; TTFT, the time to first token, is their sum, TPOT the time of each further token. Figures are
    medians / 95th percentiles in milliseconds a batch.

    Example: python -m maskgym.eval latency runs/rl full --budgets 0.25 0.5 --out latency.json
    """

    policies: tyro.conf.Positional[tuple[str, ...]] = ("full", "random")
    """Run folders, or baselines; as for eval run."""
    data: str = "easy-vqa"
    """Queries: a name, or a path with the columns image, question, answers."""
    split: str = "test"
    """train, validation or test."""
    queries: int = 8
    """Time the first so many queries."""
    batch_size: int = 1
    """Queries at a time; 1 is what a single user waits for."""
    budgets: tuple[float, ...] = (0.5,)
    """Shares of the full plan's LLM FLOPs, in (0, 1]."""
    repeats: int = 10
    """Measurements of each batch, after warm-up."""
    backbone: str | None = None
    """Which VLM; by default the one that the runs were trained on."""
    seed: int = 0
    """Of baselines that draw."""
    out: Path | None = None
    """Calibrate on random plans of these queries and save the latency model there, for eval run --milliseconds."""

    def run(self) -> None:
        self._check()
        backbone = self.load(*backbone_of(list(self.policies), self.backbone))
        source = load_queries(self.data, self.split)
        self.price(backbone, self.data, source, self.policies)
        planners = [load_planner(policy, backbone, self.seed) for policy in self.policies]
        queries = first_queries(EncodingBank(backbone, source), self.queries)
        batches = [queries[start : start + self.batch_size] for start in range(0, len(queries), self.batch_size)]
        rows = []
        for planner in tqdm(planners, desc="timing", unit="policy"):
            for budget in self.budgets if planner.budgeted else (1.0,):
                latency = measure(backbone, planner, batches, budget, repeats=self.repeats)
                rows.append((planner.name, budget, latency))
        model = None if self.out is None else calibrate(backbone, queries, progress=True)
        if model is not None and self.out is not None:
            model.save(self.out)
        print(f"{backbone.name} on {device_name(backbone.device)}, {len(queries)} queries, {self.batch_size} a batch")
        print(latency_table(rows))
        if model is not None:
            print(f"latency model {self.out}: off by {model.error:.1%} (median) on plans held out of the fit")

    def _check(self) -> None:
        check_budgets(self.budgets)
        self.check_price()
        for option in ("queries", "batch_size", "repeats"):
            if getattr(self, option) < 1:
                raise cli.InputError(f"--{option.replace('_', '-')} is {getattr(self, option)}; it must be at least 1")
        cli.check_output("--out", self.out)


@dataclass
class Elasticity(cli.Placement, Pricing, Answering):
    """How gradually a VLM loses accuracy when parts are dropped, and how much a good choice of parts could win.

    Prints the full plan's accuracy by kind of question beside that of a model that never sees the image; accuracy under
    random plans that drop tokens, heads, layers or all three; and, at half the FLOPs, the mean of random plans, the
    best of them for all queries, and an oracle that knows the best for each.

    Example: python -m maskgym.eval elasticity --data scenes --limit 2000
    """

    backbone: str = "tiny"
    """Which VLM."""
    data: str = "scenes"
    """Queries: a name, or a path with the columns image, question, answers."""
    limit: int | None = None
    """Use so many queries of the test split, spread over it."""
    plans: int = 64
    """Random plans for the oracle, and"""
    oracle_queries: int = 1000
    """so many queries for it."""
    seed: int = 0
    """Of the random plans and the question-only model."""
    json: Path | None = None
    """Also write the figures there."""

    def run(self) -> None:
        cli.check_output("--json", self.json)
        self.check_cut()
        self.check_price()
        for option in ("plans", "oracle_queries"):
            if getattr(self, option) < 1:
                raise cli.InputError(f"--{option.replace('_', '-')} is {getattr(self, option)}; it must be at least 1")
        backbone = self.load(self.backbone)
        train, test = (load_queries(self.data, split) for split in ("train", "test"))
        self.price(backbone, self.data, test, max_new_tokens=self.max_new_tokens)
        bank, test = working(backbone, test.spread(self.limit))
        cut = self.max_new_tokens
        say_cuts(backbone, [test], cut)
        kinds = elasticity.accuracy_by_kind(backbone, bank, test, cut)
        question_only = float(question_only_accuracy(train, test, seed=self.seed).mean())
        records = elasticity.accuracy_by_axis(backbone, bank, seed=self.seed, max_new_tokens=cut)
        fewer = EncodingBank(backbone, test.spread(self.oracle_queries))
        room = elasticity.room_for_choice(backbone, fewer, plans=self.plans, seed=self.seed, max_new_tokens=cut)
        cli.write_json(self.json, [{"kinds": kinds, "question_only": question_only, "room": room, "records": records}])
        print(f"{elasticity.kinds_table(kinds)}\n\nwithout the image: {question_only:.1%}\n")
        print(f"{elasticity.axes_table(records)}\n")
        print(f"{self.plans} random plans at 50 % of the LLM FLOPs, {len(fewer)} queries:")
        print(", ".join(f"{name} {accuracy:.1%}" for name, accuracy in room.items()))


@dataclass
class Gradients:
    """Bias and spread of the gradient estimators, against the exact gradient by enumeration of 1,024 plans.

    A random model of 4 visual tokens and 2 layers of 2 heads; norms are over that of the exact gradient.

    Example: python -m maskgym.eval gradients --temperatures 0.1 0.5 1 2 5
    """

    samples: int = 4096
    """Draws for each estimator; a multiple of 4."""
    temperatures: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 5.0)
    """Of the straight-through estimator."""
    seed: int = 3
    """Of the logits at which the gradient is taken, and of the draws."""

    def run(self) -> None:
        if self.samples < 8 or self.samples % 4 or min(self.temperatures, default=1.0) <= 0:
            raise cli.InputError(
                f"--samples {self.samples} must be a multiple of 4, at least 8; --temperatures {self.temperatures} "
                "above 0"
            )
        backbone, query = gradients.smallest_case()
        torch.manual_seed(self.seed)
        logits = torch.randn(backbone.layout.size)
        answer = backbone.answer_ids("red")
        figures = gradients.gradient_quality(backbone, query, logits, answer, self.samples, self.temperatures)
        print(gradients.gradient_table(figures))


@dataclass
class Bench(cli.Placement):
    """Measure every speed claim, as ratios within one run."""

    backbone: str = "tiny"
    """Which VLM."""
    data: str = "easy-vqa"
    """Queries to measure on."""
    parts: tuple[Literal["env", "engine", "data"], ...] = ("env", "engine")
    """What to measure: the environment around the backbone, the masked decoder on a LLaVA-like shape; when asked
    for, also the memory it takes to stream 200,000 queries of VQAv2's layout."""
    shape: Literal["small", "llava-1.5-7b"] = "small"
    """Of the decoder, with random weights: 8 layers of width 1024, or LLaVA-1.5-7B's config with its vision tower
    (14 GB in bfloat16; adds the time to first token part by part)."""
    json: Path | None = None
    """Also write the figures there."""

    def run(self) -> None:
        cli.check_output("--json", self.json)
        if not self.parts:
            raise cli.InputError("--parts is empty; name what to measure: env, engine, data")
        entries = bench(self.load(self.backbone), self.data, self.parts, self.shape)
        cli.write_json(self.json, entries)
        print(bench_table(entries))


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Latency, tyro.conf.subcommand("latency")]
    | Annotated[Elasticity, tyro.conf.subcommand("elasticity")]
    | Annotated[QuestionOnly, tyro.conf.subcommand("question-only")]
    | Annotated[Gradients, tyro.conf.subcommand("gradients")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[SearchStatic, tyro.conf.subcommand("search-static")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Experiment, tyro.conf.subcommand("experiment")]
    | Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Gpu, tyro.conf.subcommand("gpu")]
    | Annotated[ScaleOut, tyro.conf.subcommand("scale-out")]
)


def main() -> None:
    prog = sys.argv[0] if sys.argv[0].startswith("maskgym ") else "python -m maskgym.eval"
    cli.read_options(Command, prog=prog, description=__doc__).run()


def run_command() -> None:
    """What the shell starts."""
    cli.run(main, "the same command begins anew; an experiment goes on where it was")


if __name__ == "__main__":
    run_command()
