"""Optional tracking by Weights & Biases: off unless asked, offline without a key, never in the way."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Tracker:
    """Sends metrics to wandb, or does nothing.

    Args:
        project: wandb project; None switches tracking off.
        folder: where wandb may write.
        config: the run's options.
        group: what ties runs together there.
    """

    def __init__(self, project: str | None, folder: Path, config: dict[str, Any], group: str | None = None):
        self.run: Any = None
        if project is None:
            return
        import wandb

        online = bool(os.environ.get("WANDB_API_KEY")) or os.path.exists(os.path.expanduser("~/.netrc"))
        mode: Any = os.environ.get("WANDB_MODE", "online" if online else "offline")
        settings = wandb.Settings(silent=True, init_timeout=20)
        try:
            self.run = wandb.init(
                project=project,
                group=group,
                name=folder.name,
                dir=str(folder),
                config=config,
                mode=mode,
                settings=settings,
            )
        except Exception as error:  # no network, a bad key: the run goes on without tracking
            print(f"wandb is not available ({error}); going on without it", file=sys.stderr)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def report(self, figures: Mapping[str, float], tables: Mapping[str, Sequence[Sequence[str]]], page: Path) -> None:
        """What an experiment found.

        Args:
            figures: for the run's summary, by name.
            tables: by name, rows of cells, the first row the head.
            page: an HTML file.
        """
        if self.run is None:
            return
        import wandb

        sent = {
            name: wandb.Table(columns=list(head), data=[list(row) for row in rows])
            for name, (head, *rows) in tables.items()
        }
        self.run.log({**sent, page.stem: wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        self.run.summary.update(dict(figures))

    def finish(self, images: dict[str, Path]) -> None:
        if self.run is None:
            return
        import wandb

        self.run.log({name: wandb.Image(str(path)) for name, path in images.items()})
        self.run.finish()
