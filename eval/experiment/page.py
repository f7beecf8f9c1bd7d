"""``report.html``: an experiment on one page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from maskgym.common.atomic import write_text
from maskgym.eval.experiment.claims import Answer
from maskgym.eval.experiment.tables import Table

TEMPLATE = Path(__file__).parent / "report.html.j2"


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows in words."""

    path: Path
    caption: str

    @property
    def data(self) -> str:
        """The file as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


def unbroken(text: str) -> str:
    """With figures that no line break parts from their signs."""
    for sign in (" %", "p = ", "p < "):
        text = text.replace(sign, sign.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def write_page(
    path: Path,
    title: str,
    question: str,
    answers: Sequence[Answer],
    remarks: Sequence[str],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    gallery: Sequence[Picture],
    missing: Sequence[tuple[str, str]],
    facts: Mapping[str, Any],
    commands: Sequence[str],
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        title: of the experiment.
        question: what it asks.
        answers: to what it is asked in detail.
        remarks: further sentences.
        tables: with notes.
        pictures: plots.
        gallery: what was kept of some queries.
        missing: why figures are missing, and of what.
        facts: versions, machine, data.
        commands: that made it.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["unbroken"] = unbroken
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        question=question,
        answers=answers,
        remarks=remarks,
        tables=tables,
        pictures=pictures,
        gallery=gallery,
        missing=missing,
        facts=facts,
        commands=commands,
    )
    write_text(path, page)
