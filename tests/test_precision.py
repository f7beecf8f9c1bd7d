"""Trainings and evaluations of a VLM in float32, bfloat16 and float16, also on CUDA.

Tolerances. Of losses and likelihoods: 5 % in bfloat16, 1 % in float16. Of gradients: a cosine to those in float32 of at
least 0.98 and 0.999.
"""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import maskgym.eval.__main__ as eval_main
import maskgym.training.backbone as train_backbone
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym import AdaptiveVLM
from maskgym.backbones import Backbone, EncodingBank, InputError, load_backbone
from maskgym.backbones.executed import executed_answer_logits
from maskgym.backbones.loading.load import own_dtype
from maskgym.backbones.shared_prefix import answer_logits
from maskgym.backbones.soft_decoder import Gates, soft_answer_logits
from maskgym.envs.core import MaskingCore
from maskgym.policies.controller.decisions import Decider
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.relaxation.training import RelaxationSettings, RelaxedBatch, RelaxedLearner
from maskgym.training import elastic
from maskgym.training.joint_tuning import JointTuning
from maskgym.training.loss_scale import LossScale, check_scale
from tests.conftest import build, command, random_masks, slow_but
from tests.fake_cuda import fake_cuda

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LOSSES = {"bfloat16": 0.05, "float16": 0.01}
COSINES = {"bfloat16": 0.98, "float16": 0.999}

SHORT = "--budgets 0.6 1 --test-budgets 0.6 --batch-size 8 --test-queries 4 --validate-queries 4 --total-queries"
RL, GUMBEL = f"{SHORT} 8 --envs 8 --rollout-steps 2", f"{SHORT} 8"
ELASTIC = "--steps 2 --plain-share 0.5 --images 4 --questions 2 --validate-every 2 --warmup 1 --learning-rate 1e-3"
TRAININGS = {
    "rl": (train_rl, RL),
    "rl, lora": (train_rl, f"{RL} --tune-backbone lora"),
    "rl, full": (train_rl, f"{RL} --tune-backbone full"),
    **{name: (train_gumbel, f"{GUMBEL} --estimator {name}") for name in ("soft-topk", "adallava-l", "adallava-h")},
    "gumbel": (train_gumbel, f"{GUMBEL} --distillation 0.5"),
    "gumbel, lora": (train_gumbel, f"{GUMBEL} --tune-backbone lora"),
    "gumbel, full": (train_gumbel, f"{GUMBEL} --tune-backbone full"),
    "backbone, lora": (train_backbone, f"{ELASTIC} --lora-rank 4"),
    "backbone, full": (train_backbone, ELASTIC),
    "backbone, scratch": (train_backbone, f"{ELASTIC} --vision-steps 2 --vision-images 4 --backbone scratch"),
}
"""Every training, for an update or two."""

FAST = ["float16 gumbel, lora"]


def train(monkeypatch, place, out, name, *more):
    script, options = TRAININGS[name]
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", out]
    command(monkeypatch, script.main, *where, *options.split(), *more)


def in_type(dtype: torch.dtype, **options) -> Backbone:
    """The random-weight LLaVA of the tests, its weights rounded."""
    backbone = build(**options)
    for weight in backbone.model.parameters():  # buffers, the rotary frequencies, stay in float32, as in a loaded model
        weight.data = weight.data.to(dtype)
    return Backbone(backbone.family, backbone.name)


