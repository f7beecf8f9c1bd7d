"""What is installed for the project goes with its licence."""

import subprocess
from importlib.metadata import PathDistribution

import pytest

from tests import audit


def test_all_dependencies_are_permissive_or_thought_about():
    packages = audit.dependencies()
    assert {"torch", "numpy", "pillow", "jinja2", "markupsafe"} <= packages.keys(), "the requirements are not followed"
    assert list(audit.unsuitable(packages)) == []


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("License-Expression: GPL-3.0-only", "GPL-3.0-only"),
        ("License-Expression: MIT AND AGPL-3.0", "AGPL-3.0"),
        ("License: Proprietary", "Proprietary"),
        (
            "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)",
            "GNU General Public License v3",
        ),
        ("Summary: without any", "no licence named"),
        ("License: MIT", None),
        ("License-Expression: Apache-2.0 OR BSD-2-Clause", None),
    ],
)
def test_licences_are_read_from_each_place(tmp_path, line, named):
    (tmp_path / "METADATA").write_text(f"Metadata-Version: 2.4\nName: other\nVersion: 1.0\n{line}\n")
    found = list(audit.unsuitable({"other": PathDistribution(tmp_path)}))
    assert [named in line for line in found] == ([] if named is None else [True])
    assert list(audit.unsuitable({"tqdm": PathDistribution(tmp_path)})) == []


def test_where_nothing_can_be_looked_up_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert audit.vulnerabilities({}) == 0 and "not looked up, pip-audit is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "err", "status", "words"),
    [
        ("", "ConnectionError: no route", 0, "not looked up, pip-audit got no answer (ConnectionError: no route)"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', "", 0, "0 known in 1 packages"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1"}]}]}', "", 1, "  a 1: X-1"),
    ],
)
def test_what_pip_audit_says(monkeypatch, capsys, out, err, status, words):
    """Its service is not there in tests; its answers are those of its documented JSON."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, out, err))
    assert audit.vulnerabilities({}) == status and words in capsys.readouterr().out
