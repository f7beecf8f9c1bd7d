"""Agents that are not ours: Stable-Baselines3's, sb3-contrib's, and Gymnasium's wrappers, on the environment."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics, RenderCollection, TransformReward
from gymnasium.wrappers import vector as vector_wrappers
from sb3_contrib import ARS, QRDQN, TQC, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

from maskgym import MaskingVecEnv
from maskgym.envs import load_queries
from tests.conftest import slow_but
from tests.pages import ROOT, blocks

ID = "maskgym/Masking-v0"
STEPS = 4
"""Of a slot between two updates."""
FLOATS = {"id": ["budget"], "features": ["budget", "visual", "text"]}
"""What of an observation can be normalised: SB3's buffers round the others to whole numbers."""


@pytest.fixture(scope="module")
def options(tiny):
    """The shipped backbone, and a few queries."""
    return {"backbone": tiny, "data": load_queries("easy-vqa", "validation", 16)}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ppo(env, policy="MultiInputPolicy", **more):
    return PPO(
        policy, env, **{"n_steps": STEPS, "batch_size": STEPS, "n_epochs": 1, "seed": 0, "device": "cpu", **more}
    )


def a2c(env):
    return A2C("MultiInputPolicy", env, n_steps=STEPS, seed=0, device="cpu")


def trpo(env):
    more = {"n_steps": STEPS, "batch_size": STEPS, "cg_max_steps": 2, "n_critic_updates": 1}
    return TRPO("MultiInputPolicy", env, **more, seed=0, device="cpu")


def recurrent(env):
    more = {"n_steps": STEPS, "batch_size": STEPS, "n_epochs": 1, "policy_kwargs": {"lstm_hidden_size": 8}}
    return RecurrentPPO("MultiInputLstmPolicy", env, **more, seed=0, device="cpu")


AGENTS = {"PPO": ppo, "A2C": a2c, "TRPO": trpo, "RecurrentPPO": recurrent}


def numbers_of(model):
    return torch.cat([value.flatten() for value in model.policy.parameters()])


def trains(model):
    """Two updates: they change the policy, and its actions are the environment's."""
    before = numbers_of(model).clone()
    model.learn(2 * STEPS * model.n_envs)
    after = numbers_of(model)
    assert model.num_timesteps == 2 * STEPS * model.n_envs
    assert torch.isfinite(after).all() and (after != before).any()
    assert len(model.ep_info_buffer) == min(2 * STEPS * model.n_envs, 100)
    model.env.reset()
    actions, _ = model.predict(model.env.reset())
    assert all(model.action_space.contains(action) for action in actions.astype(model.action_space.dtype))
    return model


@pytest.mark.parametrize("observation", slow_but(("id",), ["id", "features"]))
@pytest.mark.parametrize("agent", slow_but(("PPO", "A2C"), AGENTS))
def test_agents_train(options, agent, observation):
    trains(AGENTS[agent](MaskingVecEnv.make(2, **options, observation=observation)))


def dummy(options):
    return DummyVecEnv([lambda: Monitor(gymnasium.make(ID, **options))] * 2)


def of_sb3(options):
    return make_vec_env(ID, 2, env_kwargs=options)


def normalised(options):
    return VecNormalize(MaskingVecEnv.make(2, **options), norm_obs_keys=FLOATS[options["observation"]])


def flat(options):
    return Monitor(FlattenObservation(gymnasium.make(ID, **options)))


WAYS = {
    "gymnasium.make": lambda options: gymnasium.make(ID, **options),
    "Monitor": lambda options: Monitor(gymnasium.make(ID, **options)),
    "make_vec_env": of_sb3,
    "DummyVecEnv": dummy,
    "VecNormalize": normalised,
}


@pytest.mark.parametrize("agent", slow_but(("PPO",), ["PPO", "A2C"]))
@pytest.mark.parametrize("way", slow_but(("gymnasium.make", "VecNormalize"), WAYS))
def test_agents_train_on_every_kind_of_environment(options, way, agent):
    trains(AGENTS[agent](WAYS[way]({**options, "observation": "features"})))


@pytest.mark.slow
def test_an_agent_trains_on_what_make_vec_env_makes_of_the_name_alone():
    trains(ppo(make_vec_env(ID)))