@pytest.mark.parametrize("dtype_name", slow_but(FAST, [f"{dtype} {name}" for dtype in NARROW for name in TRAININGS]))
def test_every_training_runs_in_a_narrow_type(monkeypatch, place, tmp_path, dtype_name):
    """On the CPU. What learns is kept in float32; a model that learnt is saved in the type asked for."""
    (dtype, _, name), out = dtype_name.partition(" "), tmp_path / "run"
    train(monkeypatch, place, out, name, "--dtype", dtype)
    assert yaml.safe_load((out / "config.yaml").read_text())["dtype"] == dtype
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = [value for line in metrics for value in line.values() if isinstance(value, float)]
    assert numbers and np.isfinite(numbers).all()
    if (out / "controller.safetensors").exists():
        weights = load_file(out / "controller.safetensors")
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    if (out / "model").exists():
        (file,) = (out / "model").glob("*model.safetensors")
        kept = torch.float32 if file.name.startswith("adapter") else NARROW[dtype]
        weights = load_file(file)
        assert {value.dtype for value in weights.values()} == {kept}
        if kept == torch.float32:
            assert all(value.any() for name, value in weights.items() if "lora_B" in name), "they begin as zeros"
        assert load_backbone(str(out / "model"), NARROW[dtype]).model.dtype == NARROW[dtype]


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize("name", slow_but([], TRAININGS))
def test_every_training_runs_on_cuda(monkeypatch, place, tmp_path, name):
    """In bfloat16: no update mixes tensors of two devices."""
    with fake_cuda():
        train(monkeypatch, place, tmp_path / "run", name, "--dtype", "bfloat16", "--device", "cuda")


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize(
    ("name", "what", "where"),
    [
        ("soft-topk", Backbone, "full_llm_flops"),
        pytest.param("rl", Backbone, "full_llm_flops", marks=pytest.mark.slow),
        pytest.param("backbone, full", elastic, "answer_logits", marks=pytest.mark.slow),
    ],
)
def test_a_tensor_on_another_device_is_found(monkeypatch, place, tmp_path, name, what, where):
    """The null of the test above."""
    right = getattr(what, where)

    def elsewhere(*arguments):
        return right(*arguments).cpu()

    monkeypatch.setattr(what, where, elsewhere)
    with fake_cuda(), pytest.raises(RuntimeError, match="same device"):
        train(monkeypatch, place, tmp_path / "run", name, "--dtype", "bfloat16", "--device", "cuda")


@pytest.mark.parametrize("dtype", NARROW)
def test_every_evaluation_runs_in_a_narrow_type(monkeypatch, desk, tmp_path, capsys, dtype):
    where = ["--data", desk["data"], "--dtype", dtype]
    out = ["--json", tmp_path / "records.json"]
    command(monkeypatch, eval_main.main, "run", desk["run"], "full", "--budgets", "0.7", *where, *out)
    records = json.loads((tmp_path / "records.json").read_text())
    assert len(records) == 2 and all(record["budget_violations"] == 0 for record in records)
    brief = ["--queries", "2", "--repeats", "1", "--backbone", desk["vlm"]]
    command(monkeypatch, eval_main.main, "latency", "full", *brief, *where)
    assert "| full" in capsys.readouterr().out
    vlm = AdaptiveVLM.from_pretrained(desk["run"], dtype=NARROW[dtype])
    query = EncodingBank(vlm.backbone, MaskingCore(vlm.backbone, str(desk["data"])).source).source[0]
    assert vlm.backbone.model.dtype == NARROW[dtype]
    assert vlm.generate(query.image, query.question, budget=0.8).llm_flops_ratio <= 0.8


@pytest.mark.parametrize("dtype", NARROW)
def test_what_agents_see_is_float32(source, dtype):
    core = MaskingCore(in_type(NARROW[dtype]), source, observation="features")
    seen = core.observe(np.array([0, 1]), np.ones(2, np.float32))
    assert seen["visual"].dtype == seen["text"].dtype == np.float32 and seen["text"].any()


def answered(backbone, source, rows=8):
    """Queries, their answers' ids, and both as prompts that are answered."""
    bank = EncodingBank(backbone, source)
    answers = [backbone.answer_ids(source.text(number)[2][0]) for number in range(rows)]
    return bank, answers, bank.gather(range(rows), answers)


@pytest.mark.parametrize("how", ["executed", "relaxed", "shared"])
@pytest.mark.parametrize("dtype", NARROW)
def test_probabilities_of_answers_are_of_float32(source, dtype, how):
    """They sum to one as closely as float32 can. The null: the same logits in the VLM's own type do not."""
    backbone = in_type(NARROW[dtype])
    _, answers, encoding = answered(backbone, source)
    masks = backbone.full(encoding)
    with torch.no_grad():
        if how == "executed":
            logits_TV = executed_answer_logits(backbone, encoding, masks, answers)
        elif how == "relaxed":
            logits_TV = soft_answer_logits(backbone, encoding, Gates.of(masks), answers)
        else:
            images = backbone.encode_images([source[number].image for number in range(2)])
            questions = [[source.text(number)[1]] for number in range(2)]
            logits_TV = answer_logits(backbone, images, questions, [[ids] for ids in answers[:2]])
    likelihoods = logits_TV.log_softmax(-1)
    assert likelihoods.dtype == torch.float32 and (likelihoods.exp().sum(-1) - 1).abs().max() < 1e-5
    narrow = logits_TV.to(NARROW[dtype]).log_softmax(-1).float()
    assert (narrow.exp().sum(-1) - 1).abs().max() > 1e-4


