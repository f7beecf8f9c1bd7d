"""The whole chain learns: environment, policy, PPO.

The task has a known optimum: keep a quarter of the visual tokens below budget 0.8 and three quarters above. Scores are
minus the mean distance from that share. A controller that cannot see the budget reaches -0.25 at best (any constant
share between the two); an untrained one keeps every token and has -0.5.
"""

import numpy as np
import pytest
import torch

import maskgym.policies.controller.network
from maskgym.backbones import EncodingBank
from tests.test_policy import make_ppo

pytestmark = pytest.mark.slow

THRESHOLD = -0.12
PLANS = 10_240


def wanted_share(budgets):
    return np.where(budgets < 0.8, 0.25, 0.75)


def distance(terms):
    return -np.abs(terms.kept_tokens / 16 - wanted_share(terms.budget))


def score(backbone, source, plans):
    """Mean score of the most likely token masks after training on ``plans`` plans."""
    model = make_ppo(
        backbone,
        source,
        envs=64,
        fitted=False,
        reward=distance,
        plans_per_query=4,
        batch_size=64,
        learning_rate=0.01,
        n_epochs=4,
    )
    if plans:
        model.learn(plans)
    decider = model.policy.decider
    budgets = torch.linspace(0.6, 1.0, 100)
    encoding = EncodingBank(backbone, source).gather(np.arange(100) % len(source))
    with torch.no_grad():
        decisions = decider.decide(decider.read(encoding, budgets), sample=False)
    share = backbone.layout.unflatten(decisions.bits_BA).tokens.double().mean(1).numpy()
    return -float(np.abs(share - wanted_share(budgets.numpy())).mean())


def test_training_passes_the_threshold(small, source):
    assert score(small, source, PLANS) > THRESHOLD


def test_an_untrained_controller_fails_it(small, source):
    assert score(small, source, 0) < THRESHOLD


def test_a_controller_that_cannot_see_its_budget_fails_it(small, source, monkeypatch):
    def blind(share):
        return torch.zeros(len(share), maskgym.policies.controller.network.SHARE_FEATURES)

    monkeypatch.setattr(maskgym.policies.controller.network, "share_features", blind)
    assert score(small, source, PLANS) < THRESHOLD
