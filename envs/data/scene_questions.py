"""Every question that can be asked of a scene, by kind, each with its answer and the objects it is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")

APART = 0.1
"""How far, in image sides, one thing must lie beyond another to be called left of it, or above it."""


@dataclass(frozen=True)
class Object:
    """One thing in a scene; centre in image sides from the top left."""

    shape: str
    color: str
    size: str
    x: float
    y: float

    @cached_property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    """A question, its answer, its kind, and the objects one must see to answer it.

    Attributes:
        template: the question without the names in it, perhaps with what its answer has in common with others;
            templates are balanced, and answers within a template.
    """

    text: str
    answer: str
    kind: str
    template: str
    about: tuple[Object, ...]


def make(kind: str, template: str, answer: str, about: tuple[Object, ...], gist: str = "", **names: str) -> Question:
    """A question from its template and the names in it.

    Args:
        kind: of question.
        template: text with the fields that ``names`` fill.
        answer: to it.
        about: what it is about.
        gist: what its answer has in common with others; the question is balanced as if it had a template of its own.
        names: by field.
    """
    return Question(template.format(**names), answer, kind, template + gist, about)


Asker = Callable[[list[Object]], list[Question]]


def named_once(objects: list[Object]) -> list[Object]:
    """The objects whose colour and shape no other has."""
    names = Counter(o.name for o in objects)
    return [o for o in objects if names[o.name] == 1]


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def exists(objects: list[Object]) -> list[Question]:
    """Whether there is a thing: asked of what is there, and of what differs from something there in one respect."""
    names = {o.name for o in objects}
    near = {f"{c} {o.shape}" for o in objects for c in COLORS} | {f"{o.color} {s}" for o in objects for s in SHAPES}
    questions = []
    for name in sorted(near):
        about = tuple(o for o in objects if o.name == name) or tuple(objects)
        questions.append(make("exists", "is there a {name}?", yes_no(name in names), about, name=name))
    return questions


def attribute(objects: list[Object]) -> list[Question]:
    """The colour, shape or size of a thing that other properties single out."""
    questions = []
    for o in objects:
        if sum(other.shape == o.shape for other in objects) == 1:
            questions.append(make("attribute", "what color is the {shape}?", o.color, (o,), shape=o.shape))
        if sum(other.color == o.color for other in objects) == 1:
            questions.append(make("attribute", "what shape is the {color} thing?", o.shape, (o,), color=o.color))
    return questions + [
        make("attribute", "what size is the {name}?", o.size, (o,), name=o.name) for o in named_once(objects)
    ]


def count(objects: list[Object], most: int = 3) -> list[Question]:
    """How many there are of a shape or of a colour, up to ``most``."""
    groups = [("{shape}s", shape, [o for o in objects if o.shape == shape]) for shape in SHAPES]
    groups += [("{color} things", color, [o for o in objects if o.color == color]) for color in COLORS]
    return [
        make(
            "count",
            f"how many {what} are there?",
            str(len(group)),
            tuple(group) or tuple(objects),
            shape=value,
            color=value,
        )
        for what, value, group in groups
        if len(group) <= most
    ]


def compare(objects: list[Object]) -> list[Question]:
    """More of one shape than of another; one thing larger than another."""
    questions = []
    for first, second in permutations(SHAPES, 2):
        ours, theirs = ([o for o in objects if o.shape == shape] for shape in (first, second))
        about = (*ours, *theirs) or tuple(objects)
        more = yes_no(len(ours) > len(theirs))
        questions.append(make("compare", "are there more {a}s than {b}s?", more, about, a=first, b=second))
    for a, b in permutations(named_once(objects), 2):
        larger = yes_no(a.size == "large" and b.size == "small")
        questions.append(make("compare", "is the {a} larger than the {b}?", larger, (a, b), a=a.name, b=b.name))
    return questions


SIDES = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
"""By side: the coordinate that tells, and whether it falls or rises that way."""


def gap(o: Object, anchor: Object, side: str) -> float:
    """How far ``o`` lies on that side of ``anchor``, in image sides; negative on the other side."""
    axis, sign = SIDES[side]
    return sign * (getattr(o, axis) - getattr(anchor, axis))


def relation(objects: list[Object]) -> list[Question]:
    """Whether one thing is left of, right of, above or below another; never asked where it is close."""
    return [
        make("relation", f"is the {{a}} {side} the {{b}}?", yes_no(far > 0), (a, b), a=a.name, b=b.name)
        for (a, b), side in product(permutations(named_once(objects), 2), SIDES)
        if abs(far := gap(a, b, side)) >= APART
    ]


def alone_on_a_side(objects: list[Object], apart: float = APART) -> Iterator[tuple[Object, str, Object]]:
    """Things with a name of their own, a side, and the only thing there; none within ``apart`` of that border."""
    for anchor, side in product(named_once(objects), SIDES):
        gaps = [(gap(o, anchor, side), o) for o in objects if o is not anchor]
        beyond = [o for far, o in gaps if far > 0]
        if len(beyond) == 1 and all(abs(far) >= apart for far, _ in gaps):
            yield anchor, side, beyond[0]


def two_hop(objects: list[Object], apart: float = APART) -> list[Question]:
    """The colour or shape of the only thing on one side of another."""
    return [
        make("two-hop", f"what {what} is the thing {side} the {{name}}?", answer, (anchor, only), name=anchor.name)
        for anchor, side, only in alone_on_a_side(objects, apart)
        for what, answer in (("color", only.color), ("shape", only.shape))
    ]


ASKERS: dict[str, Asker] = {
    "exists": exists,
    "attribute": attribute,
    "count": count,
    "compare": compare,
    "relation": relation,
    "two-hop": two_hop,
}
