"""The searched order: what moves answers least for the FLOPs it saves goes first; and its file."""

import json

import numpy as np
import pytest
import torch

import maskgym.eval.__main__ as eval_main
from maskgym.backbones import EncodingBank, InputError
from maskgym.eval.policies import load_planner
from maskgym.policies.controller.learned import planner_of
from maskgym.policies.controller.network import TwoLevelController
from maskgym.policies.planning.even import EvenPlanner
from maskgym.policies.planning.projection import budget_flops
from maskgym.policies.static.search import SearchSettings, StaticSearch, search_order
from maskgym.policies.static.searched import SearchedOrder, SearchedPlanner
from maskgym.training.gumbel import GumbelConfig
from tests.conftest import build, command


@pytest.fixture(scope="module")
def made(small, source, tmp_path_factory):
    """A search on the random model, and its file."""
    bank = EncodingBank(small, source)
    batches = [bank.gather(range(6)), bank.gather(range(6, 12))]
    found = search_order(small, batches, "made", "train", SearchSettings(token_groups=8, tries=4), progress=False)
    file = tmp_path_factory.mktemp("plans") / "static.json"
    found.save(file)
    return found, file, batches


@pytest.mark.slow
def test_every_unit_that_may_leaves_once(made, small):
    found, _, _ = made
    left = sorted(number for unit in found.order for number in unit)
    protected = small.layout.protected()
    assert left == [number for number in range(small.layout.size) if not protected[number]]
    assert sorted(map(len, found.order))[-8:] == [2] * 8, "tokens leave in groups"
    assert np.all(np.diff([1.0, *found.flops]) <= 0) and found.queries == 12


@pytest.mark.slow
def test_the_first_to_leave_is_the_best_by_brute_force(small, source):
    """With as many tries as units, each step takes the least divergence per FLOP saved."""
    encoding = EncodingBank(small, source).gather(range(8))
    search = StaticSearch(small, [encoding], SearchSettings(token_groups=4, tries=99))
    order, shares, losses = search.order(progress=False)
    kept = torch.ones(small.layout.size, dtype=torch.bool)
    cost, loss = search.full_flops, 0.0
    full = small.prefill(encoding, small.full(encoding))[0].log_softmax(-1)
    for step in range(3):
        ratios = []
        for unit in search.units():
            if not kept[unit].all():
                continue
            without = kept.clone()
            without[unit] = False
            masks = small.layout.unflatten(without.expand(8, -1))
            log = small.prefill(encoding, masks)[0].log_softmax(-1)
            moved = float((full.exp() * (full - log)).sum(1).mean())
            saved = cost - float(small.cost(encoding, masks).llm[0])
            ratios.append(((moved - loss) / saved, unit, moved, saved))
        _, unit, moved, saved = min(ratios)
        assert order[step] == unit and losses[step] == pytest.approx(moved, abs=1e-5)
        kept[unit] = False
        cost, loss = cost - saved, moved
        assert shares[step] == pytest.approx(cost / search.full_flops)


@pytest.mark.slow
def test_it_beats_random_orders_on_the_queries_it_was_made_on(made, small):
    """Null: the mean divergence of random plans at the same cost."""
    _, file, batches = made
    planner = SearchedPlanner(small, plan=str(file))
    search = StaticSearch(small, batches, SearchSettings())
    budgets = torch.full((6,), 0.6, dtype=torch.float64)
    own = small.layout.flatten(planner.plan(batches[0], budgets))[0]
    generator = torch.Generator().manual_seed(0)
    others = []
    for _ in range(10):
        planner.stays_A = torch.rand(small.layout.size, generator=generator)
        others.append(search.divergence(small.layout.flatten(planner.plan(batches[0], budgets))[0]))
    assert search.divergence(own) < 0.7 * float(np.mean(others))


