"""The three skins over one core: checked by Gymnasium and SB3, equal to each other, deterministic."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import maskgym  # noqa: F401  registers the environment
from backbones import InputError
from envs import MaskingCore, MaskingEnv, MaskingVecEnv, MaskingVectorEnv
from envs.core import Slots


def options(small, source, **more):
    return {"backbone": small, "data": source, "budgets": (0.3, 1.0), **more}


@pytest.mark.filterwarnings(
    "ignore:.*unconventional shape.*", "ignore:.*infinity.*", "ignore:.*Box observation space.*"
)
@pytest.mark.parametrize("observation", ["id", "features"])
def test_checkers_accept_the_scalar_environment(small, source, observation):
    env = MaskingEnv(**options(small, source, observation=observation))
    env.spec = gymnasium.spec("maskgym/Masking-v0")
    check_env(env, skip_render_check=True)
    sb3_check_env(env)


def test_made_by_name_from_plain_data(tiny):
    env = gymnasium.make("maskgym/Masking-v0", backbone="tiny", data="easy-vqa", reward="accuracy-flops")
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    _, reward, terminated, truncated, info = env.step(np.ones(env.action_space.shape, np.int8))
    assert terminated and not truncated
    assert info["flops"] == 1.0
    assert reward == pytest.approx(info["accuracy"] - 0.02)
    vector = gymnasium.make_vec("maskgym/Masking-v0", num_envs=3, backbone="tiny", split="validation")
    assert isinstance(vector.unwrapped, MaskingVectorEnv)
    assert vector.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert '"backbone": "tiny"' in env.spec.to_json()


def rollout(small, source, seed, steps=3, count=6):
    """Actions shared by all skins, from a generator of their own."""
    actions = np.random.default_rng(seed).integers(0, 2, (steps, count, small.layout.size)).astype(np.int8)
    return actions


def test_scalar_vector_and_sb3_skins_agree(small, source):
    actions = rollout(small, source, 7)
    vector = MaskingVectorEnv(num_envs=6, **options(small, source))
    sb3 = MaskingVecEnv(MaskingCore(**options(small, source)), 6)
    scalars = [MaskingEnv(**options(small, source)) for _ in range(6)]
    sb3.seed(40)
    seen = [vector.reset(seed=40)[0], sb3.reset()]
    alone = [env.reset(seed=40 + slot)[0] for slot, env in enumerate(scalars)]
    for step in range(3):
        for slot, observation in enumerate(alone):
            for name, value in observation.items():
                assert (value == seen[0][name][slot]).all() and (value == seen[1][name][slot]).all()
        vector_out, sb3_out = vector.step(actions[step]), sb3.step(actions[step])
        results = [env.step(actions[step, slot]) for slot, env in enumerate(scalars)]
        rewards = np.array([result[1] for result in results])
        assert np.abs(vector_out[1] - rewards).max() < 1e-5
        assert np.abs(sb3_out[1] - rewards).max() < 1e-5
        for slot, result in enumerate(results):
            for name, value in result[4].items():
                assert vector_out[4]["final_info"][name][slot] == pytest.approx(value, abs=1e-4)
                assert sb3_out[3][slot][name] == pytest.approx(value, abs=1e-4)
            assert vector_out[4]["final_obs"][slot]["query"] == result[0]["query"]
            assert sb3_out[3][slot]["terminal_observation"]["query"] == result[0]["query"]
        seen, alone = [vector_out[0], sb3_out[0]], [env.reset()[0] for env in scalars]
    assert len({float(value) for value in rewards}) > 1, "all rewards equal: the comparison shows nothing"


def test_same_seed_same_trajectory_and_other_seed_another(small, source):
    def play(seed):
        env = MaskingVectorEnv(num_envs=4, **options(small, source))
        observation, _ = env.reset(seed=seed)
        trace = [observation["query"].copy(), observation["budget"].copy()]
        for action in rollout(small, source, 0, count=4):
            observation, reward, *_ = env.step(action)
            trace += [observation["query"], observation["budget"], reward]
        return trace

    first, second, other = play(3), play(3), play(4)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert not all((a == b).all() for a, b in zip(first, other, strict=True))


def test_state_restores_the_future(small, source):
    sb3 = MaskingVecEnv(MaskingCore(**options(small, source)), 4)
    sb3.seed(1)
    sb3.reset()
    saved = sb3.state()
    actions = rollout(small, source, 0, count=4)
    expected = [sb3.step(action)[:2] for action in actions]
    again = MaskingVecEnv(MaskingCore(**options(small, source)), 4)
    again.load_state(saved)
    for action, (observation, reward) in zip(actions, expected, strict=True):
        got = again.step(action)
        assert (got[1] == reward).all()
        assert all((got[0][name] == observation[name]).all() for name in observation)


def test_groups_share_query_and_budget(small, source):
    slots = Slots(MaskingCore(**options(small, source)), 6, plans_per_query=3)
    slots.seed(0)
    slots.draw()
    assert len(set(slots.numbers[:3])) == len(set(slots.numbers[3:])) == 1
    assert len(set(slots.budgets[:3])) == 1 and slots.budgets[0] != slots.budgets[3]
    with pytest.raises(InputError, match="6 environments do not divide into groups of 4"):
        Slots(slots.core, 6, plans_per_query=4)


def test_observations_are_fresh_arrays(small, source):
    env = MaskingVectorEnv(num_envs=4, **options(small, source))
    first, _ = env.reset(seed=0)
    kept = {name: value.copy() for name, value in first.items()}
    env.step(np.ones((4, small.layout.size), np.int8))
    assert all((first[name] == kept[name]).all() for name in first)


def test_reward_sees_cost_budget_and_parts(small, source):
    seen = []

    def spy(terms):
        seen.append(terms)
        return terms.accuracy

    core = MaskingCore(**options(small, source, reward=spy, controller_flops=500))
    masks = small.layout.full(2)
    masks.tokens[1, 4:] = False
    outcome = core.step(np.array([0, 0]), np.array([0.5, 0.9]), small.layout.flatten(masks).numpy())
    terms = seen[0]
    full = small.full_llm_flops(core.bank.gather([0]))
    assert terms.flops[0] == pytest.approx(float((full + 500) / full), rel=1e-6)
    assert terms.flops[1] < terms.flops[0]
    assert terms.budget.tolist() == [0.5, 0.9]
    assert terms.kept_tokens.tolist() == [16, 4]
    assert terms.kept_layers.tolist() == [3, 3] and terms.kept_heads.tolist() == [12, 12]
    assert outcome.info["flops_controller"].tolist() == [500, 500]
    assert outcome.info["flops_prefill"][0] == float(full)
    references = [core.source[0].answers[0]] * 2
    direct = small.log_likelihood(core.bank.gather([0, 0]), masks, references)
    assert np.allclose(terms.log_likelihood, direct.numpy(), atol=1e-5)


@pytest.mark.parametrize("positions", ["renumbered", "restored"])
def test_kept_tokens_are_laid_out_as_asked(small, source, positions):
    """The same actions: other answers, the layout's own cost charged, and nothing else where all is kept."""
    cores = [MaskingCore(**options(small, source), **more) for more in ({}, {"positions": positions})]
    numbers, budgets = np.arange(6), np.full(6, 0.9, np.float32)
    actions = np.ones((6, small.layout.size), np.int8)
    actions[:3, : small.layout.tokens : 2] = 0
    plain, laid = (core.step(numbers, budgets, actions).info for core in cores)
    changed = plain["log_likelihood"] != laid["log_likelihood"]
    assert changed[:3].all() and not changed[3:].any()
    charged = laid["flops"] - plain["flops"]
    assert ((charged[:3] > 0) == (positions == "restored")).all() and (charged[3:] == 0).all()


