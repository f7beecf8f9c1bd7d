"""The option of every command in which a VLM answers: where answers are cut."""

from __future__ import annotations

import dataclasses

from maskgym.common.errors import InputError


@dataclasses.dataclass(kw_only=True)
class Answering:
    """Options of answers."""

    max_new_tokens: int | None = None
    """Tokens at which answers are cut; by default one behind the longest accepted answer of the data, at most 32, and
    the first token where all have one; a benchmark's scoring has its own, mostly 16."""

    def check_cut(self) -> None:
        """Refuse a cut that leaves nothing.

        Raises:
            InputError: naming it.
        """
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1")
