"""The two-level policy and its mathematics."""

import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from maskgym.backbones import Backbone, EncodingBank, InputError, MaskLayout
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.plans.masks import AXES
from maskgym.backbones.tiny.build import build_tiny
from maskgym.envs import MaskingCore, MaskingVecEnv
from maskgym.policies.controller.decisions import Decider
from maskgym.policies.controller.learned import ControllerPlanner, load_controller, save_controller
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planning.projection import budget_flops
from maskgym.policies.ppo.group_buffer import GroupRolloutBuffer
from maskgym.policies.ppo.sb3_policy import RATIOS, FittedVecEnv, TwoLevelPolicy, ratio_sizes
from tests.conftest import WORDS, build_of, make_dataset


def make_ppo(
    backbone,
    source,
    envs=8,
    reward="accuracy-flops",
    fitted=True,
    plans_per_query=1,
    ratios="joint",
    rule="threshold",
    **more,
):
    core = MaskingCore(backbone, source, budgets=(0.6, 1.0), reward=reward)
    env = MaskingVecEnv(core, envs, plans_per_query)
    venv = FittedVecEnv(env) if fitted else env
    model = PPO(
        TwoLevelPolicy,
        venv,
        policy_kwargs={
            "bank": core.bank,
            "controller": ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=16, rule=rule),
            "ratios": ratios,
        },
        rollout_buffer_class=GroupRolloutBuffer,
        rollout_buffer_kwargs={
            "plans_per_query": plans_per_query,
            "ratios": len(ratio_sizes(ratios, backbone.layout)),
        },
        **{"n_steps": 4, "batch_size": 8, "n_epochs": 2, "seed": 0, **more},
    )
    if fitted:
        venv.policy = model.policy
    return model