def test_an_agent_trains_in_another_process():
    """Where nobody has imported maskgym: the name says that it is to be."""
    env = make_vec_env(f"maskgym:{ID}", vec_env_cls=SubprocVecEnv)
    try:
        trains(ppo(env))
    finally:
        env.close()


@pytest.mark.slow
def test_a_vec_monitor_sees_the_episodes_that_are_reported_without_it(options):
    env = MaskingVecEnv.make(2, **options)
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        monitored = VecMonitor(env)
    model = trains(ppo(monitored))
    own = trains(ppo(MaskingVecEnv.make(2, **options)))
    for one, two in zip(model.ep_info_buffer, own.ep_info_buffer, strict=True):
        assert one["l"] == two["l"] == 1 and one["r"] == pytest.approx(two["r"], abs=1e-6)


def test_a_flattened_observation_suits_a_policy_of_vectors(options):
    trains(ppo(flat({**options, "observation": "features"}), "MlpPolicy"))


def test_single_bits_are_one_distribution(options):
    """As MultiBinary the same plans are drawn and executed at once, and stored as int8."""
    env = MaskingVecEnv.make(2, **options)
    env.action_space = spaces.MultiBinary(env.action_space.shape[0])
    assert trains(ppo(env)).rollout_buffer.actions.dtype == np.int8


@pytest.mark.slow
def test_masks_of_actions_are_not_needed(options):
    model = MaskablePPO("MultiInputPolicy", MaskingVecEnv.make(2, **options), n_steps=STEPS, batch_size=STEPS, seed=0)
    with pytest.raises(ValueError, match="does not support action masking"):
        model.learn(STEPS)
    before = numbers_of(model).clone()
    model.learn(2 * STEPS * 2, use_masking=False)
    assert (numbers_of(model) != before).any()


OTHERS = {DQN: "Discrete", QRDQN: "Discrete", SAC: "Box", TD3: "Box", DDPG: "Box", TQC: "Box", ARS: "Box"}


@pytest.mark.parametrize(("kind", "actions"), OTHERS.items(), ids=lambda each: getattr(each, "__name__", each))
def test_agents_for_other_actions_say_so(options, kind, actions):
    with pytest.raises(AssertionError, match=f"only supports .*{actions}.* as action spaces but MultiDiscrete"):
        kind("LinearPolicy" if kind is ARS else "MultiInputPolicy", MaskingVecEnv.make(1, **options))


def test_evaluations_and_callbacks(options, tmp_path):
    env, held = MaskingVecEnv.make(2, **options), MaskingVecEnv.make(4, **options)
    callback = EvalCallback(held, n_eval_episodes=8, eval_freq=STEPS, best_model_save_path=tmp_path, verbose=0)
    model = ppo(env)
    model.learn(2 * STEPS * 2, callback)
    held.seed(5)
    rewards, lengths = evaluate_policy(model, held, 8, return_episode_rewards=True)
    held.seed(5)
    actions, _ = model.predict(held.reset(), deterministic=True)
    assert lengths == [1] * 8 and rewards[:4] == pytest.approx(held.step(actions)[1].tolist(), abs=1e-6)
    assert (tmp_path / "best_model.zip").is_file()
    assert callback.evaluations_results == [] or len(callback.evaluations_results[0]) == 8


@pytest.mark.slow
def test_a_saved_agent_goes_on(options, tmp_path):
    model = trains(ppo(MaskingVecEnv.make(2, **options, observation="features")))
    model.save(tmp_path / "agent")
    env = MaskingVecEnv.make(2, **options, observation="features")
    again = PPO.load(tmp_path / "agent", env=env, device="cpu")
    observation = env.reset()
    for one, two in ((model, again), (again, model)):
        assert (
            one.predict(observation, deterministic=True)[0] == two.predict(observation, deterministic=True)[0]
        ).all()
    again.learn(STEPS * 2, reset_num_timesteps=False)
    assert again.num_timesteps == 3 * STEPS * 2 and (numbers_of(again) != numbers_of(model)).any()


def test_statistics_of_a_normalised_environment_are_kept(options, tmp_path):
    env = normalised({**options, "observation": "features"})
    trains(ppo(env))
    env.save(tmp_path / "statistics.pkl")
    again = VecNormalize.load(tmp_path / "statistics.pkl", MaskingVecEnv.make(2, **options, observation="features"))
    assert again.ret_rms.mean == env.ret_rms.mean
    assert (again.obs_rms["visual"].mean == env.obs_rms["visual"].mean).all()


