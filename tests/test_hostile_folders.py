"""Files of others: nothing in them is run, unpickled or followed out of its folder, and what they only claim takes no
memory. Every refusal is one line, quick, and within 512 MB more than the process had."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import maskgym.eval.__main__ as eval_main
import maskgym.eval.policies as eval_policies
import maskgym.training.rl as train_rl
from maskgym import AdaptiveVLM
from maskgym.backbones import InputError, load_backbone
from maskgym.backbones.encodings.images import read_image
from maskgym.backbones.latency_model import LatencyModel
from maskgym.common.run_folder import RunFolder
from maskgym.common.time_limit import within
from maskgym.envs import load_queries
from maskgym.eval.cli import parse
from maskgym.eval.experiment.arms import Arm
from maskgym.eval.experiment.cells import KEPT_COLUMNS, MEASURED, Cell
from maskgym.eval.experiment.command import Experiment
from maskgym.eval.policies import load_planner
from maskgym.policies.static.searched import SearchedOrder
from maskgym.training.checkpoints import load_checkpoint, save_checkpoint
from tests.conftest import build, command
from tests.hostile import Witness, a_run, claimed_png, edit, refused
from tests.local_hub import local_hub
from tests.refusals import snapshot

pytestmark = pytest.mark.slow

DEEP = "[" * 100_000
ALIASES = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b}\n  <<: [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def witness(tmp_path):
    return Witness(tmp_path / "ran")


@pytest.fixture
def vlm(place, tmp_path):
    """A VLM to spoil."""
    return Path(shutil.copytree(place / "vlm", tmp_path / "vlm"))


@pytest.fixture
def run(place, tmp_path):
    """A run to spoil."""
    return a_run(tmp_path / "run", place / "vlm")


@pytest.fixture
def saved(place, tmp_path):
    """What ``save_pretrained`` wrote, to spoil."""
    run = a_run(tmp_path / "made", place / "vlm")
    AdaptiveVLM.from_pretrained(run).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_the_pickle_that_these_tests_use_does_run_where_pickles_are_loaded(witness, tmp_path):
    witness.pickle(tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert witness.path.exists()


# Pickles, under every name that is loaded


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "has no model.safetensors; weights in other formats can run code"),
        ("model.safetensors", "could not be loaded"),
        ("config.json", "could not be read"),
        ("processor_config.json", "could not be loaded"),
        ("tokenizer.json", "could not be loaded"),
        ("tokenizer_config.json", "could not be loaded"),
    ],
)
def test_no_file_of_a_backbone_is_unpickled(witness, vlm, file, words):
    if file == "pytorch_model.bin":
        (vlm / "model.safetensors").unlink()
    witness.pickle(vlm / file)
    with refused(witness, words):
        load_backbone(str(vlm))


@pytest.mark.parametrize("shard", ["weights.bin", "../other/model.safetensors", "/etc/x.safetensors"])
def test_an_index_names_safetensors_beside_it(witness, vlm, shard):
    (vlm / "model.safetensors").unlink()
    witness.pickle(vlm / "weights.bin")
    (vlm / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    with refused(witness, f"names weights in '{shard}'; they must be safetensors files beside"):
        load_backbone(str(vlm))


@pytest.mark.parametrize("file", ["controller.safetensors", "controller.json", "config.yaml"])
def test_no_file_of_a_run_is_unpickled(witness, run, file):
    witness.pickle(run / file)
    with refused(witness, "no readable controller|not readable YAML"):
        AdaptiveVLM.from_pretrained(run)


@pytest.mark.parametrize("file", ["adaptive.json", "result.json", "model/model.safetensors", "controller.safetensors"])
def test_no_file_of_a_shared_controller_is_unpickled(witness, saved, file):
    witness.pickle(saved / file)
    with refused(witness, "not readable|could not be loaded|no readable controller"):
        AdaptiveVLM.from_pretrained(saved)


def test_no_other_file_is_unpickled(witness, tmp_path):
    witness.pickle(tmp_path / "file")
    with refused(witness, "no readable latency model"):
        LatencyModel.load(tmp_path / "file")
    with refused(witness, "no readable plan"):
        SearchedOrder.load(tmp_path / "file")
    for name in ("tensors.safetensors", "state.json"):
        save_checkpoint(tmp_path / name, 1, {"w": torch.ones(1)}, {})
        witness.pickle(tmp_path / name / "step-000000001" / name)
        with refused(witness, "checkpoint .* cannot be read"):
            load_checkpoint(tmp_path / name)
    cell = Cell(Arm("full"), 0, tmp_path / "cell")
    cell.folder.mkdir()
    with (cell.folder / "outcomes.npz").open("wb") as file:
        np.savez(file, x=np.array([witness], dtype=object), allow_pickle=True)
    with refused(witness, "outcomes.npz' cannot be read"):
        cell.outcomes()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "saved"])
def test_no_data_are_unpickled(witness, place, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"data.{kind}"
    if kind == "saved":
        shutil.copytree(place / "data", path)
        for file in path.glob("*.arrow"):
            witness.pickle(file)
    else:
        witness.pickle(path)
    with refused(witness, "could not be read", megabytes=2048):
        load_queries(str(path), "test")


def test_checkpoints_of_the_trainer_do_not_run_code(witness, place, tmp_path, monkeypatch):
    """Those of Hugging Face's trainer are read by torch without what could run."""
    import maskgym.training.backbone as train_backbone

    options = f"--data {place / 'data'} --images 2 --questions 1 --warmup 0 --out {tmp_path / 'out'} --validate-every 1"
    tune = f"--backbone {place / 'vlm'} {options}"
    command(monkeypatch, train_backbone.main, *tune.split(), "--steps", 1)
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    config = tmp_path / "out" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 1\n", "steps: 2\n"))
    for name in ("rng_state.pth", "scheduler.pt", "optimizer.pt"):
        witness.pickle(checkpoint / name)
        with pytest.raises(SystemExit):
            command(monkeypatch, train_backbone.main, *tune.split(), "--steps", 2, "--resume")
        assert not witness.path.exists()