@pytest.fixture(scope="module")
def smallest():
    """A backbone of 4 tokens, 2 layers, 2 heads, nothing protected: 10 bits, 1,024 actions."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden": 16, "layers": 2, "heads": 2, "intermediate": 16}
    model, processor = build_tiny(WORDS, **sizes, vision_hidden=16, vision_layers=1)
    return Backbone(LlavaFamily(model.requires_grad_(False), processor), "smallest", protected_layers=())


def decider_of(backbone, seed=0, rule="threshold", axes=AXES):
    torch.manual_seed(seed)
    config = ControllerConfig.for_layout(
        backbone.layout, backbone.hidden, width=8, initial_logit=0.0, rule=rule, axes=axes
    )
    controller = TwoLevelController(config)
    for parameter in controller.parameters():  # far from uniform, so that conditioning matters
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    return Decider(controller, backbone)


def every_action(layout):
    return torch.tensor(list(itertools.product((False, True), repeat=layout.size)))


def log_probs(decider, encoding, budget, bits):
    repeated = encoding.rows(torch.zeros(len(bits), dtype=torch.long))
    budgets = torch.full((len(bits),), budget)
    with torch.no_grad():
        return decider.review(decider.read(repeated, budgets), bits).log_prob()


@pytest.mark.parametrize("rule", ["threshold", "fill"])
def test_joint_probabilities_sum_to_one_over_all_actions(smallest, rule):
    decider = decider_of(smallest, rule=rule)
    encoding = EncodingBank(smallest, some_queries()).gather([0])
    total = log_probs(decider, encoding, 0.6, every_action(smallest.layout)).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


def some_queries():
    from maskgym.envs.data.queries import DatasetQueries

    return DatasetQueries(make_dataset(4), "made", "train")


@pytest.mark.parametrize("rule", ["threshold", "fill"])
def test_sampled_frequencies_match_the_joint_probabilities(smallest, rule):
    decider = decider_of(smallest, rule=rule)
    draws = 40_000
    encoding = EncodingBank(smallest, some_queries()).gather([0]).rows(torch.zeros(draws, dtype=torch.long))
    budgets = torch.full((draws,), 0.6)
    torch.manual_seed(1)
    with torch.no_grad():
        decisions = decider.decide(decider.read(encoding, budgets), sample=True)
    powers = 2 ** torch.arange(smallest.layout.size - 1, -1, -1)
    counts = torch.bincount((decisions.bits_BA * powers).sum(1), minlength=1024) / draws
    exact = log_probs(decider, encoding.rows(torch.tensor([0])), 0.6, every_action(smallest.layout)).exp()
    # total variation of 40,000 draws from 1,024 outcomes is about sum sqrt(p / n) / 2.5
    expected = float((exact.sqrt() / math.sqrt(draws)).sum() / 2.5)
    assert float((counts - exact).abs().sum() / 2) < 1.3 * expected
    shuffled = exact[torch.randperm(1024, generator=torch.Generator().manual_seed(0))]
    assert float((counts - shuffled).abs().sum() / 2) > 3 * expected, "a wrong distribution would pass too"


@pytest.mark.parametrize("axes", [AXES, ("tokens",)])
def test_filling_plans_spend_their_budgets_in_the_mean(smallest, axes):
    decider = decider_of(smallest, rule="fill", axes=axes)
    budget = 0.7 if axes == AXES else 0.9
    encoding = EncodingBank(smallest, some_queries()).gather([0]).rows(torch.zeros(4000, dtype=torch.long))
    budgets = torch.full((4000,), budget, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        read = decider.read(encoding, budgets)
        decisions = decider.decide(read, sample=True)
        plans = decider.fit(read, decider.decide(read, sample=False))
    full = smallest.full_llm_flops(encoding)
    flops = decider.controller_flops(encoding)
    sampled = smallest.cost(encoding, smallest.layout.unflatten(decisions.bits_BA), flops).llm / full
    used = smallest.cost(encoding, plans, flops).llm / full
    assert abs(float(sampled.mean()) - budget) < 0.02
    assert (used <= budget).all() and float(used.mean()) > budget - 0.2


@pytest.mark.parametrize("rule", ["threshold", "fill"])
@pytest.mark.parametrize("axes", [AXES, ("tokens",), ("heads", "layers")])
def test_a_plan_is_the_most_confident_decision_in_its_budget(small, source, rule, axes):
    """Though the shift of the last level is not sought for it."""
    decider = decider_of(small, rule=rule, axes=axes)
    encoding = EncodingBank(small, source).gather(list(range(8)))
    torch.manual_seed(0)
    torch.nn.init.normal_(decider.controller.llm_head.weight)
    plans = []
    for budget in (0.6, 0.8, 0.95):
        read = decider.read(encoding, torch.full((8,), budget, dtype=torch.float64))
        with torch.no_grad():
            plans.append(small.layout.flatten(decider.plan(read)))
            decided = decider.fit(read, decider.decide(read, sample=False))
        assert torch.equal(plans[-1], small.layout.flatten(decided))
    assert not torch.equal(plans[0], plans[-1]), "the budget decides nothing"


def test_a_transition_on_the_layout_of_llava_takes_at_most_four_kibibytes(small, source):
    """1,632 bits: 576 visual tokens, 32 layers of 32 heads. Null: SB3's own buffer, with as many bytes a bit as the
    space's type."""
    layout = MaskLayout(576, 32, 32)
    core = MaskingCore(small, source)
    actions = spaces.MultiDiscrete(np.full(layout.size, 2))
    sizes = {}
    for kind in (GroupRolloutBuffer, DictRolloutBuffer):
        buffer = kind(8, core.observation_space, actions, n_envs=16)
        arrays = [part for part in vars(buffer).values() if isinstance(part, np.ndarray)]
        arrays += buffer.observations.values()
        sizes[kind] = sum(part.nbytes for part in arrays) / (8 * 16)
    assert layout.size == 1632 and core.action_space.dtype == actions.dtype
    assert sizes[GroupRolloutBuffer] <= 2048 < 4096 < sizes[DictRolloutBuffer]


def test_second_level_is_conditioned_on_the_first(smallest):
    decider = decider_of(smallest)
    encoding = EncodingBank(smallest, some_queries()).gather([0, 0])
    budgets = torch.full((2,), 0.6)
    bits = torch.ones(2, smallest.layout.size, dtype=torch.bool)
    bits[1, :3] = False
    with torch.no_grad():
        logits = decider.review(decider.read(encoding, budgets), bits).logits_BA
    assert torch.equal(logits[0, smallest.layout.level1], logits[1, smallest.layout.level1])
    assert (logits[0, smallest.layout.level2] - logits[1, smallest.layout.level2]).abs().min() > 1e-4