def obedient(terms):
    """Minus the distance between what is spent and what was asked for."""
    return -np.abs(terms.flops - terms.budget)


@pytest.mark.slow
def test_a_stock_agent_learns_to_heed_the_budget(small, source):
    """Reward: minus |FLOPs - budget|. Untrained -0.23; the best plan that is one for all budgets gets -0.19, which an
    agent that reads nothing cannot beat; measured after 2,048 plans: -0.10 (seed 0)."""
    more = {"backbone": small, "data": source, "reward": obedient, "budgets": (0.2, 1.0)}
    env, held = (MaskingVecEnv.make(64, **more) for _ in range(2))
    model = ppo(env, n_steps=4, batch_size=64, n_epochs=4, learning_rate=3e-3)

    def reward():
        held.seed(99)
        return evaluate_policy(model, held, 256, deterministic=False)[0]

    untrained = reward()
    model.learn(2048)
    assert untrained < -0.19 and reward() > -0.14


@pytest.mark.parametrize("observation", ["id", "features"])
def test_gymnasiums_wrappers(options, observation):
    more = {**options, "observation": observation}
    env = RecordEpisodeStatistics(TransformReward(gymnasium.make(ID, **more), lambda reward: reward + 10))
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.ones(env.action_space.shape, int))
    assert reward > 9 and info["episode"]["r"] == pytest.approx(reward, abs=1e-6) and info["episode"]["l"] == 1
    many = vector_wrappers.TransformReward(gymnasium.make_vec(ID, 3, **more), lambda reward: reward + 10)
    many = vector_wrappers.RecordEpisodeStatistics(many)
    many.reset(seed=0)
    for _ in range(2):
        _, rewards, _, _, infos = many.step(np.ones(many.action_space.shape, int))
        assert infos["episode"]["r"] == pytest.approx(rewards, abs=1e-6)
        assert infos["episode"]["l"].tolist() == [1, 1, 1]
    assert many.episode_count == 6


def test_gymnasiums_wrappers_of_vectors_of_observations_take_single_environments(options):
    """They refuse environments that begin the next episode in the same step, as the batched one does."""
    with pytest.raises(ValueError, match="autoreset_mode"):
        vector_wrappers.FlattenObservation(gymnasium.make_vec(ID, 2, **options))
    many = vector_wrappers.FlattenObservation(gymnasium.make_vec(ID, 2, vectorization_mode="sync", **options))
    assert many.observation_space.contains(many.reset(seed=0)[0])


@pytest.mark.parametrize("observation", slow_but(["features"], ["id", "features"]))
def test_checkers_have_nothing_to_say(tiny, observation):
    """Pictures included. Of features, SB3 says that two axes are not one, which its policies for dicts make of them."""
    env = gymnasium.make(ID, split="validation", observation=observation, render_mode="rgb_array").unwrapped
    check_env(env)
    sb3_check_env(FlattenObservation(env), skip_render_check=False)
    if observation == "features":
        with pytest.warns(UserWarning, match="unconventional shape") as said:
            sb3_check_env(env)
        assert {str(each.message).split()[2] for each in said} == {"visual", "text"}
    else:
        sb3_check_env(env, skip_render_check=False)


def test_pictures_of_one_and_of_many(options):
    made = make_vec_env(ID, 4, env_kwargs=options)
    made.reset()
    assert made.render().shape == (512, 512, 3)
    env = MaskingVecEnv.make(3, **options, render_mode="rgb_array")
    env.reset()
    assert env.render("rgb_array").shape == (512, 512, 3)
    film = RenderCollection(gymnasium.make(ID, **options, render_mode="rgb_array"))
    film.reset(seed=0)
    film.step(np.zeros(film.action_space.shape, int))
    before, after = film.render()
    assert before.shape == after.shape == (256, 256, 3) and (after == before // 4).all()


def test_the_loop_of_the_page_learns_something():
    """What the page shows as a file: its policy is another after two updates."""
    page = (ROOT / "docs" / "your-own-agent.md").read_text()
    (code,) = (block.code for block in blocks(page) if block.file == "reinforce.py")
    loop = {"__name__": "reinforce"}
    exec(code, loop)
    before, after = (loop["train"](updates=updates, slots=8).state_dict() for updates in (0, 2))
    assert all((before[name] != after[name]).any() for name in before)
