"""``AdaptiveVLM``: a VLM with a trained controller, to call from one's own code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Literal, TypeGuard, overload

import torch
from PIL import Image

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Query
from maskgym.backbones.encodings.images import read_image, shown_path
from maskgym.backbones.latency_model import LatencyModel
from maskgym.backbones.loading.load import Dtype, how_to_fetch
from maskgym.common.atomic import write_json, write_text
from maskgym.common.errors import InputError, as_python, check_count, first_line
from maskgym.common.plain_files import read_records
from maskgym.common.run_folder import environment, make_folder
from maskgym.eval.measure.evaluate import Record, check_budgets
from maskgym.eval.measure.timing import how_to_calibrate, load_latency_model
from maskgym.eval.saved import DESCRIPTION, MODEL, described_backbone, followed, load_with_options
from maskgym.model_card import model_card
from maskgym.policies.adapters import save_model
from maskgym.policies.controller.learned import Controller, load_controller, planner_of, save_controller
from maskgym.policies.wrappers.milliseconds import MillisecondPlanner
from maskgym.policies.wrappers.replies import Planned, Reply, Stream

RECORDS = "result.json"
DEFAULT_BUDGET = 0.5

AnyImage = Image.Image | str | Path


class AdaptiveVLM:
    """Answers questions about images, each within a budget of its own.

    Several threads may use one at once; each gets what it would get alone. They take turns at tokenizing and at the
    vision tower, and share cores or GPU for the rest: threads serve several callers, but answer little more in a second
    than one does. A batch for ``generate`` does.

    Args:
        controller: chooses what is computed.
        backbone: answers.
        name: how it is called in its model card.
        latency_model: predicts prefill times; for budgets in milliseconds.
        records: what its training has measured; for its model card.
    """

    def __init__(
        self,
        controller: Controller,
        backbone: Backbone,
        name: str,
        latency_model: LatencyModel | None = None,
        records: Sequence[Record] = (),
    ):
        self.controller, self.backbone, self.name = controller, backbone, name
        self.latency_model, self.records = latency_model, list(records)
        self.planner = planner_of(controller, backbone, name)

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        backbone: str | Backbone | None = None,
        device: torch.device | str = "cpu",
        dtype: Dtype = "auto",
        latency_model: str | Path | None = None,
    ) -> AdaptiveVLM:
        """Load a run folder of ``train_rl.py`` or ``train_gumbel.py``, what ``save_pretrained`` wrote, or a hub id.

        Args:
            place: of the controller.
            backbone: by name, or loaded; by default the one that the controller was trained on.
            device: where a backbone is loaded to, and
            dtype: of its weights; ``"auto"`` as for ``load_backbone``.
            latency_model: a file that ``python -m maskgym.eval latency --out`` wrote on this device.

        Raises:
            InputError: nothing loadable there, a controller for another backbone, a latency model of another, or a
                shared folder whose backbone is neither in it nor on the hub.
        """
        folder = _local(str(place))
        if not isinstance(backbone, Backbone):
            own, options = described_backbone(folder)
            backbone = load_with_options(backbone or followed(folder, own), options, dtype, device)
        latency = None if latency_model is None else load_latency_model(Path(latency_model), backbone)
        return cls(load_controller(folder, backbone), backbone, Path(place).name, latency, _records(folder))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str]
        self,
        images: AnyImage,
        questions: str,
        budget: float | Sequence[float] | None = ...,
        latency_ms: float | None = ...,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        hard: bool = ...,
    ) -> Reply: ...

    @overload
    def generate(
        self,
        images: Sequence[AnyImage],
        questions: Sequence[str],
        budget: float | Sequence[float] | None = ...,
        latency_ms: float | None = ...,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        hard: bool = ...,
    ) -> list[Reply]: ...

    @overload
    def generate(
        self,
        images: AnyImage,
        questions: str,
        budget: float | None = ...,
        latency_ms: float | None = ...,
        max_new_tokens: int = ...,
        *,
        stream: Literal[True],
        hard: bool = ...,
    ) -> Stream: ...

    def generate(
        self,
        images: AnyImage | Sequence[AnyImage],
        questions: str | Sequence[str],
        budget: float | Sequence[float] | None = None,
        latency_ms: float | None = None,
        max_new_tokens: int = 32,
        stream: bool = False,
        hard: bool = False,
    ) -> Reply | list[Reply] | Stream:
        """Answer one question, or a batch, each within its own budget.

        Args:
            images: one, or B; pictures or files.
            questions: one, or B.
            budget: share, in (0, 1], of the full plan's LLM FLOPs: one for all, or one each, as numbers, an array or a
                tensor; by default a half.
            latency_ms: milliseconds of each query's prefill, in place of ``budget``.
            max_new_tokens: answers are cut there.
            stream: give the pieces of one answer as they come.
            hard: also cut an answer where its ``budget`` has no room for another token. Plans are priced at the length
                that is expected of the answer; by default one that is longer goes on.

        Returns:
            A ``Reply``, a list of B, or a ``Stream``.

        Raises:
            InputError: other numbers of images, questions and budgets than needed; a budget outside (0, 1], or below
                what the smallest plan costs; a query that the VLM cannot take.
        """
        one = isinstance(questions, str)
        questions = list(questions) if _are_several(questions) else questions
        if stream and not one:
            given = len(questions) if isinstance(questions, list) else f"a {type(questions).__name__}"
            raise InputError(f"stream=True is for one question; {given} were given: ask them one by one")
        check_count("max_new_tokens", max_new_tokens)
        if hard and latency_ms is not None:
            raise InputError("hard=True is for budgets in FLOPs, and has no effect with latency_ms; leave it out")
        queries = _queries(images, questions)
        planned = self._plan(queries, budget, latency_ms)
        if stream:
            return Stream(planned, max_new_tokens, hard)
        replies = planned.answer(max_new_tokens, hard)
        return replies[0] if one else replies

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **options: Any) -> list[Record]:
        """As a ``transformers`` pipeline: ``vlm(images=…, text=…)``, or ``vlm([{"image": …, "text": …}, …])``.

        Args:
            images: one, or B; or dicts that hold the texts too.
            text: one, or B.
            **options: of ``generate``: budget, latency_ms, max_new_tokens, hard.

        Returns:
            For each query a dict of ``input_text``, ``generated_text`` and the figures of its ``Reply``.

        Raises:
            InputError: a dict without image or text; and what ``generate`` refuses.
        """
        if text is None:
            images, text = _unpack(images)
        texts: list[Any] = list(text) if _are_several(text) else [text]
        replies = self.generate(images, texts, **options)
        return [
            {"input_text": asked, "generated_text": reply.text, **reply.figures()}
            for asked, reply in zip(texts, replies, strict=True)
        ]

    def save_pretrained(self, folder: str | Path, with_backbone: bool | None = None) -> None:
        """Write controller, model card, and perhaps the VLM, for ``from_pretrained``.

        Args:
            folder: to write to; it is made if need be.
            with_backbone: whether to write the VLM's weights too, or only its name. By default where it was loaded from
                a folder, which others do not have; without them such a VLM must be named when the controller is loaded.

        Raises:
            InputError: a place that cannot be written to.
        """
        folder = Path(folder)
        make_folder(folder)
        whole = Path(self.backbone.name).is_dir() if with_backbone is None else with_backbone
        if whole:
            save_model(self.backbone.model, self.backbone, folder / MODEL)
        save_controller(self.controller, folder, self.backbone)
        described = {
            "backbone": MODEL if whole else self.backbone.name,
            "backbone_options": self.backbone.options,
            "maskgym": environment()["maskgym"],
        }
        write_json(folder / DESCRIPTION, described)
        write_json(folder / RECORDS, self.records)
        write_text(folder / "README.md", model_card(self.name, self.backbone, whole, self.records))

    def push_to_hub(
        self, repo_id: str, with_backbone: bool | None = None, private: bool = False, token: str | None = None
    ) -> str:
        """Upload what ``save_pretrained`` writes; returns its address.

        Args:
            repo_id: ``owner/name``; it is made if need be.
            with_backbone: as in ``save_pretrained``.
            private: whether a new repository is.
            token: by default the one that ``hf auth login`` has kept.

        Raises:
            InputError: the hub cannot be reached, or refuses.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / repo_id.rpartition("/")[2]
            AdaptiveVLM(self.controller, self.backbone, repo_id, records=self.records).save_pretrained(
                folder, with_backbone
            )
            try:
                url = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder)
            except (HfHubHTTPError, OSError, ValueError) as error:
                raise InputError(
                    f"nothing was uploaded to {repo_id!r} ({first_line(error)}); log in with `hf auth login`, or use "
                    "save_pretrained and upload the folder where there is network"
                ) from error
        return str(url)

    def _plan(
        self, queries: Sequence[Query], budget: float | Sequence[float] | None, latency_ms: float | None
    ) -> Planned:
        if latency_ms is None:
            budgets = _budgets(DEFAULT_BUDGET if budget is None else budget, len(queries))
            return Planned.of(self.planner, self.backbone, queries, budgets, self.latency_model)
        latency_ms = as_python(latency_ms)
        if not isinstance(latency_ms, int | float):
            raise InputError(f"latency_ms is {latency_ms!r}; it must be one number of milliseconds")
        if budget is not None:
            raise InputError(f"budget {budget} and latency_ms {latency_ms:g} stand for each other; give one of them")
        if self.latency_model is None:
            raise InputError(
                f"latency_ms needs a latency model: make one with {how_to_calibrate(self.backbone.name)}, and give "
                "latency_model='latency.json' to from_pretrained"
            )
        timed = MillisecondPlanner(self.planner, self.backbone, self.latency_model, latency_ms)
        return Planned.of(timed, self.backbone, queries, [1.0] * len(queries), self.latency_model)


