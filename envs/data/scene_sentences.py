"""Questions about a scene whose answers are lists, phrases and sentences, by kind; each has one right answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, permutations
from operator import attrgetter, itemgetter

from maskgym.envs.data.scene_questions import (
    COLORS,
    SHAPES,
    Asker,
    Object,
    Question,
    alone_on_a_side,
    make,
    named_once,
    yes_no,
)

CLEAR = 0.04
"""How far, in image sides, two things must differ in what puts one before the other: place, or distance."""

SIZES = ("small", "large")
ORDERS = {"from left to right": "x", "from top to bottom": "y"}


def _noun(count: int, one: str) -> str:
    """A count and what is counted, as in "1 square" or "3 circles"."""
    return f"{count} {one}" if count == 1 else f"{count} {one}s"


def _phrase(o: Object) -> str:
    return f"a {o.size} {o.name}"


def _having(objects: list[Object], attribute: str, value: str) -> list[Object]:
    return [o for o in objects if getattr(o, attribute) == value]


def listing(objects: list[Object]) -> list[Question]:
    """The colours of a shape's things, the shapes of a colour's, or the names of a size's, two to six in a row."""
    groups = [("colors of the {value}s", "color", "shape", shape) for shape in SHAPES]
    groups += [("shapes of the {value} things", "shape", "color", color) for color in COLORS]
    groups += [("{value} things", "name", "size", size) for size in SIZES]
    questions = []
    for what, told, attribute, value in groups:
        group = _having(objects, attribute, value)
        for order, axis in ORDERS.items() if 2 <= len(group) <= 6 else ():
            row = sorted(group, key=attrgetter(axis))
            if all(getattr(b, axis) - getattr(a, axis) >= CLEAR for a, b in pairwise(row)):
                answer = ", ".join(getattr(o, told) for o in row)
                template, gist = f"list the {what} {order}.", f" {len(row)}"
                questions.append(make("list", template, answer, tuple(row), gist, value=value))
    return questions


def _nearest(objects: list[Object], to: Object) -> Object | None:
    """The other thing whose centre is nearest; None where two are about as near."""
    by_distance = sorted(((math.hypot(o.x - to.x, o.y - to.y), o) for o in objects if o is not to), key=itemgetter(0))
    (first, nearest), (second, _) = by_distance[:2]
    return nearest if second - first >= CLEAR else None


def _direction(o: Object, anchor: Object) -> str | None:
    """On which side of ``anchor`` it mostly lies; None where two sides are about as true."""
    across, down = o.x - anchor.x, o.y - anchor.y
    if abs(abs(across) - abs(down)) < CLEAR:
        return None
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def describe(objects: list[Object]) -> list[Question]:
    """A thing with its size, and where it lies to the thing nearest to it."""
    named = named_once(objects)
    questions = []
    for o in named:
        nearest = _nearest(objects, o)
        side = _direction(o, nearest) if nearest else None
        if nearest in named and side:
            answer = f"{_phrase(o)} {side} the {nearest.name}"
            gist = f" {o.size} {side}"
            questions.append(make("describe", "describe the {name}.", answer, (o, nearest), gist, name=o.name))
    return questions


def which(objects: list[Object]) -> list[Question]:
    """The only thing on one side of another, or the nearest to it, as a phrase."""
    questions = [
        make("which", f"what is {side} the {{name}}?", _phrase(only), (anchor, only), name=anchor.name)
        for anchor, side, only in alone_on_a_side(objects, CLEAR)
    ]
    for o in named_once(objects):
        nearest = _nearest(objects, o)
        if nearest is not None:
            questions.append(
                make("which", "what is nearest to the {name}?", _phrase(nearest), (o, nearest), name=o.name)
            )
    return questions


def _counted(group: list[Object], attribute: str) -> str:
    """How many there are of each, as in "3 circles and 2 triangles", in the order of ``SHAPES`` or ``COLORS``;
    empty for fewer than two kinds."""
    counts = Counter(getattr(o, attribute) for o in group)
    if attribute == "shape":
        parts = [_noun(counts[shape], shape) for shape in SHAPES if counts[shape]]
    else:
        parts = [f"{counts[color]} {color}" for color in COLORS if counts[color]]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else ""


def tally(objects: list[Object]) -> list[Question]:
    """How many there are of each shape or colour, of all things or of some."""
    groups = [("things of each shape", "shape", "", objects), ("things of each color", "color", "", objects)]
    for size in SIZES:
        things = _having(objects, "size", size)
        groups += [(f"{{size}} things of each {told}", told, size, things) for told in ("shape", "color")]
    groups += [("{shape}s of each color", "color", shape, _having(objects, "shape", shape)) for shape in SHAPES]
    groups += [("{color} things of each shape", "shape", color, _having(objects, "color", color)) for color in COLORS]
    return [
        make("tally", f"how many {what} are there?", answer, tuple(things), size=value, shape=value, color=value)
        for what, told, value, things in groups
        if (answer := _counted(things, told))
    ]


def why(objects: list[Object]) -> list[Question]:
    """Whether there are more of one kind than of another, or one thing is larger than another, with the reason."""
    return [
        *_why_more(objects, "shape", SHAPES, "{}"),
        *_why_more(objects, "color", COLORS, "{} thing"),
        *_why_larger(objects),
    ]


def _why_more(objects: list[Object], attribute: str, values: tuple[str, ...], noun: str) -> Iterator[Question]:
    template = f"are there more {noun.format('{a}')}s than {noun.format('{b}')}s, and why?"
    groups = {value: _having(objects, attribute, value) for value in values}
    for a, b in permutations(values, 2):
        ours, theirs = groups[a], groups[b]
        if ours or theirs:
            more = yes_no(len(ours) > len(theirs))
            counts = f"{_noun(len(ours), noun.format(a))} and {_noun(len(theirs), noun.format(b))}"
            gist = f" {len(ours)} {len(theirs)}"
            yield make(
                "why",
                template,
                f"{more}, because there {'is' if len(ours) == 1 else 'are'} {counts}",
                (*ours, *theirs),
                gist,
                a=a,
                b=b,
            )


def _why_larger(objects: list[Object]) -> Iterator[Question]:
    for a, b in permutations(named_once(objects), 2):
        same = a.size == b.size
        reason = f"both are {a.size}" if same else f"the {a.name} is {a.size} and the {b.name} is {b.size}"
        answer = f"{yes_no(a.size == 'large' and not same)}, because {reason}"
        gist = f" {a.size} {b.size}"
        yield make("why", "is the {a} larger than the {b}, and why?", answer, (a, b), gist, a=a.name, b=b.name)


SENTENCE_ASKERS: dict[str, Asker] = {
    "list": listing,
    "describe": describe,
    "which": which,
    "tally": tally,
    "why": why,
}