def test_entropy_of_a_level_against_enumeration(smallest):
    decider = decider_of(smallest)
    encoding = EncodingBank(smallest, some_queries()).gather([0])
    budgets = torch.tensor([0.6])
    with torch.no_grad():
        decisions = decider.decide(decider.read(encoding, budgets), sample=False)
    p = decisions.logits_BA.sigmoid()
    by_hand = -(p * p.log() + (1 - p) * (1 - p).log()).sum(1)
    assert torch.allclose(decisions.entropy(), by_hand, atol=1e-5)


def test_protected_units_are_no_decisions(small, source):
    decider = decider_of(small)
    encoding = EncodingBank(small, source).gather([0, 1])
    budgets = torch.tensor([0.6, 0.9])
    with torch.no_grad():
        decisions = decider.decide(decider.read(encoding, budgets), sample=True)
    protected = small.layout.protected()
    assert decisions.bits_BA[:, protected].all()
    changed = type(decisions)(decisions.logits_BA + 3.0 * protected, decisions.bits_BA, decisions.free_BA)
    assert torch.equal(changed.log_prob(), decisions.log_prob())
    assert torch.equal(changed.entropy(), decisions.entropy())


@pytest.mark.parametrize("ratios", RATIOS)
def test_forward_and_evaluate_actions_agree(small, source, ratios):
    model = make_ppo(small, source, ratios=ratios)
    obs, _ = model.policy.obs_to_tensor(model.env.reset())
    with torch.no_grad():
        actions, values, log_prob = model.policy(obs)
        values_again, log_prob_again, entropy = model.policy.evaluate_actions(obs, actions.float())
    assert actions.shape == (8, small.layout.size) and actions.dtype == torch.int8
    assert torch.allclose(values, values_again) and torch.allclose(log_prob, log_prob_again, atol=1e-5)
    assert torch.allclose(values, model.policy.predict_values(obs))
    assert ((entropy > 0) & (entropy < math.log(2) + 1e-6)).all()