def _queries(images: AnyImage | Sequence[AnyImage], questions: str | Sequence[str]) -> list[Query]:
    texts: list[Any] = questions if isinstance(questions, list) else [questions]
    pictures: list[Any] = list(images) if _are_pictures(images) else [images]
    if not texts or len(pictures) != len(texts):
        raise InputError(f"{len(pictures)} images and {len(texts)} questions were given; give one image a question")
    rows = enumerate(zip(pictures, texts, strict=True))
    return [Query(str(row), _picture(image), question) for row, (image, question) in rows]


def _are_several(given: Any) -> TypeGuard[Iterable[Any]]:
    """Whether something is one after the other; a set has no order."""
    return isinstance(given, Iterable) and not isinstance(given, str | bytes | Set)


def _are_pictures(given: Any) -> TypeGuard[Iterable[Any]]:
    """Whether something is several pictures. An array is one, if any, and so is an open file."""
    return isinstance(given, Sequence | Iterator) and _are_several(given) and not hasattr(given, "read")


def _picture(image: Any) -> Any:
    """A file's image; what is no file is left to the query to take or to refuse."""
    return read_image(image, f"image {shown_path(str(image))!r}") if isinstance(image, str | Path) else image


def _budgets(budget: Any, rows: int) -> tuple[float, ...]:
    budget = as_python(budget)
    budgets = check_budgets([*budget] if _are_several(budget) else [budget] * rows)
    if len(budgets) != rows:
        raise InputError(f"{len(budgets)} budgets were given for {rows} questions; give one each, or one for all")
    return budgets


