"""What to say of queries that fail."""

from __future__ import annotations

import sys

from maskgym.backbones.encodings.encoding import Encoder, EncodingBank
from maskgym.backbones.encodings.left_out import failure_line
from maskgym.common.errors import InputError
from maskgym.envs.data.queries import DatasetQueries

MOST_LINES = 10


def report_failed(bank: EncodingBank, known: int = 0) -> None:
    """A line on standard error for each query that failed, ten at most.

    Args:
        bank: knows them.
        known: so many of them were reported before.

    Raises:
        InputError: no query of the bank is left.
    """
    failed = [(bank.source.text(number)[0], reason) for number, reason in list(bank.failed.items())[known:]]
    if len(bank.failed) == len(bank):
        number, reason = next(iter(bank.failed.items()))
        raise InputError(f"all {len(bank)} queries failed; the first, {bank.source.text(number)[0]!r}: {reason}")
    for id, reason in failed[:MOST_LINES]:
        print(failure_line(id, reason), file=sys.stderr)
    if len(failed) > MOST_LINES:
        print(f"... and {len(failed) - MOST_LINES} more", file=sys.stderr)


def working(encoder: Encoder, queries: DatasetQueries) -> tuple[EncodingBank, DatasetQueries]:
    """A bank of the queries that do not fail, and these; the others are reported.

    Raises:
        InputError: all fail.
    """
    bank = EncodingBank(encoder, queries)
    failed = bank.failures(range(len(bank)))
    report_failed(bank)
    left = queries.without(failed)
    return (EncodingBank(encoder, left) if failed else bank), left