def controller_loss(backbone, source):
    """Loss and gradient of a soft top-k controller, for the same queries and the same noise."""
    bank, answers, encoding = answered(backbone, source)
    torch.manual_seed(0)
    controller = TwoLevelController(ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=16))
    learner = RelaxedLearner(Decider(controller, backbone), RelaxationSettings("soft-topk", (1.0, 0.2), noise=1.0))
    budgets_B = torch.linspace(0.6, 0.9, 8, dtype=torch.float64)
    loss = learner.losses(RelaxedBatch(bank.gather(range(8)), encoding, answers, budgets_B), 0.5)["answer"]
    loss.backward()
    return loss.item(), torch.cat([part.grad.flatten() for part in controller.parameters() if part.grad is not None])


def adapter_loss(backbone, source):
    """The same of LoRA adapters that are not zero, under random plans."""
    _, answers, encoding = answered(backbone, source)
    torch.manual_seed(0)
    tuning = JointTuning(backbone, "lora", 1e-3)
    for name, weight in tuning.weights.items():
        assert weight.dtype == torch.float32
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    logits_TV = executed_answer_logits(backbone, encoding, random_masks(backbone, 8), answers)
    end = backbone.processor.tokenizer.eos_token_id
    loss = torch.nn.functional.cross_entropy(logits_TV, torch.tensor([id for ids in answers for id in [*ids, end]]))
    loss.backward()
    return loss.item(), torch.cat([part.grad.flatten() for part in tuning.weights.values() if part.grad is not None])


@pytest.mark.parametrize("of", [controller_loss, adapter_loss])
def test_losses_and_gradients_stay_near_float32(source, of):
    """The null: other weights' are not within the tolerances."""
    loss, gradient = of(build(), source)
    for name, dtype in NARROW.items():
        near, near_gradient = of(in_type(dtype), source)
        assert near_gradient.dtype == torch.float32
        assert abs(near - loss) / loss < LOSSES[name]
        assert torch.cosine_similarity(near_gradient, gradient, dim=0) > COSINES[name]
    assert torch.cosine_similarity(of(build(seed=1), source)[1], gradient, dim=0) < min(COSINES.values())


