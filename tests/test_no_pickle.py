"""No module of the project unpickles, evaluates text, or hands text to a shell."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("backbones", "envs", "policies", "eval", "maskgym")
MODULES = sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))])

IMPORTS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("pandas.read_pickle", "pd.read_pickle", "os.system", "os.popen"),
    *("PPO.load", "A2C.load"),  # Stable-Baselines3 keeps pickles in its .zip
}


def faults(source: str) -> list[str]:
    """What a module does that it must not, with the lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in IMPORTS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                found.append(f"{node.lineno}: calls {called}")
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and not off:
                    found.append(f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
            given = {keyword.arg for keyword in node.keywords}
            if called.endswith(".from_pretrained") and called.startswith("Auto") and "trust_remote_code" not in given:
                found.append(f"{node.lineno}: {called} leaves trust_remote_code to a question on the terminal")
            if called in ("np.load", "numpy.load") and "allow_pickle" not in given:
                found.append(f"{node.lineno}: {called} leaves allow_pickle to NumPy")
    return found


@pytest.mark.parametrize("module", MODULES, ids=[str(module.relative_to(ROOT)) for module in MODULES])
def test_no_module_unpickles_or_evaluates(module):
    assert faults(module.read_text()) == []


def test_all_modules_are_looked_at():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    modules = {str(module.relative_to(ROOT)) for module in MODULES}
    others = {file for file in tracked.stdout.split() if file not in modules and (ROOT / file).exists()}
    assert all(file.startswith(("tests/", "docs/")) for file in others), others


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import torch; torch.load('x', weights_only=True)",
        "np.load('x')",
        "np.load('x', allow_pickle=True)",
        "AutoConfig.from_pretrained('x')",
        "AutoConfig.from_pretrained('x', trust_remote_code=True)",
        "subprocess.run('ls', shell=True)",
        "eval('1')",
        "yaml.load('a')",
    ],
)
def test_each_kind_of_fault_is_seen(line):
    assert len(faults(line)) == 1
