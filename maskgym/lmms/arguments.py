"""``--model_args`` of ``--model maskgym``, and what answers with them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from maskgym.adaptive import DEFAULT_BUDGET, AdaptiveVLM
from maskgym.backbones.loading.load import DTYPES, named_dtype
from maskgym.common.errors import InputError
from maskgym.eval.measure.evaluate import Record, check_budgets
from maskgym.lmms.answering import Answering
from maskgym.lmms.recorded import Recorded, RecordFile
from maskgym.lmms.requests import Request


class Answerer(Protocol):
    """A VLM, or its answers on file.

    Attributes:
        device: where the processes of one evaluation gather what they have.
    """

    device: torch.device

    def records(self, requests: list[Request], progress: bool = False) -> list[list[Record]]: ...


@dataclass(frozen=True)
class Arguments:
    """The options, as lmms-eval has read them: numbers where they look like numbers.

    Attributes:
        pretrained: a run folder, what ``save_pretrained`` wrote, or a hub id; or else
        answers: a file of records, to have its answers scored without a VLM.
        budget: share, in (0, 1], of the full plan's LLM FLOPs; several joined by ``-``. The harness is given the
            answers under the first.
        records: a new file for the records of all requests and budgets; needed for several.
        backbone: by default the one that the controller was trained on.
        device: by default CUDA, where there is one.
        dtype: of the backbone's weights, one of ``maskgym.backbones.loading.load.DTYPES``.
        batch_size: requests answered together.
        max_batch_size: lmms-eval's, of no use here: a batch size is not searched for.
    """

    pretrained: str | None = None
    answers: str | None = None
    budget: float | str = DEFAULT_BUDGET
    records: str | None = None
    backbone: str | None = None
    device: str | None = None
    dtype: str = "auto"
    batch_size: int | str = 1
    max_batch_size: int | None = None

    @classmethod
    def read(cls, options: dict[str, Any]) -> Arguments:
        """Check the options, before anything is loaded.

        Raises:
            InputError: an unknown one, one without sense, or several that do not go together.
        """
        known = [entry.name for entry in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"model_args has the unknown option {name!r}; known: {', '.join(known)}")
        read = cls(**options)
        if read.dtype not in DTYPES:
            raise InputError(f"dtype={read.dtype} is not supported; give one of {', '.join(DTYPES)}")
        if (read.pretrained is None) == (read.answers is None):
            raise InputError(
                "model_args needs either pretrained=RUN (a run folder, a saved controller or a hub id) or answers=FILE "
                "(records of an earlier evaluation)"
            )
        if read.answers is not None and read.records is not None:
            raise InputError(f"records={read.records} has no use with answers=; leave it out")
        if len(read.budgets) > 1 and read.answers is not None:
            raise InputError(
                f"budget={read.budget} with answers=: one budget can be scored at a time; give one of them"
            )
        if len(read.budgets) > 1 and read.records is None:
            raise InputError(
                f"budget={read.budget} are several, and the harness takes the answers of one: add records=FILE for "
                "those of the others"
            )
        return read

    @property
    def budgets(self) -> tuple[float, ...]:
        """One or several.

        Raises:
            InputError: no numbers, or not in (0, 1].
        """
        try:
            return check_budgets([float(part) for part in str(self.budget).split("-")])
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"budget={self.budget} is no share in (0, 1], and no several joined by '-', such as 0.25-0.5-1"
            ) from error

    @property
    def requests_a_batch(self) -> int:
        """The batch size.

        Raises:
            InputError: none that is a whole number above 0.
        """
        given = str(self.batch_size)
        if not given.isdecimal() or int(given) < 1:
            raise InputError(f"batch_size {given!r} is not supported; give a whole number above 0")
        return int(given)

    def open(self, rank: int = 0, processes: int = 1, local_rank: int = 0) -> Answerer:
        """Load what answers.

        Args:
            rank: of this process.
            processes: that share the evaluation; each has its own file of records, and its own GPU.
            local_rank: of this process on its machine.

        Raises:
            InputError: nothing loadable there, a controller for another backbone, a device that is not there, or a file
                of records that exists.
        """
        if self.answers is not None:
            return Recorded(Path(self.answers), self.budgets)
        size, file = self.requests_a_batch, None
        if self.records is not None:
            path = Path(self.records)
            file = RecordFile(path if processes == 1 else path.with_stem(f"{path.stem}-{rank}"))
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if processes > 1 and device == "cuda":
            device = f"cuda:{local_rank}"
        vlm = AdaptiveVLM.from_pretrained(str(self.pretrained), self.backbone, device, named_dtype(self.dtype))
        return Answering(vlm.planner, vlm.backbone, self.budgets, size, file.append if file else None)