@pytest.mark.parametrize(
    "dtype_way",
    slow_but(
        ["bfloat16 lora"],
        [f"{dtype} {way}" for dtype in ("float32", *NARROW) for way in ("lora", "full")],
    ),
)
def test_a_tuned_backbone_learns_saves_and_goes_on(source, place, tmp_path, dtype_way):
    """By steps that a narrow weight would round away; a copy that takes up the checkpoint does the same."""
    dtype, way = dtype_way.split()
    kind = getattr(torch, dtype)
    backbone, other = in_type(kind), in_type(kind)
    bank, numbers = EncodingBank(backbone, source), list(range(8))
    tuning = JointTuning(backbone, way, 3e-3)
    masks = random_masks(backbone, 8, keep=0.9)
    losses = [tuning.learn(bank, numbers, masks, 0.0) for _ in range(12)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert {weight.dtype for weight in tuning.masters.values()} == {torch.float32}
    assert all(torch.equal(weight, tuning.masters[name].to(weight.dtype)) for name, weight in tuning.weights.items())
    resumed = JointTuning(other, way, 3e-3)
    resumed.restore(tuning.tensors())
    pairs = ((tuning, bank), (resumed, EncodingBank(other, source)))
    after = [each.learn(own, numbers, masks, 0.5) for each, own in pairs]
    assert after[0] == after[1]
    backbone.name = str(place / "vlm")
    tuning.save(tmp_path / "model")
    loaded = load_backbone(str(tmp_path / "model"), kind)
    encoding = bank.gather(numbers)
    assert torch.equal(*(each.prefill(encoding, masks)[0] for each in (backbone, loaded)))


def test_small_steps_are_not_rounded_away(source):
    """A hundredth of what bfloat16 tells apart, kept. The null: added to a weight itself it is lost."""
    backbone = in_type(torch.bfloat16)
    tuning = JointTuning(backbone, "full", 1e-5)
    before = {name: weight.detach().clone() for name, weight in tuning.weights.items()}
    for _ in range(3):
        for weight in tuning.weights.values():
            weight.grad = torch.ones_like(weight)
        tuning.step(0.0, LossScale(backbone))
    moved = [(tuning.masters[name] - before[name].float()).abs() for name in before]
    assert all(torch.allclose(each, torch.full_like(each, 3e-5), rtol=0.01) for each in moved)
    large = before["model.language_model.norm.weight"]
    assert torch.equal(large - 1e-5, large) and torch.equal(tuning.weights["model.language_model.norm.weight"], large)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_too_small_for_float16_arrive(dtype):
    """In float32 nothing is scaled."""
    backbone = in_type(getattr(torch, dtype))
    scale, weight = LossScale(backbone), torch.nn.Parameter(torch.zeros(4))
    factor = torch.tensor(2.0**-20)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    hidden = weight.to(backbone.model.dtype)
    scale.backward((hidden.float() * factor * 2.0**-6).sum())
    scale.step(optimizer, [weight], most=1e9)
    assert torch.equal(weight.detach(), torch.full((4,), -(2.0**-26)))
    scale.update(lambda: "here")
    assert bool(scale.tensors()) == (dtype == "float16")


def test_a_gradient_beyond_float16_is_left_out_and_then_named():
    backbone = in_type(torch.float16)
    scale, weight = LossScale(backbone), torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(factor):
        optimizer.zero_grad()
        scale.backward((weight.half().float() * factor).sum())
        scale.step(optimizer, [weight])
        scale.update(lambda: "here")

    step(1e3)  # 1,024 times as much is beyond 65,504
    assert not weight.any()
    kept = LossScale(backbone)
    kept.restore(scale.tensors())
    assert kept.scaler.get_scale() == scale.scaler.get_scale() == 512
    for _ in range(5):
        step(1e3)
    assert weight.all(), "once the factor has fallen"
    with pytest.raises(InputError, match="gradients are not finite here, and halving the loss has not helped"):
        for _ in range(20):
            step(torch.inf)
    check_scale(torch.amp.GradScaler("cpu", enabled=False), lambda: "nowhere")


@pytest.mark.parametrize("dtype", NARROW.values())
def test_plans_run_under_autocast(backbone, source, dtype):
    """As trainings of whole VLMs run them: weights in float32, products in a narrow type. The null: no autocast."""
    encoding = EncodingBank(backbone, source).gather(range(8))
    masks = backbone.restrict(encoding, random_masks(backbone, 8))
    with torch.no_grad():
        exact_BV = backbone.prefill(encoding, masks)[0]
        with torch.autocast("cpu", dtype):
            near_BV = backbone.prefill(encoding, masks)[0]
    off = (near_BV.float() - exact_BV).abs().max() / exact_BV.std()
    assert 0 < off < (0.2 if dtype == torch.bfloat16 else 0.03)


@pytest.fixture(scope="module")
def saved(place, tmp_path_factory):
    """The VLM of ``place``, saved in several types, and with a config that names none."""
    folders = {"float32": place / "vlm"}
    for name in ("bfloat16", "float16", "none"):
        folders[name] = folder = tmp_path_factory.mktemp(name)
        vlm = load_backbone(str(place / "vlm"), NARROW.get(name, torch.float32))
        vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
    file = folders["none"] / "config.json"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if '"dtype"' not in line))
    return folders


@pytest.mark.parametrize(
    ("name", "on_cuda"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("none", "bfloat16")],
)
def test_the_type_is_the_checkpoints_own_on_cuda_and_float32_on_the_cpu(saved, name, on_cuda):
    where = str(saved[name])
    assert load_backbone(where).model.dtype == own_dtype(where, "cpu") == torch.float32
    with fake_cuda():
        assert own_dtype(where, "cuda") == getattr(torch, on_cuda)
        assert load_backbone(where, device="cuda").model.dtype == getattr(torch, on_cuda)
        assert load_backbone(where, torch.float16, "cuda").model.dtype == torch.float16


def test_embedded_vlms_stay_float32_on_cuda():
    with fake_cuda():
        assert own_dtype("tiny", "cuda") == torch.float32


@pytest.mark.parametrize("script", [train_rl, train_gumbel, train_backbone])
def test_a_run_says_which_type_was_chosen(monkeypatch, saved, place, tmp_path, script):
    """In its config, and not ``auto``, which would be another where it is resumed."""
    seen = []

    class Seen(Exception):
        pass

    def begun(path, config, resume=False):
        seen.append(config.dtype)
        raise Seen

    monkeypatch.setattr(script.RunFolder, "begun", begun)
    where = ["--backbone", saved["bfloat16"], "--data", place / "data", "--out", tmp_path / "run"]
    for device in ("cuda", "cpu"):
        with fake_cuda(), pytest.raises(Seen):
            command(monkeypatch, script.main, *where, "--device", device)
    assert seen == ["bfloat16", "float32"]