class Watch(BaseCallback):
    """Looks at the buffer after a rollout, and before the update at the first ratio."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        self.advantages, self.rewards, self.values = buffer.advantages, buffer.rewards, buffer.values.copy()
        self.actions, (_, self.executed) = buffer.actions.copy(), self.model.env.executed
        observations = {name: torch.as_tensor(value[0]) for name, value in buffer.observations.items()}
        with torch.no_grad():
            _, log_prob, _ = self.model.policy.evaluate_actions(observations, torch.as_tensor(buffer.actions[0]))
        self.ratio = (log_prob - torch.as_tensor(buffer.log_probs[0])).exp()


@pytest.mark.parametrize("ratios", RATIOS)
def test_first_ratio_is_one_and_advantage_is_reward_minus_value(small, source, ratios):
    model = make_ppo(small, source, ratios=ratios)
    watch = Watch()
    model.learn(32, watch)
    count = {"joint": 1, "level": 2, "axis": 3, "bit": small.layout.size}[ratios]
    assert torch.allclose(watch.ratio, torch.ones(8, count), atol=1e-5)
    assert np.allclose(watch.advantages, watch.rewards - watch.values, atol=1e-6)
    assert watch.actions.dtype == np.int8
    assert (watch.actions[-1] != watch.executed).any(), "the buffer must hold what was sampled, not what was executed"


def test_executed_plans_fit_while_sampled_ones_may_not(small, source):
    model = make_ppo(small, source, envs=64)
    observation = model.env.reset()
    obs, _ = model.policy.obs_to_tensor(observation)
    with torch.no_grad():
        actions, _, _ = model.policy(obs)
        predicted, _ = model.policy.predict({name: value.numpy() for name, value in obs.items()}, deterministic=True)
    encoding = model.policy.bank.gather(obs["query"][:, 0].long())
    limits = budget_flops(obs["budget"][:, 0], small.full_llm_flops(encoding))
    charge = model.policy.decider.controller_flops(encoding)

    def spent(bits):
        return small.cost(encoding, small.layout.unflatten(torch.as_tensor(bits).bool()), charge).llm

    assert (spent(actions) > limits).any()
    assert (spent(model.policy.fitted(observation, actions.numpy())) <= limits).all()
    assert (spent(predicted) <= limits).all()


def replanned(policy, observation, actions):
    """The plans of some actions, computed from the start."""
    obs, _ = policy.obs_to_tensor(observation)
    with torch.no_grad():
        read = policy.decider.read(policy.bank.gather(observation["query"][:, 0]), obs["budget"][:, 0])
        masks = policy.decider.fit(read, policy.decider.review(read, torch.as_tensor(actions).bool()))
    return policy.backbone.layout.flatten(masks).numpy()


def sampled(policy, observation):
    with torch.no_grad():
        return policy(policy.obs_to_tensor(observation)[0])[0].numpy()


@pytest.mark.parametrize("rule", ["threshold", "fill"])
def test_a_step_executes_the_plans_of_the_actions_that_it_is_given(small, source, rule):
    """Whatever the policy has computed last: for another draw, for other budgets, by other weights, or not at all."""
    model = make_ppo(small, source, rule=rule)
    env, policy = model.env, model.policy
    executed = []

    def step(observation, actions):
        expected = replanned(policy, observation, actions)
        observation, *_ = env.step(actions)
        assert (env.executed[1] == expected).all()
        executed.append(expected)
        return observation

    observation = env.reset()
    earlier = sampled(policy, observation)
    assert (earlier != sampled(policy, observation)).any()
    observation = step(observation, earlier)
    actions = sampled(policy, observation)
    sampled(policy, {**observation, "budget": np.ones_like(observation["budget"])})  # as an evaluation in between does
    observation = step(observation, actions)
    actions = sampled(policy, observation)
    before = replanned(policy, observation, actions)
    with torch.no_grad():
        policy.controller.token_bias.neg_()
        policy.controller.llm_head.bias.neg_()
    observation = step(observation, actions)
    assert (executed[-1] != before).any(), "the weights decide nothing"
    state = env.state()
    for _ in range(2):  # from a saved state, the second time with another observation answered last
        observation = step(env.load_state(state), actions)
    assert (executed[-2] == executed[-1]).all()
    chosen, _ = policy.predict(observation, deterministic=True)
    step(observation, chosen)
    assert (executed[-1] == chosen).all(), "plans that fit are executed as they are"


def test_a_rollout_reads_no_query_twice(small, source, monkeypatch):
    """The projection takes what the forward pass has read; after four steps SB3 asks for the values of a fifth."""
    model = make_ppo(small, source)
    reads = []
    read = Decider.read
    monkeypatch.setattr(Decider, "read", lambda *given: reads.append(1) or read(*given))
    monkeypatch.setattr(model, "train", lambda: None)
    model.learn(32)
    assert len(reads) == 4 + 1


def test_a_step_without_an_episode_is_refused(small, source):
    env = make_ppo(small, source).env
    with pytest.raises(InputError, match="call reset"):
        env.step(np.ones((8, small.layout.size), np.int8))


def test_a_reviewed_action_has_the_logits_it_was_chosen_by_where_images_differ_in_size(source):
    """Tokens that nothing is decided on are kept, and those that an image does not have are not among them."""
    backbone = build_of("qwen2_5_vl")
    decider = decider_of(backbone, axes=("heads", "layers"))
    encoding = EncodingBank(backbone, source).gather([0, 2, 4, 6])
    assert not encoding.visual_valid_BN.all()
    with torch.no_grad():
        read = decider.read(encoding, torch.full((4,), 0.9))
        decisions = decider.decide(read, sample=True)
        assert torch.equal(decider.review(read, decisions.bits_BA).logits_BA, decisions.logits_BA)


@pytest.mark.slow
def test_ratios_multiply_to_the_joint_one_and_have_their_own_clips(small, source):
    """The sums of all kinds of log-probabilities agree; the update is SB3's own, and differs between the kinds."""
    after = {}
    for ratios in RATIOS:
        model = make_ppo(small, source, ratios=ratios, learning_rate=0.01)
        obs, _ = model.policy.obs_to_tensor(model.env.reset())
        torch.manual_seed(5)
        with torch.no_grad():
            _, _, log_probs = model.policy(obs)
        after[ratios] = log_probs.sum(1), model
    sums = [log_prob for log_prob, _ in after.values()]
    assert all(torch.allclose(sums[0], other, atol=1e-5) for other in sums)
    weights = []
    for _, model in after.values():
        model.set_random_seed(0)
        model.learn(64)
        weights.append(torch.cat([value.flatten() for value in model.policy.parameters()]))
    assert all((one != two).any() for one, two in itertools.pairwise(weights))


