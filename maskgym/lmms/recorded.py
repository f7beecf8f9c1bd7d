"""Records as JSON lines: written while requests are answered, and given again in place of a VLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maskgym.common.errors import InputError
from maskgym.common.plain_files import MALFORMED, parse_json
from maskgym.eval.measure.evaluate import Record, check_budgets
from maskgym.lmms.requests import Request


class RecordFile:
    """A new file that records are appended to; what was written stays if the evaluation stops.

    Args:
        path: its folder is made if need be.

    Raises:
        InputError: there is such a file already, or its folder cannot be made.
    """

    def __init__(self, path: Path):
        if path.exists():
            raise InputError(f"records {str(path)!r} exists already; remove it, or name another file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"records {str(path)!r} has no folder to lie in ({error}); name another file") from error
        self.path = path

    def append(self, records: Sequence[Record]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


class Recorded:
    """Gives the answers that a file holds, so that the harness scores each budget without answering again.

    Args:
        path: JSON lines that a ``RecordFile`` has written; those of several may be put together.
        budgets: which of its answers are wanted.

    Raises:
        InputError: no such file, an unreadable one, or a budget that is not in it.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path, budgets: Sequence[float]):
        self.path, self.budgets = path, check_budgets(budgets)
        self._records: dict[tuple[str, float], Record] = {}
        there = set()
        try:
            with path.open(encoding="utf-8") as file:
                for line in file:
                    record = parse_json(line)
                    there.add(record["budget"])
                    if record["budget"] in self.budgets:
                        self._records[_key(record), record["budget"]] = record
        except FileNotFoundError as error:
            raise InputError(f"answers {str(path)!r} does not exist; give a file that records=FILE has made") from error
        except MALFORMED as error:
            raise InputError(
                f"answers {str(path)!r} is not readable ({error!r}); give a file that records=FILE has made"
            ) from error
        for budget in self.budgets:
            if budget not in there:
                listed = ", ".join(f"{one:g}" for one in sorted(there)) or "none"
                raise InputError(f"answers {str(path)!r} has none for budget {budget:g}; it has budgets {listed}")

    def records(self, requests: Sequence[Request], progress: bool = False) -> list[list[Record]]:
        """Those of each request, in the order asked, by budget.

        Raises:
            InputError: a request whose answer is not in the file.
        """
        return [[self._record(request, budget) for budget in self.budgets] for request in requests]

    def _record(self, request: Request, budget: float) -> Record:
        try:
            return self._records[_key(request.asked()), budget]
        except KeyError as error:
            raise InputError(
                f"answers {str(self.path)!r} has none for request {request.name!r} at budget {budget:g} with this "
                "context and these options of generation; answer the task again with pretrained=…"
            ) from error


ASKED = ("task", "split", "doc_id", "request", "context", "continuation", "max_new_tokens", "until")


def _key(asked: dict[str, Any]) -> str:
    return json.dumps([asked[name] for name in ASKED])
