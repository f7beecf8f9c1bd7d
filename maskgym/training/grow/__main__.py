"""``python -m maskgym.training.grow``: grow the backbone ``small``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from maskgym.common.errors import InputError
from maskgym.training.grow.language import language
from maskgym.training.grow.pools import plans
from maskgym.training.grow.run import GrowConfig
from maskgym.training.grow.tower import tower

PHASES = {"plans": plans, "tower": tower, "language": language}


def main(arguments: Sequence[str] | None = None) -> None:
    given = tyro.cli(GrowConfig, args=arguments, prog="python -m maskgym.training.grow")
    given.check()
    PHASES[given.phase](given)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
