"""The three skins over one core: equal to each other, deterministic, and told the same. ``test_agents`` has Gymnasium's
and SB3's own checks."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor

import maskgym  # noqa: F401  registers the environment
from maskgym.backbones import InputError
from maskgym.envs import MaskingCore, MaskingEnv, MaskingVecEnv, MaskingVectorEnv
from maskgym.envs.core import Slots


def options(small, source, **more):
    return {"backbone": small, "data": source, "budgets": (0.3, 1.0), **more}


@pytest.mark.slow
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
        ({"render_mode": "human"}, "render_mode is 'human'; it must be 'rgb_array' or None"),
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


def test_the_values_of_actions_add_up(small, source):
    """As stock agents add them; as int8 more than 63 bits overflow, which is why the space is of int64."""
    space = MaskingCore(**options(small, source)).action_space
    assert sum(space.nvec) == 2 * small.layout.size == space.nvec.sum()
    with np.errstate(over="ignore"):
        assert sum(np.full(64, 2, np.int8)) != 128


def scalar_reset(env, seed=0, **given):
    observation, _ = env.reset(seed=seed, options=given or None)
    return {name: value[None] for name, value in observation.items()}


def vector_reset(env, seed=0, **given):
    return env.reset(seed=seed, options=given or None)[0]


def sb3_reset(env, seed=0, **given):
    env.seed(seed)
    env.set_options(given)
    return env.reset()


SKINS = {
    "scalar": (lambda count=1, **more: MaskingEnv(**more), scalar_reset),
    "vector": (lambda count=1, **more: MaskingVectorEnv(count, **more), vector_reset),
    "sb3": (lambda count=1, **more: MaskingVecEnv.make(count, **more), sb3_reset),
}
skins = pytest.mark.parametrize(("make", "reset"), SKINS.values(), ids=SKINS)


@skins
def test_reset_does_what_it_is_told_once(small, source, make, reset):
    env = make(**options(small, source))
    drawn, told = reset(env), reset(env, query=5, budget=0.25)
    assert told["query"] == 5 and told["budget"] == np.float32(0.25)
    assert drawn["query"] != 5 and drawn["budget"] != np.float32(0.25), "drawn by chance: choose another query"
    assert reset(env)["query"] == drawn["query"]
    half = reset(env, budget=np.float32(0.5))
    assert half["query"] == drawn["query"] and half["budget"] == np.float32(0.5)
    again = reset(env, **half)
    assert all((again[name] == half[name]).all() for name in half), "an observation says which episode to repeat"


@skins
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bugdet": 0.5}, "reset has no option 'bugdet'; it takes query and budget"),
        ({"reset_mask": np.ones(1, bool)}, "reset has no option 'reset_mask'; it takes query and budget"),
        ({"query": 99}, "query number 99 does not exist; the source has 12 queries"),
        ({"query": -1}, "query number -1 does not exist"),
        ({"query": True}, "query number True does not exist"),
        ({"query": 1.0}, r"query number 1\.0 does not exist"),
        ({"budget": 2}, r"budget 2 is outside \(0, 1\]"),
        ({"budget": float("nan")}, "budget nan is outside"),
        ({"budget": "half"}, "budget half is outside"),
    ],
)
def test_reset_refuses_in_every_skin_alike(small, source, make, reset, given, words):
    env = make(**options(small, source))
    with pytest.raises(InputError, match=words):
        reset(env, **given)


def test_slots_are_told_one_by_one(small, source):
    """What is not given is drawn as if nothing were."""
    vector, sb3 = MaskingVectorEnv(3, **options(small, source)), MaskingVecEnv.make(3, **options(small, source))
    drawn = vector_reset(vector)
    for _ in range(2):
        told = vector_reset(vector, query=[3, None, 7], budget=[0.5, 0.75, None])
        sb3.seed(0)
        sb3.set_options([{"query": 3, "budget": 0.5}, {"budget": 0.75}, {"query": 7}])
        for observation in (told, sb3.reset()):
            assert observation["query"][:, 0].tolist() == [3, drawn["query"][1, 0], 7]
            assert observation["budget"][:, 0].tolist() == [0.5, 0.75, drawn["budget"][2, 0]]
    sb3.seed(0)
    assert (sb3.reset()["query"] == drawn["query"]).all(), "options hold for one reset"
    with pytest.raises(InputError, match="reset's option 'query' has 2 values for 3 slots"):
        vector.reset(options={"query": [1, 2]})
    sb3.set_options([{}, {}])
    with pytest.raises(InputError, match="set_options has 2 values for 3 slots"):
        sb3.reset()
    with pytest.raises(InputError, match="give a dict"):
        vector.reset(options=[{"query": 1}])


def test_groups_are_told_together(small, source):
    vector = MaskingVectorEnv(4, plans_per_query=2, **options(small, source))
    told, _ = vector.reset(seed=[1, 1, 2, 2], options={"query": [3, 3, None, None]})
    assert told["query"][:2].tolist() == [[3], [3]] and told["query"][2] == told["query"][3]
    for bad in (
        {"seed": [1, 2, 3, 4]},
        {"options": {"query": [3, 4, 5, 5]}},
        {"options": {"budget": [0.5, 0.6, 1, 1]}},
    ):
        with pytest.raises(InputError, match="differ within a group of 2 slots"):
            vector.reset(**bad)


def test_seeds_of_slots(small, source):
    """A list gives each its own, None lets it go on; a number counts up; SB3's seed does as much."""
    env, sb3 = MaskingVectorEnv(3, **options(small, source)), MaskingVecEnv.make(3, **options(small, source))
    counted, _ = env.reset(seed=7)
    going_on, _ = env.reset()
    env.reset(seed=7)
    listed, _ = env.reset(seed=[9, None, 7])
    assert (
        listed["budget"][2] == counted["budget"][0] == scalar_reset(MaskingEnv(**options(small, source)), 7)["budget"]
    )
    assert listed["budget"][0] == counted["budget"][2] and listed["budget"][1] == going_on["budget"][1]
    assert sb3.seed(7) == [7, 8, 9] and (sb3.reset()["budget"] == counted["budget"]).all()
    assert (sb3.reset()["budget"] == going_on["budget"]).all()
    with pytest.raises(InputError, match="the seed has 2 values for 3 slots"):
        env.reset(seed=[1, 2])


