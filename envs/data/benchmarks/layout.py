"""What a benchmark is made of: where its official files lie, what their entries say, and how it is asked and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskgym.common.errors import InputError

Entry = dict[str, Any]
Files = Mapping[str, Path]

SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "{question}\nAnswer with the option's letter from the given choices directly."
"""LLaVA's prompts (docs/Evaluation.md of github.com/haotian-liu/LLaVA)."""


@dataclass(frozen=True)
class Asked:
    """What an entry asks.

    Attributes:
        id: unique within a part.
        question: its text, before the prompt template.
        answers: the accepted ones; numbers stand for their texts.
        kind: of question, or the part of the data set that it counts in.
        group: equal for queries that count together.
        choices: texts of the options, if it offers some.
    """

    id: str
    question: str
    answers: Sequence[Any]
    kind: str = ""
    group: str = ""
    choices: Sequence[str] = ()


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark.

    Attributes:
        files: by role, the names that a file or folder may have, ``{part}`` standing for the part; the images' is
            ``images``.
        folders: below the root, where they may lie.
        splits: the official parts that are read for each split; a split without public answers reads the validation
            part, one that does not exist is missing.
        parts: all official parts whose answers are public.
        entries: of a part's files, in the fields of the official annotations, with the ``image`` (and what is shown
            ``beside`` it): a path, or its bytes.
        ask: what an entry asks. Copies on the hub have nearly the same fields, and are asked likewise.
        prompt: template.
        replaced: the end of a question that the template stands in place of.
        images: by column of copies on the hub, the column here.
    """

    files: Mapping[str, tuple[str, ...]]
    splits: Mapping[str, tuple[str, ...]]
    parts: tuple[str, ...]
    entries: Callable[[Files, str], Iterator[Entry]]
    ask: Callable[[Entry], Asked]
    folders: tuple[str, ...] = ()
    prompt: str = SHORT
    replaced: str = ""
    images: Mapping[str, str] = field(default_factory=lambda: {"image": "image"})

    def locate(self, name: str, root: Path, parts: Sequence[str]) -> list[dict[str, Path]]:
        """By part, the files of each role.

        Raises:
            InputError: files that are missing; the message names each.
        """
        found: list[dict[str, Path]] = []
        missing: dict[str, None] = {}
        for part in parts:
            found.append({})
            for role, names in self.files.items():
                spelled = [each.format(part=part) for each in names]
                places = [root / folder / each for folder in ("", *self.folders) for each in spelled]
                place = next((place for place in places if place.exists()), None)
                if place is None:
                    missing[" or ".join(spelled)] = None
                else:
                    found[-1][role] = place
        if missing:
            raise InputError(
                f"data {name!r}: {str(root)!r} lacks {'; '.join(missing)} (docs/benchmarks.md has the layout)"
            )
        return found
