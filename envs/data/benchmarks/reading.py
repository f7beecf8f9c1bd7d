"""Reading annotation files piece by piece, so that none is held in memory as a whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from maskgym.common.errors import InputError
from maskgym.common.plain_files import parse_json

Entry = dict[str, Any]
CHUNK = 1 << 20
_AFTER_VALUES = frozenset(" \t\r\n,:]}")


def json_lines(file: Path) -> Iterator[Entry]:
    """One JSON object a line.

    Raises:
        InputError: a line that is none.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    entry = parse_json(line)
                except ValueError as error:
                    raise InputError(
                        f"{str(file)!r}, line {number} is not JSON ({error}); download it again"
                    ) from error
                yield entry


def tab_separated(file: Path) -> Iterator[Entry]:
    """Rows under a head line; fields may be quoted, and as long as an image in base64.

    Raises:
        InputError: something else than such a table.
    """
    csv.field_size_limit(1 << 30)
    with file.open(encoding="utf-8", newline="") as lines:
        try:
            yield from csv.DictReader(lines, delimiter="\t")
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{str(file)!r} is no table ({error}); download it again") from error


def json_entries(file: Path, member: str | None = None) -> Iterator[tuple[str, Any]]:
    """Entries of a JSON array or object, one at a time.

    Args:
        file: UTF-8.
        member: of the outer object whose value is the array or object; None: it is the outer one.

    Yields:
        A name and a value; the names of an array's entries are their numbers.

    Raises:
        InputError: something else than JSON, or no such member.
    """
    with file.open(encoding="utf-8") as text:
        reader = _JsonReader(file, text)
        if member is not None:
            for name in reader.names():
                if name == member:
                    break
                reader.value()
            else:
                raise InputError(f"{str(file)!r} has no {member!r}; it is not the official file")
        if reader.peek() == "[":
            for number in reader.places():
                yield str(number), reader.value()
        else:
            for name in reader.names():
                yield name, reader.value()


class _JsonReader:
    """A place in a JSON text that is read chunk by chunk.

    Args:
        file: how messages call it.
        text: where it is read from.
    """

    def __init__(self, file: Path, text: TextIO):
        self.file, self.text = file, text
        self.buffer, self.at, self.ended = "", 0, False
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self.at < len(self.buffer):
                if not self.buffer[self.at].isspace():
                    return self.buffer[self.at]
                self.at += 1
            if self.ended:
                return ""
            self._more()

    def value(self) -> Any:
        """The value that begins here."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
                if self.ended or self.buffer[end : end + 1] in _AFTER_VALUES:  # a number may go on in the next chunk
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self._broken(str(error)) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too deep
                raise self._broken(str(error)) from error
            self._more()

    def places(self) -> Iterator[int]:
        """The numbers of an array's entries; the value is to be read at each."""
        self._take("[")
        number = 0
        while self.peek() != "]":
            if number:
                self._take(",")
            yield number
            number += 1
        self._take("]")

    def names(self) -> Iterator[str]:
        """The names of an object's members; the value is to be read at each."""
        self._take("{")
        first = True
        while self.peek() != "}":
            if not first:
                self._take(",")
            first = False
            name = self.value()
            self._take(":")
            yield str(name)
        self._take("}")

    def _take(self, mark: str) -> None:
        if self.peek() != mark:
            raise self._broken(f"{mark!r} expected, {self.peek() or 'the end'!r} found")
        self.at += 1

    def _more(self) -> None:
        try:
            chunk = self.text.read(CHUNK)
        except UnicodeDecodeError as error:
            raise self._broken(str(error)) from error
        self.ended = not chunk
        self.buffer, self.at = self.buffer[self.at :] + chunk, 0

    def _broken(self, reason: str) -> InputError:
        return InputError(f"{str(self.file)!r} is not whole JSON ({reason}); download it again")