@skins
def test_a_step_needs_a_reset(small, source, make, reset):
    env = make(**options(small, source), render_mode="rgb_array")
    action = np.ones((1, small.layout.size), int)
    action = action[0] if isinstance(env, MaskingEnv) else action
    for call in (lambda: env.step(action), env.render):
        with pytest.raises(ResetNeeded, match=r"needs an episode, and none is running: call reset\(\) first"):
            call()
    reset(env)
    with pytest.raises(InputError, match="flat vector"):
        env.step(action[..., :3])
    env.step(action)
    if isinstance(env, MaskingEnv):  # the others have begun the next episode
        with pytest.raises(ResetNeeded, match="none is running"):
            env.step(action)
    env.close()
    env.close()
    with pytest.raises((ResetNeeded, ClosedEnvironmentError), match=r"none is running|was closed"):
        env.step(action)


def test_a_closed_vector_stays_closed_and_others_can_be_reset(small, source):
    for name, (make, reset) in SKINS.items():
        env = make(**options(small, source))
        reset(env)
        env.close()
        if name == "vector":
            with pytest.raises(ClosedEnvironmentError, match="make another"):
                reset(env)
        else:
            assert reset(env)["query"].shape == (1, 1)


@skins
@pytest.mark.parametrize("count", [1, 3])
def test_actions_of_every_type_are_the_same(small, source, make, reset, count):
    count = 1 if make is SKINS["scalar"][0] else count
    env = make(count, **options(small, source))
    bits = np.random.default_rng(0).integers(0, 2, (count, small.layout.size))
    bits = bits[0] if isinstance(env, MaskingEnv) else bits
    results = []
    kinds = (np.int64, np.int32, np.int8, np.uint8, np.bool_, np.float32)
    for action in (*(bits.astype(kind) for kind in kinds), bits.tolist(), torch.from_numpy(bits)):
        reset(env)
        results.append(np.atleast_1d(env.step(action)[1]).tolist())
    assert len(results[0]) == count and all(result == results[0] for result in results)


def test_slots_of_a_vec_env_by_index(small, source):
    env = MaskingVecEnv.make(3, **options(small, source))
    assert env.get_attr("core", [0, -1]) == [env.core] * 2 and env.get_attr("render_mode") == [None] * 3
    assert env.env_is_wrapped(Monitor) == [True] * 3 and env.env_is_wrapped(gymnasium.Wrapper, 1) == [False]
    env.set_attr("note", 1)
    assert env.get_attr("note", range(3)) == [1, 1, 1] and not env.has_attr("nothing")
    for call in (env.get_attr, lambda name, indices: env.env_is_wrapped(Monitor, indices)):
        with pytest.raises(IndexError):
            call("core", 3)
    with pytest.raises(InputError, match=r"set_attr\('note'\) is for some slots"):
        env.set_attr("note", 2, [0, 2])
    with pytest.raises(InputError, match=r"env_method\('reset'\)"):
        env.env_method("reset", indices=0)
    assert env.get_attr("note") == [1] * 3


@skins
def test_pictures_show_what_the_plan_left_of_the_image(small, source, make, reset):
    """Sixteen tokens are a grid of 4 x 4: the first is the patch at the upper left."""
    env = make(**options(small, source), render_mode="rgb_array")
    reset(env, query=5)
    image = np.asarray(source[5].image.convert("RGB").resize((256, 256)))
    action = np.ones((1, small.layout.size), int)
    action[0, 0] = 0
    before = np.asarray(env.render()).reshape(256, 256, 3)
    env.step(action[0] if isinstance(env, MaskingEnv) else action)
    after = np.asarray(env.render()).reshape(256, 256, 3)
    assert after.dtype == np.uint8 and (before == image).all()
    assert (after[:64, :64] == image[:64, :64] // 4).all() and (after[64:] == image[64:]).all()
    reset(env, query=4)
    assert (np.asarray(env.render()).reshape(256, 256, 3) != after).any()


@skins
def test_without_a_render_mode_there_is_no_picture(small, source, make, reset):
    env = make(**options(small, source))
    reset(env)
    with pytest.warns(UserWarning, match="render"):
        assert env.render() is None
