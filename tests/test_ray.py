"""Plans executed by Ray workers: the same as in one process, whatever happens to a worker."""

import json
import os
import signal
import sys
from functools import partial

import datasets
import numpy as np
import pytest
import torch

import maskgym.training.rl as train_rl
from maskgym.backbones import load_backbone
from maskgym.common.errors import InputError
from maskgym.envs import MaskingCore
from maskgym.envs.core import Slots
from maskgym.envs.ray_core import RayCore, check_workers
from tests.conftest import command, make_dataset
from tests.test_train_rl import OPTIONS, lines

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def core(place):
    load = partial(load_backbone, str(place / "vlm"))
    made = RayCore(2, load(), load, data=str(place / "data"), budgets=(0.6, 1.0))
    yield made
    ray.shutdown()


def asked(core, rows=7):
    generator = np.random.default_rng(0)
    actions = generator.integers(0, 2, (rows, core.layout.size)).astype(np.int8)
    actions[:, -core.layout.layers :] = 1
    return generator.integers(0, 12, rows), generator.uniform(0.6, 1, rows).astype(np.float32), actions


def same(core, place):
    """A step of the workers against one of a core in this process."""
    alone = MaskingCore(load_backbone(str(place / "vlm")), str(place / "data"), budgets=(0.6, 1.0))
    together, expected = core.step(*asked(core)), alone.step(*asked(core))
    assert together.info.keys() == expected.info.keys()
    for name, values in expected.info.items():
        assert np.allclose(together.info[name], values, atol=1e-5), name
    assert np.allclose(together.rewards, expected.rewards, atol=1e-5)


def test_workers_answer_as_one_process_does(core, place):
    assert len(set(core.processes())) == 2
    same(core, place)


def test_workers_are_asked_of_no_query_that_fails(place, tmp_path, capsys):
    """Null: a worker that is asked of one ends the training."""
    rows = make_dataset().cast_column("image", datasets.Image(decode=False)).to_dict()
    rows["image"][4] = {"path": None, "bytes": b"rubbish"}
    datasets.Dataset.from_dict(rows, features=make_dataset().features).to_parquet(tmp_path / "broken.parquet")
    load = partial(load_backbone, str(place / "vlm"))
    core = RayCore(1, load(), load, data=str(tmp_path / "broken.parquet"), max_failed=0.5)
    slots = Slots(core, 40)
    slots.seed(0)
    slots.draw()
    assert core.left_out.numbers == [4] and 4 not in slots.numbers
    plans = np.ones((40, core.layout.size), np.int8)
    assert slots.step(plans).rewards.shape == (40,)
    assert "query 'q4' failed: image " in capsys.readouterr().err
    with pytest.raises(InputError, match="of query 'q4' cannot be decoded"):
        core.execute(np.array([4]), np.ones(1, np.float32), plans[:1])


def test_fewer_slots_than_workers_are_fine(core, place):
    numbers, budgets, actions = asked(core, rows=1)
    assert core.step(numbers, budgets, actions).rewards.shape == (1,)


def test_a_lost_worker_comes_back_and_nothing_is_lost(core, place):
    before = core.processes()
    os.kill(before[0], signal.SIGKILL)
    same(core, place)
    after = core.processes()
    assert after[0] != before[0] and after[1] == before[1]


def test_what_a_worker_refuses_is_said_here(core):
    numbers, budgets, actions = asked(core)
    with pytest.raises(InputError, match="query number 99 does not exist"):
        core.execute(numbers + 99 - numbers, budgets, actions)


def test_a_training_with_workers_has_the_same_records(monkeypatch, place, tmp_path):
    for name, more in (("one", []), ("two", ["--workers", 2])):
        where = ["--backbone", place / "vlm", "--data", place / "data", "--out", tmp_path / name]
        command(monkeypatch, train_rl.main, *where, *OPTIONS.split(), *more)
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        assert all(np.allclose(one[name], two[name], atol=1e-4) for name in one if name != "validation")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert [record["accuracy"] for record in results[0]] == [record["accuracy"] for record in results[1]]


def test_more_workers_than_devices_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"--workers is 999, but there are \d+ CPU cores"):
        check_workers(999, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--workers is 3, but there are 2 GPUs, one for each worker; give at most 2"):
        check_workers(3, torch.device("cuda"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--workers", "-1"], "--workers is -1; it must be at least 0"),
        (["--workers", "1", "--tune-backbone", "full"], "a tuned backbone cannot have replicas"),
    ],
)
def test_bad_options_are_named(monkeypatch, place, tmp_path, capsys, more, words):
    with pytest.raises(SystemExit):
        command(monkeypatch, train_rl.main, "--out", tmp_path / "run", *more)
    assert words in capsys.readouterr().err


def test_ray_that_is_not_installed_is_named(monkeypatch, place):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--workers needs Ray; install it with: pip install 'maskgym\[ray\]'"):
        load = partial(load_backbone, str(place / "vlm"))
        RayCore(1, load(), load, data=str(place / "data"))