def test_plans_are_the_same_for_every_query_and_within_budget(made, small):
    _, file, batches = made
    planner = load_planner(f"static:plan={file}", small, 0)
    for share in (0.5, 0.8, 1.0):
        budgets = torch.full((6,), share, dtype=torch.float64)
        masks = planner.plan(batches[0].rows(torch.tensor([0, 2, 4, 0, 2, 4])), budgets)
        assert (small.layout.flatten(masks) == small.layout.flatten(masks)[0]).all()
        cost = small.cost(batches[0].rows(torch.tensor([0, 2, 4, 0, 2, 4])), masks)
        full = small.full_llm_flops(batches[0].rows(torch.tensor([0, 2, 4, 0, 2, 4])))
        assert (cost.llm <= budget_flops(budgets, full)).all()
    assert small.layout.flatten(masks).all()


def test_a_model_without_protected_layers_keeps_one(source):
    backbone = build(protected_layers=())
    encoding = EncodingBank(backbone, source).gather(range(4))
    search = StaticSearch(backbone, [encoding], SearchSettings(token_groups=2, tries=2))
    order, _, _ = search.order(progress=False)
    layers = range(backbone.layout.size - 3, backbone.layout.size)
    assert sum([number] in order for number in layers) == 2


def test_files_are_checked(made, small, tmp_path):
    found, file, _ = made
    assert SearchedOrder.load(file) == SearchedOrder(**{**vars(found), "layout": tuple(found.layout)})
    with pytest.raises(
        InputError, match=r"no readable plan in 'nowhere.json' .* python -m maskgym.eval search-static --out"
    ):
        load_planner("static:plan=nowhere.json", small, 0)
    fields = json.loads(file.read_text())
    for change in ({"layout": [1, 2]}, {"order": "abc"}, {"colour": "red"}):
        (tmp_path / "bad.json").write_text(json.dumps({**fields, **change}))
        with pytest.raises(InputError, match="no readable plan"):
            SearchedOrder.load(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"is for \(tokens, layers, heads\) = \(16, 3, 4\); backbone 'test' has"):
        SearchedPlanner(build(layers=2), plan=str(file))


def test_the_command_searches_and_its_plan_runs(monkeypatch, place, tmp_path, capsys):
    out = tmp_path / "static.json"
    where = ["--backbone", place / "vlm", "--data", place / "data"]
    options = ["--queries", "4", "--token-groups", "2", "--tries", "2", "--out", out]
    command(monkeypatch, eval_main.main, "search-static", *where, *options)
    printed = capsys.readouterr().out
    assert "divergence, nats" in printed and f"python -m maskgym.eval run static:plan={out}" in printed
    command(monkeypatch, eval_main.main, "run", f"static:plan={out}", *where, "--budgets", "0.6")
    assert f"static:plan={out}" in capsys.readouterr().out
    for line, words in ((["--queries", "0"], "--queries is 0"), (["--tries", "0"], "--tries is 0")):
        with pytest.raises(SystemExit):
            command(monkeypatch, eval_main.main, "search-static", *where, "--out", out, *line)
        assert words in capsys.readouterr().err


def test_an_untrained_controller_begins_with_the_searched_plan(made, small, source):
    """Up to what its heads, which begin near zero, add: the same tokens, and nearly the same heads, as the plan."""
    _, _, (encoding, _) = made
    torch.manual_seed(0)
    config = GumbelConfig(initial_plan=made[1], positions="original")
    sizes = config.sizes(small)
    controller = TwoLevelController(sizes)
    controller.load_state_dict(config.initial_weights(small, sizes))
    budgets = torch.full((len(encoding),), 0.7, dtype=torch.float64)
    ours = planner_of(controller, small, "untrained").plan(encoding, budgets)
    theirs = SearchedPlanner(small, plan=str(made[1])).plan(encoding, budgets)
    even = EvenPlanner(small).plan(encoding, budgets)
    flat, wanted, other = (small.layout.flatten(masks) for masks in (ours, theirs, even))
    # the controller's own FLOPs are taken off its budget, so it may drop a unit more
    assert (flat != wanted).sum(1).max() <= 2 < (other != wanted).sum(1).min()


def test_a_searched_plan_begins_nothing_that_another_run_began(made):
    with pytest.raises(InputError, match="--initial-plan has no effect on a controller that --init-from gives"):
        GumbelConfig(initial_plan=made[1], init_from=made[1].parent).check()
