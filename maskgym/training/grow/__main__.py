"""``python -m maskgym.training.grow``: grow the backbone ``small``."""

from __future__ import annotations

from collections.abc import Sequence

from maskgym.eval import cli
from maskgym.training.grow.language import language
from maskgym.training.grow.pools import plans
from maskgym.training.grow.run import GrowConfig
from maskgym.training.grow.tower import tower

PHASES = {"plans": plans, "tower": tower, "language": language}


def main(arguments: Sequence[str] | None = None) -> None:
    given = cli.parse(GrowConfig, arguments)
    given.check()
    PHASES[given.phase](given)


if __name__ == "__main__":
    cli.run(main, "go on with the same command")