def test_features_are_the_encoding(small, source):
    core = MaskingCore(**options(small, source, observation="features"))
    numbers = np.array([0, 3])
    observed, encoding = core.observe(numbers, np.array([0.5, 0.6])), core.bank.gather(numbers)
    assert np.array_equal(observed["visual"], encoding.visual_BND.numpy())
    for row in range(2):
        count = int(observed["text_tokens"][row, 0])
        assert count == int(encoding.text_tokens[row])
        assert np.array_equal(observed["text"][row, :count], encoding.text_BTD[row, :count].numpy())
        assert not observed["text"][row, count:].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": "huge"}, "unknown backbone 'huge'"),
        ({"data": "vqa9"}, "unknown data 'vqa9'"),
        ({"reward": "fun"}, "unknown reward 'fun'"),
        ({"budgets": (0.0, 1.0)}, r"budgets are \(0.0, 1.0\)"),
        ({"budgets": (0.8, 0.4)}, r"budgets are \(0.8, 0.4\)"),
        ({"budgets": (0.5, 1.5)}, r"budgets are \(0.5, 1.5\)"),
        ({"observation": "pixels"}, "observation is 'pixels'; it must be one of id, features"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
    ],
)
def test_bad_arguments_are_named(small, source, change, words):
    with pytest.raises(InputError, match=words):
        MaskingEnv(**{**options(small, source), **change})


def test_bad_actions_and_options_are_named(small, source):
    env = MaskingEnv(**options(small, source))
    with pytest.raises(InputError, match="budget 2"):
        env.reset(options={"budget": 2})
    observation, _ = env.reset(options={"query": 5, "budget": 0.25})
    assert observation["query"] == 5 and observation["budget"] == np.float32(0.25)
    with pytest.raises(InputError, match="flat vector of"):
        env.step(np.ones(3, np.int8))
    with pytest.raises(InputError, match="value 2"):
        env.step(np.full(small.layout.size, 2))


def test_a_plan_without_layers_is_refused(source):
    from tests.conftest import build

    core = MaskingCore(**options(build(protected_layers=()), source))
    with pytest.raises(InputError, match="keeps no layer"):
        core.step(np.array([0]), np.array([1.0]), np.zeros((1, core.layout.size), np.int8))


def test_steps_leave_the_backbone_untouched(small, source):
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    env = MaskingVectorEnv(num_envs=4, **options(small, source))
    env.reset(seed=0)
    env.step(rollout(small, source, 0, count=4)[0])
    assert all(torch.equal(before[name], value) for name, value in small.model.state_dict().items())