def test_an_update_moves_every_controller_parameter_and_nothing_of_the_backbone(small, source):
    model = make_ppo(small, source, learning_rate=0.01)
    backbone_before = {name: value.clone() for name, value in small.model.state_dict().items()}
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    assert not any("language_model" in name for name in before)
    model.learn(64)
    unchanged = [name for name, value in model.policy.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []
    assert all(torch.equal(value, backbone_before[name]) for name, value in small.model.state_dict().items())


def test_rollout_memory_per_transition(small, source):
    """Query number, budget, int8 bits and six floats: no features."""
    buffer = make_ppo(small, source).rollout_buffer
    arrays = [buffer.actions, *buffer.observations.values(), buffer.rewards, buffer.returns, buffer.values]
    arrays += [buffer.log_probs, buffer.advantages, buffer.episode_starts]
    per_transition = sum(array.nbytes for array in arrays) / (buffer.buffer_size * buffer.n_envs)
    assert per_transition == small.layout.size + 8 + 4 + 6 * 4


def test_saved_controllers_load_equal_and_only_for_their_layout(small, source, tmp_path):
    torch.manual_seed(0)
    controller = TwoLevelController(ControllerConfig.for_layout(small.layout, small.hidden))
    save_controller(controller, tmp_path, small)
    loaded = load_controller(tmp_path, small)
    encoding = EncodingBank(small, source).gather(range(8))
    budgets = torch.full((8,), 0.7, dtype=torch.float64)
    plans = [ControllerPlanner(each, small, "x").plan(encoding, budgets) for each in (controller, loaded)]
    assert torch.equal(small.layout.flatten(plans[0]), small.layout.flatten(plans[1]))
    other = Backbone(small.family, "other", heads=2)
    with pytest.raises(InputError, match="backbone 'other' has"):
        load_controller(tmp_path, other)
    (tmp_path / "controller.safetensors").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="no readable controller"):
        load_controller(tmp_path, small)
    with pytest.raises(InputError, match="no readable controller"):
        load_controller(tmp_path / "nowhere", small)


def test_layouts_with_other_sizes_build(smallest):
    layout = MaskLayout(576, 32, 32)
    controller = TwoLevelController(ControllerConfig.for_layout(layout, 64))
    reading = controller.read(
        torch.randn(2, 576, 64),
        torch.ones(2, 576).bool(),
        torch.randn(2, 90, 64),
        torch.ones(2, 90).bool(),
        torch.ones(2),
    )
    kept = controller.token_logits(reading) > 0
    assert controller.llm_logits(reading, kept, torch.ones(2)).shape == (2, 32 * 32 + 32)


def test_group_advantage_is_reward_minus_the_mean_of_the_others():
    spaces_ = gymnasium.spaces.Dict({"budget": gymnasium.spaces.Box(0, 1, (1,))}), gymnasium.spaces.MultiDiscrete([2])
    buffer = GroupRolloutBuffer(1, *spaces_, device="cpu", n_envs=6, plans_per_query=3)
    buffer.rewards[:] = [[1.0, 0.0, 0.5, 0.2, 0.2, 0.8]]
    buffer.values[:] = 7.0
    buffer.compute_returns_and_advantage(torch.zeros(6), np.ones(6, bool))
    assert buffer.advantages[0].tolist() == pytest.approx([0.75, -0.75, 0.0, -0.3, -0.3, 0.6])
    assert buffer.returns[0].tolist() == pytest.approx(buffer.rewards[0].tolist())
