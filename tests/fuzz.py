"""Throw rubbish at everything that reads a file or a text of the user's: ``python -m tests.fuzz --seconds 60``.

Whatever comes in, a value must come out, or an ``InputError`` in one line, and soon. Half of the inputs are whole ones,
changed in a few places; the rest are changed more.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.torch import save

from maskgym.backbones import Backbone, InputError
from maskgym.backbones.encodings.images import read_image
from maskgym.backbones.latency_model import LatencyModel
from maskgym.common.naming import parse_options
from maskgym.common.plain_files import read_records
from maskgym.common.run_folder import RunFolder
from maskgym.envs import WeightedReward
from maskgym.envs.data.benchmarks.layout import Benchmark
from maskgym.envs.data.benchmarks.reading import json_entries, json_lines, tab_separated
from maskgym.envs.data.benchmarks.source import BENCHMARKS, rows
from maskgym.envs.data.scenes import scenes
from maskgym.eval import cli
from maskgym.eval.experiment.arms import Arm
from maskgym.eval.experiment.cells import KEPT_COLUMNS, MEASURED, Cell
from maskgym.eval.experiment.command import read_head
from maskgym.eval.policies import load_planner
from maskgym.eval.saved import DESCRIPTION, described_backbone
from maskgym.eval.studies.tune import read_grid
from maskgym.lmms.arguments import Arguments
from maskgym.lmms.recorded import ASKED, Recorded
from maskgym.policies.controller.learned import SIZES, WEIGHTS, load_controller
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.static.searched import SearchedOrder
from maskgym.training.checkpoints import load_checkpoint
from maskgym.training.rl import RLConfig
from tests import benchmark_files
from tests.conftest import build

SECONDS_AN_INPUT = 10
"""What takes longer hangs."""

TOKENS = [
    *(b'"', b"'", b"{", b"}", b"[", b"]", b":", b",", b"=", b"@", b"*", b"\n", b"\t", b" ", b"-", b"#", b"&a", b"*a"),
    *(b"nan", b"inf", b"NaN", b"-Infinity", b"null", b"None", b"true", b"0", b"-1", b"1e999", b"9" * 30, b"9" * 5000),
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\\ud800", b"!!python/name:os.system", b"<<", b"? ", b"|"),
    *(b" then ", b"then", b"@merge", b"@0.5", b"k=2", b"--", b"--help", b"[" * 3000, b"{" * 3000, b'{"a":' * 3000),
]

RECORD = {**dict.fromkeys(ASKED, "x"), "budget": 0.5, "text": "red"}
"""A whole record, as the plug-in for lmms-eval writes them."""


@dataclass(frozen=True)
class Target:
    """Something that reads.

    Attributes:
        parse: reads the content; may write it to the folder first.
        whole: contents that it takes.
    """

    parse: Callable[[bytes, Path], object]
    whole: Sequence[bytes]


def of_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """What reads the file of that name."""

    def parse(content: bytes, folder: Path) -> object:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return parse


def of_text(read: Callable[[str], object]) -> Callable[[bytes, Path], object]:
    return lambda content, _: read(content.decode("utf-8", "replace"))


def targets() -> dict[str, Target]:
    """By name, all that reads what users bring."""
    backbone = build()
    return {
        **run_targets(),
        **controller_targets(backbone),
        **evaluation_targets(backbone),
        **option_targets(backbone),
        **data_targets(),
        **benchmark_targets(),
    }


def run_targets() -> dict[str, Target]:
    """Files of runs and experiments."""
    settings = yaml.safe_dump({"seed": 3, "budgets": [0.2, 1.0], "fit": False, "reward": ["accuracy", "-0.2*flops"]})

    measured = {**dict.fromkeys(MEASURED, 0.5), "n": 3, "budgeted": True}
    columns = BytesIO()
    np.savez_compressed(columns, allow_pickle=False, **{f"{name}@0.5": np.ones(3) for name in KEPT_COLUMNS})

    def with_records(content: bytes, folder: Path) -> object:
        of_file("records.json", Path.is_file)(json.dumps([measured]).encode(), folder)
        return of_file("outcomes.npz", lambda path: Cell(Arm("full"), 0, path.parent).outcomes())(content, folder)

    return {
        "config.yaml of a command": Target(
            of_file("options.yaml", lambda path: cli.parse(RLConfig, ["--config", str(path)])), [settings.encode()]
        ),
        "config.yaml of a run": Target(
            of_file("run/config.yaml", lambda path: RunFolder(path.parent).backbone()), [settings.encode()]
        ),
        "metrics.jsonl": Target(
            of_file("run/metrics.jsonl", lambda path: RunFolder(path.parent).metrics()),
            [b'{"queries": 8, "reward": 0.5}\n{"queries": 16, "validation": {"0.5": {"accuracy": NaN}}}\n'],
        ),
        "timing.jsonl": Target(
            of_file("run/timing.jsonl", lambda path: RunFolder(path.parent).timing()),
            [b'{"queries": 8, "seconds": 0.5, "peak_memory_mb": 9}\n'],
        ),
        "records.json of a cell": Target(
            of_file("records.json", lambda path: Cell(Arm("full"), 0, path.parent).records()),
            [json.dumps([measured]).encode(), b'[{"budget": 0.5, "gap": "too little"}]'],
        ),
        "outcomes.npz": Target(with_records, [columns.getvalue()]),
        "records.json": Target(of_file("records.json", read_records), [json.dumps([RECORD]).encode()]),
        "experiment.json": Target(of_file("experiment.json", read_head), [b'{"backbone": "tiny", "budgets": [0.5]}']),
    }


def controller_targets(backbone: Backbone) -> dict[str, Target]:
    """Files of trained controllers and of checkpoints."""
    controller = TwoLevelController(ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=4))
    sizes = json.dumps({"kind": "two-level", **controller.config_dict()}).encode()
    weights = save({name: weight.contiguous() for name, weight in controller.state_dict().items()})

    def with_sizes(content: bytes, folder: Path) -> object:
        (folder / WEIGHTS).write_bytes(weights)
        return of_file(SIZES, lambda path: load_controller(path.parent, backbone))(content, folder)

    def with_tensors(content: bytes, folder: Path) -> object:
        of_file("checkpoints/step-000000001/tensors.safetensors", Path.is_file)(weights, folder)
        return of_file("checkpoints/step-000000001/state.json", lambda path: load_checkpoint(path.parents[1]))(
            content, folder
        )

    def with_weights(content: bytes, folder: Path) -> object:
        (folder / SIZES).write_bytes(sizes)
        return of_file(WEIGHTS, lambda path: load_controller(path.parent, backbone))(content, folder)

    return {
        "adaptive.json": Target(
            of_file(DESCRIPTION, lambda path: described_backbone(path.parent)),
            [b'{"backbone": "tiny", "backbone_options": {"heads": 4, "protected_layers": [0]}}'],
        ),
        "controller.json": Target(with_sizes, [sizes]),
        "controller.safetensors": Target(with_weights, [weights]),
        "state.json": Target(
            with_tensors,
            [b'{"queries": 8, "random": {}}'],
        ),
    }


def evaluation_targets(backbone: Backbone) -> dict[str, Target]:
    """Files that evaluations are given."""
    layout = backbone.layout
    plan = SearchedOrder(
        "b", (layout.tokens, layout.layers, layout.heads), "d", "train", 2, [[0, 1], [20]], [0.9, 0.8], [0, 1]
    )
    return {
        "static plan": Target(
            of_file("plan.json", lambda path: SearchedOrder.load(path).confidence(backbone)), [plan.json().encode()]
        ),
        "latency model": Target(
            of_file("latency.json", LatencyModel.load),
            [b'{"device": "d", "backbone": "b", "weights": [0.5, 0.2, 1, 30, 50], "error": 0.01}'],
        ),
        "answers of lmms-eval": Target(
            of_file("answers.jsonl", lambda path: Recorded(path, (0.5,))), [json.dumps(RECORD).encode()]
        ),
        "tuning grid": Target(of_file("grid.txt", read_grid), [b"fastv:k=2 # two layers\n\nprumerge+\n"]),
    }


def option_targets(backbone: Backbone) -> dict[str, Target]:
    """Texts on the command line."""
    return {
        "reward": Target(of_text(WeightedReward), [b"accuracy", b"-0.2*flops", b"0.5*numpy:mean"]),
        "policy": Target(
            of_text(lambda text: load_planner(text, backbone, 0)),
            [b"prumerge+:count=budget@original@0.5 then even", b"fastv:k=2,r=0.5", b"divprune@0.25@merge", b"random"],
        ),
        "options of data": Target(
            of_text(lambda text: parse_options(scenes, "data 'scenes'", text, ("split",))), [b"size=64,images=3,seed=1"]
        ),
        "budgets of lmms-eval": Target(
            of_text(lambda text: Arguments.read({"pretrained": "x", "records": "r", "budget": text})), [b"0.25-0.5-1.0"]
        ),
        "command line": Target(
            of_text(lambda text: cli.read_options(RLConfig, text.split())), [b"--budgets 0.2 1 --no-fit --seed 3"]
        ),
    }


def data_targets() -> dict[str, Target]:
    """Pictures and tables of queries."""
    picture = BytesIO()
    Image.new("RGB", (9, 7), "red").save(picture, "PNG")
    return {
        "image": Target(lambda content, _: read_image(BytesIO(content), "image", 1e6), [picture.getvalue()]),
        "JSON lines": Target(of_file("a.jsonl", lambda path: list(json_lines(path))), [b'{"a": 1}\n\n{"b": [2]}\n']),
        "JSON entries": Target(
            of_file("a.json", lambda path: list(json_entries(path))), [b'[{"a": 1}, 2]', b'{"a": [1]}']
        ),
        "JSON member": Target(
            of_file("a.json", lambda path: list(json_entries(path, "questions"))),
            [b'{"info": 1, "questions": [{"a": 1}]}'],
        ),
        "table": Target(of_file("a.tsv", lambda path: list(tab_separated(path))), [b'index\tquestion\n1\t"a\tb"\n']),
    }


def benchmark_targets() -> dict[str, Target]:
    """The annotation files of every benchmark, one spoilt at a time."""
    found: dict[str, Target] = {}
    for name, made in BENCHMARKS.items():
        if " " in name:
            continue
        with tempfile.TemporaryDirectory() as place:
            getattr(benchmark_files, name)(Path(place))
            parts = tuple(part for part in made.parts if has(made, name, Path(place), part))
            files = {
                path.relative_to(place): path.read_bytes() for path in sorted(Path(place).rglob("*")) if path.is_file()
            }
        texts = [file for file in files if file.suffix == ".txt"][:1]  # of MME's many one
        for file in [*texts, *(file for file in files if file.suffix.startswith((".json", ".tsv")))]:
            read = partial(read_benchmark, name, parts, files, file)
            found[f"{name}: {file}"] = Target(read, [files[file]])
    return found


def has(made: Benchmark, name: str, root: Path, part: str) -> bool:
    try:
        return bool(made.locate(name, root, [part]))
    except InputError:
        return False


def read_benchmark(
    name: str, parts: Sequence[str], files: dict[Path, bytes], file: Path, content: bytes, folder: Path
) -> object:
    """All rows, where one file holds something else."""
    for path, own in {**files, file: content}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(own)
    return list(rows(name, str(folder), "-".join(parts), "{question}"))


def spoil(rng: random.Random, whole: Sequence[bytes]) -> bytes:
    """A whole content, changed in some places."""
    content = bytearray(rng.choice(whole))
    for _ in range(rng.choice((1, 1, 2, 3, 8, 30))):
        place = rng.randrange(len(content) + 1)
        end = min(len(content), place + rng.choice((1, 1, 2, 8, 64)))
        match rng.randrange(7):
            case 0:
                content[place:place] = rng.choice(TOKENS)
            case 1:
                content[place:end] = rng.choice(TOKENS)
            case 2:
                del content[place:end]
            case 3:
                content[place:place] = content[place:end] * rng.choice((1, 2, 20))
            case 4:
                content[place:end] = rng.randbytes(end - place)
            case 5:
                del content[place if rng.random() < 0.3 else end :]
            case _:
                other = rng.choice(whole)
                content[place:end] = other[rng.randrange(len(other) + 1) :][:64]
    return bytes(content)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """An input that hangs is stopped, and found."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(target: Target, content: bytes, folder: Path) -> str:
    """``taken`` or ``refused``; whatever else is raised is a defect."""
    try:
        with within(SECONDS_AN_INPUT), redirect_stdout(StringIO()):
            target.parse(content, folder)
    except InputError as error:
        if not str(error).strip():
            raise AssertionError("refused without a word") from error
        return "refused"
    except SystemExit as stopped:
        if stopped.code:  # --help ends with 0
            raise AssertionError("ended the process") from stopped
    return "taken"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = options(arguments)
    rng, chosen, counts = random.Random(given.seed), targets(), Counter[tuple[str, str]]()
    end = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as place:
        for number, name in enumerate(chosen):
            for whole in chosen[name].whole:  # the null: what is whole is taken
                assert outcome(chosen[name], whole, folder_of(place, number)) == "taken", (
                    name,
                    whole,
                )
        while time.monotonic() < end:
            for number, (name, target) in enumerate(chosen.items()):
                content = spoil(rng, target.whole) if rng.random() < 0.9 else rng.randbytes(rng.randrange(200))
                try:
                    counts[name, outcome(target, content, folder_of(place, number))] += 1
                except BaseException:
                    traceback.print_exc()
                    print(f"defect: {name} with {content[:2000]!r}", file=sys.stderr)
                    return 1
    for name in chosen:
        print(f"{name}: {counts[name, 'taken']} taken, {counts[name, 'refused']} refused")
    print(f"{counts.total()} inputs to {len(chosen)} readers: no other exception, none that hung")
    return 0


def folder_of(place: str, number: int) -> Path:
    """A folder for each target, so that one finds no other's files."""
    folder = Path(place) / str(number)
    folder.mkdir(exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
