"""README and docs: code blocks run, commands are parsed by the real parsers, links lead somewhere, and the site's own
rules hold."""

import importlib.util
import logging
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from maskgym.common.run_folder import RunFolder
from maskgym.policies.controller.learned import save_controller
from maskgym.policies.controller.network import TwoLevelController
from maskgym.training.rl import RLConfig
from tests.pages import ALL, PAGES, ROOT, Wrong, blocks, check, check_links, commands


@pytest.fixture
def desk(tmp_path, monkeypatch, tiny):
    """A fresh folder with what a page may suppose: a first run (here untrained), and an image."""
    config = RLConfig(out=tmp_path / "runs" / "first")
    folder = RunFolder.create(config.out, config)
    save_controller(TwoLevelController(config.sizes(tiny)), folder.path, tiny)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.slow
def test_what_a_page_shows_works(page, desk):
    text = page.read_text()
    check_links(text, page)
    check(text, page.name)


def test_there_are_blocks_to_check():
    """The null of the tests above: pages without blocks would pass."""
    found = [block for page in PAGES for block in blocks(page.read_text())]
    assert sum(block.language == "python" for block in found) >= 15
    assert sum(len(list(commands(block.code))) for block in found if block.language == "bash") >= 50


def test_commands_of_a_block():
    script = 'make check && pytest  # both\n\nhf download a/b \\\n    --local-dir "c d"\n'
    assert list(commands(script)) == [["make", "check"], ["pytest"], ["hf", "download", "a/b", "--local-dir", "c d"]]


BASH = "```bash\n{}\n```"
BAD = {
    "option": (BASH.format("python train_rl.py --no-such-option 1"), "no-such-option"),
    "option of another": (BASH.format("python train_gumbel.py --plans-per-query 4"), "plans-per-query"),
    "value": (BASH.format("python train_gumbel.py --estimator guess"), "estimator"),
    "value that a check refuses": (BASH.format("python train_rl.py --envs 0"), "must be at least 1"),
    "continued line": (BASH.format("python train_rl.py \\\n    --no-such-option 1"), "no-such-option"),
    "second command": (BASH.format("pytest && python -m maskgym.eval run full --no-such-option"), "no-such-option"),
    "subcommand": (BASH.format("python -m maskgym.eval guess"), "guess"),
    "option of the console command": (BASH.format("maskgym train-rl --no-such-option 1"), "no-such-option"),
    "subcommand of the console command": (BASH.format("maskgym eval guess"), "guess"),
    "missing argument": (BASH.format("python -m maskgym.eval search-static"), "--out"),
    "policy": (BASH.format("python -m maskgym.eval run full fast"), "unknown policy 'fast'"),
    "model_args": (
        BASH.format("lmms-eval --model maskgym --model_args pretrained=runs/a,budgets=1 --tasks mme"),
        "budgets",
    ),
    "option of a policy": (BASH.format("python -m maskgym.eval run fastv:depth=2"), "depth"),
    "reward": (BASH.format("python train_rl.py --reward accuracy -0.3*flop"), "unknown reward 'flop'"),
    "reward of a file not written": (BASH.format("python train_rl.py --reward my_rewards:thrifty"), "my_rewards"),
    "data": (BASH.format("python train_rl.py --data easy"), "'easy' is no name"),
    "option of data": (BASH.format("python train_rl.py --data scenes:width=3"), "width"),
    "arm": (
        BASH.format("python -m maskgym.eval experiment training --out runs/x --arms rl guess"),
        r"no arms \['guess'\]",
    ),
    "program": (BASH.format("maskgym run"), "no command that is known"),
    "extra": (BASH.format('pip install -e ".[guess]"'), "extras"),
    "target": (BASH.format("make guess"), "make has the targets"),
    "language": ("```py\n1\n```", "block of 'py'"),
    "code": ("```python\n1 / 0\n```", "page.md:2: ZeroDivisionError"),
    "order": ("```python\nprint(later)\n```\n\n```python\nlater = 1\n```", "NameError"),
    "warning": ("```python\nimport warnings\nwarnings.warn('stale', UserWarning)\n```", "UserWarning"),
    "planner that fails": (
        "```python title=\"guess.py\"\nclass Guess:\n    name, budgeted = 'guess', True\n\n"
        "    def __init__(self, backbone, seed=0):\n        pass\n```\n\n"
        + BASH.format("python -m maskgym.eval run guess:Guess"),
        "without 'plan'",
    ),
    "budget that none meets": (BASH.format("python -m maskgym.eval run stride --budgets 0.001"), "least budget"),
    "module": ('```python title="guess.py"\nimport nowhere_at_all\n```', "nowhere_at_all"),
    "option in text": ("Give `--no-such-option 3`.", "no option --no-such-option"),
    "option of another in text": (
        "`python train_gumbel.py --plans-per-query 4` does it.",
        "no option --plans-per-query",
    ),
    "subcommand in text": ("`python -m maskgym.eval guess` does it.", "eval has the commands"),
}
"""Pages, and what is said of them."""
GOOD = {
    "program": BASH.format("pytest && make check"),
    "option": BASH.format("python train_rl.py --plans-per-query 4 --no-fit"),
    "policy": BASH.format("python -m maskgym.eval run full fastv:k=2 'prumerge+ then runs/any' --data path/to/it"),
    "console command": BASH.format("maskgym train-rl --plans-per-query 4 && maskgym demo --port 8502"),
    "text": "`python train_rl.py --plans-per-query 4`, `maskgym eval run --limit 3`, `--resume`, `eval run`",
    "code": "```python\nearlier = 1\n```\n\n```python\nassert earlier\n```",
    "module": '```python title="guess.py"\nx = 1\n```\n\n```python\nfrom guess import x\n```',
    "picture": "```\n--anything goes\n```",
}


