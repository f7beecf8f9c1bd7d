"""Parts by name: options behind a name (``scenes:size=128,seed=3``), and a user's own by dotted path."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin

from maskgym.common.errors import InputError, printable, was_interrupted

Parser = Callable[[str], Any]


def parse_options(maker: Callable[..., Any], what: str, options: str, hidden: Collection[str] = ()) -> dict[str, Any]:
    """``key=value,key=value`` as keyword arguments of a maker, each read as its parameter is annotated.

    Whole numbers, numbers, ``true`` and ``false``, one of several words, texts; a tuple's items are joined by ``-``.

    Args:
        maker: a function or class whose other parameters are the options; what a ``partial`` has fixed is none.
        what: how messages call it, such as ``data 'scenes'``.
        options: may be empty.
        hidden: parameters that are not options.

    Raises:
        InputError: an unknown option, one given twice, or a value of another kind.
    """
    fixed = maker.keywords if isinstance(maker, partial) else {}
    parameters = inspect.signature(maker, eval_str=True).parameters.values()
    kinds = {each.name: _kind(each.annotation) for each in parameters if each.name not in {*hidden, *fixed}}
    parsed = {}
    for option in options.split(",") if options else []:
        key, _, value = option.partition("=")
        if key in parsed:
            raise InputError(f"{what} is given {key} twice; leave out {option!r}, or the other")
        try:
            parsed[key] = kinds[key][1](value)
        except (KeyError, ValueError) as error:
            raise InputError(f"{what} has no option {option!r}; {_listed(kinds)}") from error
    return parsed


def _listed(kinds: dict[str, tuple[str, Parser]]) -> str:
    """What options there are, those of a kind together."""
    if not kinds:
        return "it has no options"
    by_kind: dict[str, list[str]] = {}
    for name, (kind, _) in kinds.items():
        by_kind.setdefault(kind, []).append(name)
    return "its options are " + "; ".join(f"{kind} for {', '.join(names)}" for kind, names in by_kind.items())


def _kind(annotation: Any) -> tuple[str, Parser]:
    """What values of an annotation are called, and what reads them."""
    origin, arms = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _kind(next(arm for arm in arms if arm is not type(None)))
    if origin is Literal:
        return f"one of {', '.join(arms)}", partial(_one_of, arms)
    if origin is tuple:
        kind, parse = _kind(arms[0])
        return f"{kind} joined by '-'", lambda text: tuple(parse(part) for part in text.split("-"))
    kinds: dict[Any, tuple[str, Parser]] = {
        int: ("whole numbers", _whole),
        float: ("numbers", float),
        bool: ("true or false", lambda text: _one_of(("false", "true"), text) == "true"),
    }
    return kinds.get(annotation, ("texts", str))


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _one_of(words: tuple[str, ...], text: str) -> str:
    if text not in words:
        raise ValueError(text)
    return text


def import_dotted(path: str, what: str, expected: str) -> Callable[..., Any]:
    """A user's own function by ``package.module:function``, looked for in the working directory too.

    Args:
        path: to it.
        what: how messages call it, such as ``reward 'mine:thrifty'``.
        expected: what it must be, such as ``a function of RewardTerms``.

    Raises:
        InputError: a path that cannot be imported, or something that cannot be called.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # importing runs the user's module
        if was_interrupted(error):
            raise
        raise InputError(f"{what} cannot be imported ({type(error).__name__}: {printable(str(error))})") from error
    if not callable(function):
        raise InputError(f"{what} is a {type(function).__name__}; it must be {expected}")
    return function