def _unpack(rows: Any) -> tuple[list[Any], list[str]]:
    """Images and texts of dicts."""
    rows = list(rows) if _are_several(rows) and not isinstance(rows, dict) else [rows] * (rows is not None)
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not {"image", "text"} <= row.keys():
            given = f"the keys {', '.join(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise InputError(f"input {number} is {given}; give images and text, or dicts with the keys image and text")
    return [row["image"] for row in rows], [row["text"] for row in rows]


def _local(place: str) -> Path:
    """The folder; fetched from the hub if there is none of that name."""
    if os.path.exists(place) or place.startswith((".", "/", "~")) or place.count("/") != 1:
        return Path(place)
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        hf_hub_download(place, DESCRIPTION)  # a VLM's own repository, named by mistake, is large
        return Path(snapshot_download(place))
    except Exception as error:  # no network, no such repository or file, no right to it: a kind each
        raise InputError(
            f"{place!r} is no folder here, and no controller could be fetched from the hub ({first_line(error)}); "
            f"{how_to_fetch(place)}; or give the path of a run folder"
        ) from error


def _records(folder: Path) -> list[Record]:
    """What a run has measured at its end, if it has come to it.

    Raises:
        InputError: an unreadable file.
    """
    file = folder / RECORDS
    return read_records(file) if file.is_file() else []
