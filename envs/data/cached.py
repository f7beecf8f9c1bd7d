"""Data sets that are made once and then read from the cache of ``datasets``, memory-mapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets

from maskgym.common.errors import InputError


def cached(
    rows: Callable[..., Iterator[dict[str, Any]]],
    options: dict[str, Any],
    features: datasets.Features,
    split: str,
    what: str,
) -> datasets.Dataset:
    """The rows of a generator, from the cache (``HF_DATASETS_CACHE``) if they were made before.

    Args:
        rows: generates them.
        options: its arguments; equal ones are taken to give equal rows.
        features: the columns.
        split: name of the split in the cache.
        what: how messages call the data.

    Raises:
        InputError: what the generator raises of that kind, or a cache that cannot be written.
    """
    try:
        made = datasets.Dataset.from_generator(rows, features=features, gen_kwargs=options, split=split)
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise InputError(
            f"{what} could not be cached in {str(datasets.config.HF_DATASETS_CACHE)!r} ({error.__cause__ or error}); "
            "make room there, or set HF_DATASETS_CACHE to another folder"
        ) from error
    assert isinstance(made, datasets.Dataset)
    return made
