"""What somebody could put into files that they share: pickles, code and names with a side effect, sizes without end."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from maskgym.backbones import InputError
from maskgym.backbones.loading.load import load_backbone
from maskgym.common.run_folder import RunFolder
from maskgym.policies.controller.learned import save_controller
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController


class Witness:
    """A folder that is there once hostile code has run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

    def pickle(self, path: Path) -> None:
        """Write a pickle that makes the folder when it is loaded."""
        path.unlink(missing_ok=True)
        torch.save({"weight": self}, path)

    def module(self, path: Path) -> None:
        """Write a module that makes the folder when it is imported, with all that could be asked of it by name."""
        path.write_text(
            f"import os\nos.mkdir({str(self.path)!r})\ndef f(*_, **__): pass\nConfig = Processor = f\n",
            encoding="utf-8",
        )


@contextmanager
def refused(witness: Witness, words: str, megabytes: int = 512, seconds: float = 5.0):
    """What is done here ends with one line, within so many CPU-seconds and memory, and without a side effect."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    now = int(status.split("VmSize:")[1].split()[0]) * 1024
    before, began = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, before[1]))
    try:
        with pytest.raises(InputError, match=words) as caught:
            yield caught
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not witness.path.exists(), "hostile code has run"
    assert time.process_time() - began < seconds
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def a_run(folder: Path, vlm: Path, **config) -> Path:
    """A run folder as a training leaves it, with a controller that fits the backbone, and further options."""
    backbone = load_backbone(str(vlm))
    folder.mkdir(parents=True)
    controller = TwoLevelController(ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=8))
    save_controller(controller, folder, backbone)
    (folder / "config.yaml").write_text(json.dumps({"backbone": str(vlm), **config}))
    assert RunFolder(folder).is_run()
    return folder


def edit(file: Path, **entries) -> None:
    """Change entries of a JSON file; one whose name is ``a__b`` is that of b in a."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    for name, value in entries.items():
        *path, last = name.split("__")
        place = fields
        for key in path:
            place = place[key]
        place[last] = value
    file.write_text(json.dumps(fields), encoding="utf-8")


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of some 80 bytes that claims to be so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
