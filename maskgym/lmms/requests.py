"""lmms-eval's requests, read: what is asked, and how the answer is to be cut.

A request of a simple model has ``args`` of six: the context, how to generate (a mapping) or the continuation to score,
a function from the document to its pictures, and the document's number, task and split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from maskgym.backbones.encodings.encoding import Query
from maskgym.backbones.encodings.images import upright_rgb
from maskgym.common.errors import InputError
from maskgym.envs.data.side_by_side import side_by_side

Documents = Mapping[str, Mapping[str, Any]]
"""By task and split what can be indexed by a document's number."""

GENERATE, SCORE = "generate_until", "loglikelihood"

LONGEST = 1024
"""Tokens at which an answer is cut where the task does not say: what lmms-eval's own models do."""

GREEDY = {"do_sample": False, "temperature": 0, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
"""Options of generation whose other values would not be greedy decoding."""
WITHOUT_EFFECT = ("top_p", "top_k", "seed", "image_aspect_ratio")
"""Options that greedy decoding, and a family's own image processor, have no use for."""


class HarnessRequest(Protocol):
    """As much of ``lmms_eval.api.instance.Instance`` as is read."""

    @property
    def args(self) -> tuple[Any, ...]: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Request:
    """One request. Its pictures are fetched when they are asked for, so that a benchmark's requests fit in memory.

    Attributes:
        kind: ``GENERATE`` or ``SCORE``.
        task: its name.
        split: of the task's data.
        doc_id: the document's number there.
        context: the prompt, without a chat template.
        continuation: the text to score; empty for generation.
        max_new_tokens: the answer is cut there, and
        until: before the first of these strings.
        padding: whether it only repeats another, for processes to have equally many.
        fetch: gives the document's pictures.
    """

    kind: str
    task: str
    split: str
    doc_id: int | str
    context: str
    continuation: str
    max_new_tokens: int
    until: tuple[str, ...]
    padding: bool
    fetch: Callable[[], Sequence[Any] | None]

    @classmethod
    def to_generate(cls, request: HarnessRequest, documents: Documents) -> Request:
        """Read a request of ``generate_until``.

        Raises:
            InputError: an option of generation that is unknown, or would not be greedy.
        """
        context, options, doc_to_visual, doc_id, task, split = request.args
        max_new_tokens, until = _cuts(options or {}, task)
        fetch = _fetcher(doc_to_visual, documents, task, split, doc_id)
        return cls(GENERATE, task, split, doc_id, context, "", max_new_tokens, until, _is_padding(request), fetch)

    @classmethod
    def to_score(cls, request: HarnessRequest, documents: Documents) -> Request:
        """Read a request of ``loglikelihood``.

        Raises:
            InputError: a request without a document, which has no picture.
        """
        if len(request.args) != 6:
            raise InputError(
                f"a loglikelihood request without a picture (context {request.args[0]!r:.80}, as acc_mutual_info makes "
                "them) cannot be scored: every query needs one image; choose another metric"
            )
        context, target, doc_to_visual, doc_id, task, split = request.args
        continuation = target if isinstance(target, str) else str(target(documents[task][split][doc_id]))
        fetch = _fetcher(doc_to_visual, documents, task, split, doc_id)
        return cls(SCORE, task, split, doc_id, context, continuation, 1, (), _is_padding(request), fetch)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.task}/{self.split}/{self.doc_id}"

    def asked(self) -> dict[str, Any]:
        """What records say of it; equal for requests that have the same answer."""
        named = {"task": self.task, "split": self.split, "doc_id": self.doc_id, "request": self.kind}
        texts = {"context": self.context, "continuation": self.continuation}
        return {**named, **texts, "max_new_tokens": self.max_new_tokens, "until": list(self.until)}

    def query(self) -> Query:
        """Its picture and context; two pictures are put side by side.

        Raises:
            InputError: no picture, more than two, or something else than pictures; the message names the request.
        """
        given = list(self.fetch() or [])
        for one in given:
            if not isinstance(one, Image.Image):
                raise InputError(
                    f"request {self.name!r} comes with a {type(one).__name__}; images are supported, video and audio "
                    "are not: leave the task out"
                )
        if not given:
            raise InputError(
                f"request {self.name!r} is text alone; every query needs one image: leave the task out, or take its "
                "variant with images"
            )
        if len(given) > 2:
            raise InputError(
                f"request {self.name!r} has {len(given)} images; one is supported, and two side by side: leave the "
                "task out"
            )
        pictures = [upright_rgb(one, f"an image of request {self.name!r}") for one in given]
        return Query(self.name, pictures[0] if len(pictures) == 1 else side_by_side(*pictures), self.context)

    def cut(self, answer: str) -> str:
        """The answer before the first of the strings that end it."""
        return answer[: min((answer.find(end) for end in self.until if end in answer), default=len(answer))]


def _fetcher(
    doc_to_visual: Callable[[Any], Sequence[Any] | None], documents: Documents, task: str, split: str, doc_id: Any
) -> Callable[[], Sequence[Any] | None]:
    return lambda: doc_to_visual(documents[task][split][doc_id])


def _is_padding(request: HarnessRequest) -> bool:
    return bool(request.metadata.get("__padding_only__"))


def _cuts(options: Mapping[str, Any], task: str) -> tuple[int, tuple[str, ...]]:
    """Where answers are cut: a number of tokens, and strings.

    Raises:
        InputError: an option that is unknown, has no sense, or would not be greedy.
    """
    for name, value in options.items():
        if name in GREEDY and value is not None and not _is_greedy(name, options):
            raise InputError(
                f"task {task!r} asks for {name}={value}; answers are greedy here: add --gen_kwargs "
                f"{name}={GREEDY[name]}, or leave the task out"
            )
        if name not in (*GREEDY, *WITHOUT_EFFECT, "max_new_tokens", "until"):
            raise InputError(
                f"task {task!r} asks for {name}={value}, which is not supported; known are max_new_tokens, until, "
                f"{', '.join((*GREEDY, *WITHOUT_EFFECT))}: leave the task out"
            )
    longest, until = options.get("max_new_tokens"), options.get("until") or ()
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise InputError(f"task {task!r} asks for max_new_tokens={longest}; it must be a whole number above 0")
    return longest or LONGEST, (until,) if isinstance(until, str) else tuple(end for end in until if end)


def _is_greedy(name: str, options: Mapping[str, Any]) -> bool:
    """Whether an option leaves decoding greedy; a temperature of 0 does so whatever ``do_sample`` says."""
    return options[name] == GREEDY[name] or (name == "do_sample" and options.get("temperature") == 0)