# Code


@pytest.mark.parametrize("model_type", ["llava", "mine"])
def test_a_backbone_brings_no_code(witness, vlm, model_type):
    witness.module(vlm / "evil.py")
    names = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    edit(vlm / "config.json", model_type=model_type, auto_map=names)
    with refused(witness, "brings code of its own .auto_map in its config., which is never run"):
        load_backbone(str(vlm))


def test_a_processor_brings_no_code_and_nobody_is_asked(witness, vlm, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    witness.module(vlm / "evil.py")
    edit(vlm / "processor_config.json", processor_class="Mine", auto_map={"AutoProcessor": "evil.Processor"})
    with refused(witness, "could not be loaded .*custom code"):
        load_backbone(str(vlm))


@pytest.mark.parametrize("entry", ["attn_implementation", "text_config__attn_implementation"])
def test_no_kernels_are_fetched(witness, vlm, entry):
    edit(vlm / "config.json", **{entry: "somebody/kernel"})
    with refused(witness, "asks for attention kernels of a repository, 'somebody/kernel'"):
        load_backbone(str(vlm))


@pytest.fixture
def adapters(place, tmp_path):
    """LoRA adapters on the VLM, to spoil."""
    model = get_peft_model(build().model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(place / "vlm")
    model.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def test_plain_adapters_are_merged(place, adapters):
    plain, tuned = (dict(load_backbone(str(where)).model.named_parameters()) for where in (place / "vlm", adapters))
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert plain.keys() == tuned.keys() and changed and all("q_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "adapters of the setting 'megatron_config'"),
        ({"peft_type": "PROMPT_TUNING"}, "adapters of the kind 'PROMPT_TUNING'"),
        ({"r": 10**9}, "has no adapter_model.safetensors that fits"),
        ({"rank_pattern": {"q_proj": 10**9}}, "has no adapter_model.safetensors that fits"),
        ({"base_model_name_or_path": "both"}, "needs adapters within adapters"),
    ],
)
def test_adapters_bring_weights_and_nothing_else(witness, place, adapters, tmp_path, monkeypatch, entries, words):
    monkeypatch.chdir(tmp_path)
    witness.module(tmp_path / "evil.py")
    both = shutil.copytree(place / "vlm", tmp_path / "both")
    shutil.copy(adapters / "adapter_config.json", both)
    edit(adapters / "adapter_config.json", **entries)
    with refused(witness, words):
        load_backbone(str(adapters))
    (adapters / "adapter_model.safetensors").unlink()
    witness.pickle(adapters / "adapter_model.bin")
    with refused(witness, f"{words}|has no adapter_model.safetensors"):
        load_backbone(str(adapters))


def test_hub_repositories_bring_none_either(witness, place, vlm, tmp_path):
    """From a hub on this machine: the same VLM as it is, with code, and with its weights pickled."""
    files = {file.name: file.read_bytes() for file in vlm.iterdir()}
    witness.module(vlm / "evil.py")
    witness.pickle(vlm / "pytorch_model.bin")
    coded = json.dumps({**json.loads(files["config.json"]), "auto_map": {"AutoConfig": "evil.Config"}}).encode()
    pickled = {name: content for name, content in files.items() if name != "model.safetensors"}
    program = """
import sys
from maskgym.backbones import InputError, load_backbone
print(load_backbone("me/plain").layout.tokens)
for place in ("me/coded", "me/pickled"):
    try:
        load_backbone(place)
    except InputError as error:
        print(error)
"""
    with local_hub() as hub:
        hub.files = {
            "me/plain": files,
            "me/coded": {**files, "config.json": coded, "evil.py": (vlm / "evil.py").read_bytes()},
            "me/pickled": {**pickled, "pytorch_model.bin": (vlm / "pytorch_model.bin").read_bytes()},
        }
        address = f"http://127.0.0.1:{hub.server_port}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
            | {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )
    lines = done.stdout.splitlines()
    assert lines[:1] == ["16"], done.stderr
    assert "'me/coded' brings code of its own" in lines[1] and "'me/pickled' could not be loaded" in lines[2]
    assert len(lines) == 3 and not witness.path.exists()


def test_a_benchmark_copy_brings_no_script_and_no_data_from_elsewhere(witness, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    copy, other = tmp_path / "copy", tmp_path / "other"
    for folder in (copy, other):
        folder.mkdir()
        datasets.Dataset.from_dict({"question": ["what?"]}).to_parquet(folder / "test.parquet")
    witness.module(copy / "copy.py")
    with refused(witness, "could not be read .Dataset scripts are no longer supported", megabytes=2048):
        load_queries(f"pope:root={copy}", "test")
    (copy / "copy.py").unlink()
    (copy / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../other/test.parquet\n---\n")
    for data in (f"pope:root={copy}", str(copy)):
        with refused(witness, "its README has data in .*test.parquet', outside of it", megabytes=2048):
            load_queries(data, "test")


def test_a_run_names_no_code(witness, place, tmp_path, monkeypatch):
    """A reward by its dotted path in somebody's config, with the module in the working directory."""
    a_run(tmp_path / "run", place / "vlm", reward=["evil:f"], data=str(place / "data"), seed=1)
    monkeypatch.chdir(tmp_path)
    witness.module(tmp_path / "evil.py")
    options = ["--data", place / "data", "--budgets", 0.7]
    command(monkeypatch, eval_main.main, "run", "run", *options)
    command(monkeypatch, eval_main.main, "audit", "run", *options, "--limit", 4)
    assert AdaptiveVLM.from_pretrained("run").generate(Image.new("RGB", (16, 16)), "what?", 0.7).llm_flops_ratio <= 0.7
    small = "--budgets 0.6 1 --test-budgets 0.6 --envs 8 --rollout-steps 2 --batch-size 8 --total-queries 16"
    own = ["--backbone", place / "vlm", "--data", place / "data", "--width", 8, "--rule", "threshold", *small.split()]
    command(monkeypatch, train_rl.main, *own, "--init-from", "run", "--out", "warm")
    with refused(witness, "names code of its own, the reward 'evil:f'; if it is yours, say so once more: --resume"):
        parse(train_rl.RLConfig, ["--resume", "--out", "run"])
    assert "evil" not in sys.modules and not witness.path.exists()
    resumed = parse(train_rl.RLConfig, ["--resume", "--out", "run", "--reward", "evil:f"])
    assert resumed.reward == ("evil:f",) and resumed.seed == 1


def test_an_experiment_names_no_code(witness, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    witness.module(tmp_path / "evil.py")
    for best in ("evil:f", "fastv:k=2 then evil:f"):
        (tmp_path / "tuning.json").write_text(json.dumps({"best": {"fastv": best}}))
        with refused(witness, "tuning.json' cannot be read .*settings that are not of the grid"):
            Experiment("pruning", tmp_path)._tune(build())


# Places


@pytest.mark.parametrize("name", ["..", "../made", "/etc", "~/vlm", "model/..", "./model", "a/b/c", ".ssh/x", ""])
def test_a_shared_folder_names_no_place_outside(witness, saved, name):
    edit(saved / "adaptive.json", backbone=name)
    with refused(witness, "is neither within it nor on the hub; if you trust that place, name it yourself"):
        AdaptiveVLM.from_pretrained(saved)


def test_a_shared_folder_is_not_left_by_a_link_or_by_adapters(witness, saved, adapters, place):
    shutil.move(saved / "model", saved.parent / "elsewhere")
    (saved / "model").symlink_to(saved.parent / "elsewhere")
    with refused(witness, "is neither within it nor on the hub"):
        AdaptiveVLM.from_pretrained(saved)
    (saved / "model").unlink()
    shutil.copytree(adapters, saved / "model")
    (saved / "config.yaml").write_text(f"backbone: {place / 'vlm'}")  # nor by passing for a run
    with refused(witness, "is neither within it nor on the hub"):
        AdaptiveVLM.from_pretrained(saved)
    assert AdaptiveVLM.from_pretrained(saved, backbone=str(place / "vlm")).name == "saved"


@pytest.mark.parametrize("name", ["/etc", "../..", "/nowhere", ["a"], {"a": 1}, None, 3])
def test_a_run_that_names_another_place_gets_one_line(witness, run, name):
    """Such places are followed, for a user's own runs have them; they are loaded as VLMs, and nothing else."""
    (run / "config.yaml").write_text(json.dumps({"backbone": name}))
    with refused(witness, "could not be read|as backbone; it must be a name or a path"):
        AdaptiveVLM.from_pretrained(run)


def test_a_run_of_a_local_backbone_works_without_a_word(run, capfd):
    """Its config names a folder that is not within the run."""
    assert AdaptiveVLM.from_pretrained(run).backbone.layout.tokens == 16
    assert load_planner(str(run), build(), 0).name == "run"
    assert "vlm" not in capfd.readouterr().err


def resumed(place, run):
    """What resuming somebody's run would write to and remove."""
    config = train_rl.RLConfig(backbone=str(place / "vlm"), data=str(place / "data"), out=run, resume=True)
    return RunFolder.create(run, config, resume=True)


READERS = {
    "config.yaml": lambda run: eval_policies.backbone_of([str(run)], None),
    "controller.json": lambda run: load_planner(str(run), build(), 0),
    "controller.safetensors": lambda run: load_planner(str(run), build(), 0),
    "result.json": AdaptiveVLM.from_pretrained,
    "metrics.jsonl": lambda run: RunFolder(run).metrics(),
    "timing.jsonl": lambda run: RunFolder(run).timing(),
    "model": lambda run: RunFolder(run).backbone(),
}
"""By name of what may lie in a run's folder, what reads it."""


@pytest.fixture
def elsewhere(place, tmp_path):
    """What a run's folder has, in another folder."""
    folder = a_run(tmp_path / "elsewhere", place / "vlm")
    for name, content in (("result.json", "[]"), ("metrics.jsonl", ""), ("timing.jsonl", ""), ("command.txt", "x")):
        (folder / name).write_text(content)
    (folder / "model").mkdir()
    save_checkpoint(folder / "checkpoints", 1, {"w": torch.ones(1)}, {})
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_run_is_not_left_by_a_link_to_be_read(witness, run, elsewhere, name):
    """Though what it leads to could be read. The null: a link to a file within the run, and one to the whole run."""
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(elsewhere / name)
    with refused(witness, f"{name}' is a link out of its folder, to '.*elsewhere/{name}'; put the file itself there"):
        READERS[name](run)
    (run / name).unlink()
    shutil.move(elsewhere / name, run / f"own-{name}")
    (run / name).symlink_to(f"own-{name}")
    (run.parent / "linked").symlink_to(run)
    READERS[name](run.parent / "linked")


@pytest.mark.parametrize("name", [*READERS, "command.txt", "checkpoints", "metrics.jsonl.tmp", "tradeoff.png"])
def test_a_run_is_not_left_by_a_link_to_be_written_to(witness, place, run, elsewhere, name):
    """By a training that is resumed in somebody's folder, which would append, or remove old checkpoints."""
    (elsewhere / name).touch()
    before = snapshot(elsewhere)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(elsewhere / name)
    with refused(witness, f"{name}' is a link out of its folder"):
        resumed(place, run)
    assert snapshot(elsewhere) == before


@pytest.mark.parametrize("name", ["step-000000001", "step-000000001/state.json", ".unfinished"])
def test_checkpoints_are_not_left_by_a_link(witness, place, run, elsewhere, name):
    save_checkpoint(run / "checkpoints", 1, {"w": torch.ones(1)}, {})
    own, theirs = run / "checkpoints" / name, elsewhere / "checkpoints" / name
    theirs.mkdir(exist_ok=True) if name == ".unfinished" else None
    own.rename(run / "moved") if own.exists() else None
    own.symlink_to(theirs)
    with refused(witness, f"{name}' is a link out of its folder"):
        resumed(place, run)


def test_what_the_hubs_cache_holds_is_taken(saved, tmp_path):
    """Of a repository: links to its blobs. The null: the same links elsewhere."""
    blobs, snapshot_of = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    shutil.copytree(saved / "model", snapshot_of / "model")
    blobs.mkdir()
    for number, file in enumerate(path for path in saved.iterdir() if path.is_file()):
        shutil.copy(file, blobs / str(number))
        (snapshot_of / file.name).symlink_to(f"../../blobs/{number}")
    assert AdaptiveVLM.from_pretrained(snapshot_of).records == []
    (tmp_path / "repo" / "snapshots").rename(tmp_path / "repo" / "copies")
    with pytest.raises(InputError, match="is a link out of its folder"):
        AdaptiveVLM.from_pretrained(tmp_path / "repo" / "copies" / "abc")


def test_an_experiment_is_not_left_by_a_link(witness, tmp_path, elsewhere):
    cell = Cell(Arm("full"), 0, tmp_path / "cell")
    cell.run.mkdir(parents=True)
    for file, read in (
        (cell.folder / "records.json", cell.records),
        (cell.folder / "outcomes.npz", cell.outcomes),
        (cell.folder / "failure.txt", cell.failure),
        (cell.run / "command.txt", cell.command),
    ):
        file.symlink_to(elsewhere / "result.json")
        with refused(witness, f"{file.name}' is a link out of its folder"):
            read()
        file.unlink()


# Sizes


def pipe(path):
    os.mkfifo(path)


def socket_file(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


SPECIAL = {"pipe": pipe, "socket": socket_file, "folder": Path.mkdir}


def put_in_place_of(path, special):
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    SPECIAL[special](path)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", ["controller.json", "controller.safetensors", "metrics.jsonl", "timing.jsonl"])
def test_what_is_no_file_is_not_waited_for(witness, run, monkeypatch, name, special):
    monkeypatch.chdir(run)  # names of sockets are short
    put_in_place_of(Path(name), special)
    with refused(witness, f"{name}' cannot be read .* is no regular file|{name} is no regular file"):
        within(60, lambda: READERS[name](run))


@pytest.mark.parametrize("special", SPECIAL)
def test_without_its_file_it_is_no_run_or_one_without_results(witness, run, monkeypatch, special):
    monkeypatch.chdir(run)
    put_in_place_of(Path("result.json"), special)
    assert within(60, lambda: AdaptiveVLM.from_pretrained(run)).records == []
    put_in_place_of(Path("config.yaml"), special)
    with refused(witness, "is neither a run folder"):
        within(60, lambda: AdaptiveVLM.from_pretrained(run))


@pytest.mark.parametrize("special", ["pipe", "socket"])
@pytest.mark.parametrize("name", ["command.txt", "metrics.jsonl", "notes", "checkpoints/step-000000001/state.json"])
def test_what_is_no_file_is_not_resumed_from(witness, place, run, monkeypatch, name, special):
    monkeypatch.chdir(run)
    put_in_place_of(Path(name), special)
    with refused(witness, f"{name}' is no regular file; remove it"):
        within(60, lambda: resumed(place, run))


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(
    "name",
    [
        *("adaptive.json", "controller.json", "controller.safetensors", "model/config.json"),
        *("model/model.safetensors", "model/processor_config.json", "model/tokenizer.json"),
        *("model/tokenizer_config.json", "model/chat_template.jinja"),
    ],
)
def test_what_is_no_file_of_a_shared_folder_is_not_waited_for(witness, saved, monkeypatch, name, special):
    """Refused, or, where it is not needed, left alone."""
    monkeypatch.chdir(saved)
    put_in_place_of(Path(name), special)
    with contextlib.suppress(InputError):
        within(60, lambda: AdaptiveVLM.from_pretrained(saved))
        assert name in ("model/chat_template.jinja", "model/tokenizer_config.json")


@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_no_file_of_an_experiment_is_not_waited_for(witness, tmp_path, monkeypatch, special):
    monkeypatch.chdir(tmp_path)
    cell = Cell(Arm("full"), 0, Path("cell"))
    for file in (cell.folder / "records.json", cell.folder / "outcomes.npz"):
        put_in_place_of(file, special)
    assert not cell.done
    for read in (cell.records, cell.outcomes):
        with refused(witness, "is no regular file"):
            within(60, read)
    for file, read in ((cell.folder / "failure.txt", cell.failure), (cell.run / "command.txt", cell.command)):
        put_in_place_of(file, special)
        assert within(60, read) is None


@pytest.mark.parametrize("entries", [{"width": 10**9}, {"pools": 10**12}, {"text_tokens": 10**30}, {"width": "48"}])
def test_a_controller_takes_no_memory_that_its_weights_do_not_fill(witness, run, entries):
    edit(run / "controller.json", **entries)
    with refused(witness, "do not fit controller.json|no readable controller"):
        AdaptiveVLM.from_pretrained(run)


def test_headers_are_not_believed(witness, run, place):
    weights = run / "controller.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for content in ((2**60).to_bytes(8, "little") + b"{}", len(header).to_bytes(8, "little") + header):
        weights.write_bytes(content)
        with refused(witness, "no readable controller"):
            AdaptiveVLM.from_pretrained(run)


@pytest.mark.parametrize(
    "entry", ["text_config__vocab_size", "text_config__num_hidden_layers", "vision_config__image_size"]
)
def test_a_backbone_takes_no_memory_that_its_weights_do_not_fill(witness, vlm, entry):
    edit(vlm / "config.json", **{entry: 10**8})
    with refused(witness, "claims a larger model in its config than its weights are"):
        load_backbone(str(vlm))


@pytest.mark.parametrize("content", [DEEP, "{" * 10, ALIASES, MERGES, "a: 1\n" * 100_000, "- " * 20_000])
def test_configs_without_end_are_refused(witness, run, content):
    (run / "config.yaml").write_text(content)
    with refused(witness, "not readable YAML|has YAML aliases|has more than 64 kB|must hold a mapping"):
        RunFolder(run).config()


@pytest.mark.parametrize("file", ["adaptive.json", "result.json", "controller.json"])
def test_json_without_end_is_refused(witness, saved, file):
    (saved / file).write_text(DEEP)
    with refused(witness, "nested too deeply"):
        AdaptiveVLM.from_pretrained(saved)
    os.truncate(saved / file, 2**40)  # a hole: it takes no room here
    with refused(witness, "has more than 64 MB"):
        AdaptiveVLM.from_pretrained(saved)


def test_what_would_be_waited_for_is_refused(witness, run):
    (run / "controller.json").unlink()
    os.mkfifo(run / "controller.json")
    with refused(witness, "controller.json is no regular file"):
        AdaptiveVLM.from_pretrained(run)


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 12_000), (2**31 - 1, 1)])
def test_pictures_that_claim_any_size_are_not_decoded(witness, tmp_path, size):
    (tmp_path / "large.png").write_bytes(claimed_png(*size))
    with refused(witness, "image large.png", megabytes=64, seconds=1):
        read_image(tmp_path / "large.png", "image large.png")


def test_pictures_that_other_programs_would_draw_are_not_decoded(witness, tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.format == "EPS"  # Pillow itself would start Ghostscript
    with refused(witness, "cannot be decoded"):
        read_image(tmp_path / "a.png", "image a.png")


def packed(*members, **how):
    """An ``npz`` file of some members."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **how) as opened:
        for name, own in members:
            opened.writestr(name, own)
    return content.getvalue()


def column(shape="(3,)", dtype="<f4", values=bytes(12)):
    """A file of NumPy's with a header of one's own."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values


NAME = "accuracy@0.5.npy"
DEFLATED = {"compression": zipfile.ZIP_DEFLATED}
OUTCOMES = {
    "a bomb": (packed((NAME, column("(67108864,)", values=bytes(2**28))), **DEFLATED), "unpacks to more than 64 MB"),
    "many bombs": (packed(*((f"{n}.npy", bytes(2**25)) for n in range(3)), **DEFLATED), "unpacks to more than 64 MB"),
    "a bomb of another kind": (packed((NAME, bytes(2**25)), compression=zipfile.ZIP_LZMA), "is not NumPy's"),
    "more rows than there are": (packed((NAME, column("(1099511627776,)"))), "not a column of numbers"),
    "fewer rows": (packed((NAME, column("(2,)"))), "not a column of numbers"),
    "rows below zero": (packed((NAME, column("(-3,)"))), "not a column of numbers"),
    "two axes": (packed((NAME, column("(3, 1)"))), "not a column of numbers"),
    "no axis": (packed((NAME, column("()", values=bytes(4)))), "not a column of numbers"),
    "integers": (packed((NAME, column(dtype="<i4"))), "not a column of numbers"),
    "texts": (packed((NAME, column(dtype="<U1"))), "not a column of numbers"),
    "objects": (packed((NAME, column(dtype="|O", values=bytes(24)))), "not a column of numbers"),
    "rows of text": (packed((NAME, column("('a',)"))), "cannot be read"),
    "a header that is code": (packed((NAME, column("__import__('os').getcwd()"))), "cannot be read"),
    "a header without end": (packed((NAME, b"\x93NUMPY\x02\x00" + b"\xff" * 4)), "cannot be read"),
    "another version": (packed((NAME, b"\x93NUMPY\x09\x00" + bytes(64))), "cannot be read"),
    "no array": (packed((NAME, b"text")), "cannot be read"),
    "no values": (packed((NAME, column(values=b""))), "not a column of numbers"),
    "values spoilt": (packed((NAME, column())).replace(column(), column(values=b"x" * 12)), "Bad CRC-32"),
    "another column": (packed(("kept@0.5.npy", column())), "accuracy at 0.5 is not 3 finite numbers"),
    "not finite": (packed((NAME, column(values=b"\xff" * 12))), "accuracy at 0.5 is not 3 finite numbers"),
    "other rows": (packed((NAME, column("(2,)", values=bytes(8)))), "accuracy at 0.5 is not 3 finite numbers"),
    "no zip": (b"PK\x03\x04", "cannot be read"),
    "nothing": (b"", "cannot be read"),
}


@pytest.fixture
def cell(tmp_path):
    """One that is done, with a record of three queries."""
    made = Cell(Arm("full"), 0, tmp_path / "cell")
    made.folder.mkdir()
    record = {**dict.fromkeys(MEASURED, 0.5), "n": 3, "budgeted": True}
    (made.folder / "records.json").write_text(json.dumps([record]))
    return made


def test_outcomes_that_are_whole_are_read(cell):
    (cell.folder / "outcomes.npz").write_bytes(packed((NAME, column()), ("llm_flops_ratio@0.5.npy", column())))
    assert {name: own.tolist() for name, own in cell.outcomes().items()} == dict.fromkeys(
        ("accuracy@0.5", "llm_flops_ratio@0.5"), [0.0] * 3
    )
    np.savez_compressed(cell.folder / "outcomes.npz", **{f"{name}@0.5": np.ones(3) for name in KEPT_COLUMNS})
    assert all(own.tolist() == [1.0] * 3 for own in cell.outcomes().values())


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes_are_held_against_what_they_claim(witness, cell, name):
    content, words = OUTCOMES[name]
    (cell.folder / "outcomes.npz").write_bytes(content)
    with refused(witness, "outcomes.npz' cannot be read", megabytes=256) as caught:
        cell.outcomes()
    assert words in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(witness, cell):
    (cell.folder / "outcomes.npz").touch()
    os.truncate(cell.folder / "outcomes.npz", 2**40)
    with refused(witness, "has more than 64 MB"):
        cell.outcomes()