@pytest.mark.parametrize(("page", "said"), BAD.values(), ids=BAD)
def test_a_page_that_is_wrong_is_caught(page, said, desk):
    with pytest.raises(Wrong, match=said):
        check(page, "page.md")


@pytest.mark.parametrize("page", GOOD.values(), ids=GOOD)
def test_a_page_that_is_right_is_not(page, desk):
    check(page, "page.md")


def test_every_command_is_in_the_reference():
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    for config in ALL:
        assert f"\n::: {config.__module__}.{config.__name__}\n" in page


@pytest.mark.parametrize(
    "link", ["docs/nowhere.md", "README.md#nowhere", "#nowhere", "../outside.md", "docs/rewards.md#What-is-there"]
)
def test_a_dead_link_is_caught(link):
    page = ROOT / "README.md"
    check_links("# Here\n[a](docs/rewards.md#what-is-there) [b](#here) `[c](dead.md)` [d](https://e.f/g)", page)
    with pytest.raises(Wrong):
        check_links(f"# Here\n[a]({link})", page)


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_of_the_repository_are_named_on_the_site(hooks):
    text = "[run](../results/a.json), [eval/grid.txt](../eval/grid.txt), [up](../../Makefile), [page](trials.md)"
    assert hooks.on_page_markdown(text) == "run (`results/a.json`), `eval/grid.txt`, up (`Makefile`), [page](trials.md)"


def test_pictures_of_the_repository_are_on_the_site(hooks, tmp_path):
    """Null: a picture that no page shows is not."""
    text = "![curves](../results/a.png) and [words](../results/a.json)"
    for place, content in (("docs/page.md", text), ("results/a.png", "a"), ("results/b.png", "b")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(content)
    hooks.on_post_build({"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site")})
    assert [path.name for path in (tmp_path / "site").rglob("*.*")] == ["a.png"]
    shown = hooks.on_page_markdown(text)
    assert shown == '<img alt="curves" src="results/a.png"> and words (`results/a.json`)'


@pytest.mark.parametrize(
    ("part", "warned"),
    [
        ('<script src="assets/a.js"></script><a href="https://e.f">e</a>', 0),
        ('<script defer src="https://e.f/a.js"></script>', 1),
        ("<link rel=stylesheet href=//e.f/a.css><img src='http://e.f/a.png'>", 2),
    ],
)
def test_the_site_warns_of_what_is_loaded_from_elsewhere(hooks, caplog, part, warned):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    with caplog.at_level(logging.WARNING):
        assert hooks.on_post_page(part, page) == part
    assert len(caplog.records) == warned
