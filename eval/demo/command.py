"""``python -m maskgym.eval demo``: a page in the browser, by Streamlit."""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from maskgym.backbones.encodings.encoding import EncodingBank, Query
from maskgym.envs import load_queries
from maskgym.eval import cli
from maskgym.eval.demo.comparison import Comparison
from maskgym.eval.measure.timing import first_queries
from maskgym.eval.policies import backbone_of, expectation_of

PAGE = Path(__file__).parent / "page.py"


@dataclass
class Demo(cli.Placement):
    """Show in the browser what a policy keeps: pick or upload an image, ask, and move the budget.

    The answer, the tokens kept over the image, heads x layers, FLOPs and time to first token, beside the full model
    and a baseline. Needs the extra demo: pip install 'maskgym[demo]'.

    Example: python -m maskgym.eval demo runs/first --data easy-vqa
    """

    policy: tyro.conf.Positional[str] = "even"
    """A run folder, or any other policy, as for eval run."""
    data: str = "easy-vqa"
    """Queries to pick from: a name, or a path with the columns image, question, answers."""
    split: str = "test"
    """train, validation or test."""
    queries: int = 24
    """How many, spread over the split."""
    backbone: str | None = None
    """Which VLM; by default the one that the run was trained on."""
    max_new_tokens: int = 32
    """Answers are cut there."""
    seed: int = 0
    """Of baselines that draw."""
    host: str = "127.0.0.1"
    """Address to listen on; only this machine by default. The page has no password."""
    port: int = 8501
    """Port to listen on."""
    upload_megabytes: int = 10
    """Largest upload, in millions of bytes, and"""
    upload_megapixels: float = 25.0
    """in millions of pixels."""

    def run(self) -> None:
        self._check()
        backbone = self.load(*backbone_of([self.policy], self.backbone))
        backbone.expected_answer_tokens = expectation_of([self.policy]) or backbone.expected_answer_tokens
        comparison = Comparison(self.policy, backbone, self.seed, self.max_new_tokens)
        source = load_queries(self.data, self.split).spread(self.queries)
        Served.now = Served(comparison, first_queries(EncodingBank(backbone, source), self.queries), self)
        from streamlit.web import cli as streamlit

        options = {
            "server.address": self.host,
            "server.port": self.port,
            "server.headless": True,
            "server.fileWatcherType": "none",
            "server.maxUploadSize": self.upload_megabytes,
            "browser.gatherUsageStats": False,
            "client.toolbarMode": "minimal",
            "client.showErrorDetails": "none",  # tracebacks have paths of this machine
        }
        streamlit.main(["run", str(PAGE), *(f"--{name}={value}" for name, value in options.items())])

    def _check(self) -> None:
        for option in ("queries", "max_new_tokens", "upload_megabytes"):
            if getattr(self, option) < 1:
                raise cli.InputError(f"--{option.replace('_', '-')} is {getattr(self, option)}; it must be at least 1")
        if not self.upload_megapixels > 0:
            raise cli.InputError(f"--upload-megapixels is {self.upload_megapixels:g}; it must be above 0")
        if not 1 <= self.port <= 65535:
            raise cli.InputError(f"--port is {self.port}; it must be between 1 and 65535")
        if importlib.util.find_spec("streamlit") is None:
            raise cli.InputError(
                "the demo page needs the extra demo, which is not installed: pip install 'maskgym[demo]'"
            )
        try:
            with socket.create_server((self.host, self.port)):
                pass
        except OSError as error:
            raise cli.InputError(
                f"cannot listen on {self.host}, port {self.port} ({error}); give another --port or --host"
            ) from error


@dataclass
class Served:
    """What this process shows. Streamlit runs the page anew for every visitor and change; here the page finds it.

    Attributes:
        comparison: answers.
        queries: to pick from.
        limits: the command, for the limits of uploads.
    """

    comparison: Comparison
    queries: list[Query]
    limits: Demo
    now: ClassVar[Served | None] = None
