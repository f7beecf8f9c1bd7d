"""The console command ``maskgym``: its first word says what is done, and has options of its own.

Only the module behind that word is imported, so that help and errors need not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "train-rl": ("maskgym.training.rl", "train a controller by reinforcement learning (PPO or A2C)"),
    "train-gumbel": (
        "maskgym.training.gumbel",
        "train one by relaxation (Gumbel, soft top-k), or AdaLLaVA's scheduler",
    ),
    "train-backbone": ("maskgym.training.backbone", "make a VLM elastic: train it under random plans"),
    "eval": ("maskgym.eval.__main__", "evaluate, time, tune and audit policies; run the experiments"),
    "demo": ("maskgym.eval.__main__", "show in the browser what a policy keeps: eval demo"),
}
"""By first word: the module with its ``run_command``, and a line of help."""


def main() -> None:
    """Run the command that the process was started with.

    Raises:
        SystemExit: with status 2 after one line on standard error, if there is no such command.
    """
    word, *rest = sys.argv[1:] or [""]
    if word in ("-h", "--help"):
        print(help_text())
        return
    if word not in COMMANDS:
        print(f"error: {word!r} is no command; maskgym has {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    begin, *more = ["eval", "demo"] if word == "demo" else [word]
    sys.argv = [f"maskgym {begin}", *more, *rest]  # what help and run folders call the command
    import_module(COMMANDS[word][0]).run_command()


def help_text() -> str:
    lines = [f"  {word:<15} {line}" for word, (_, line) in COMMANDS.items()]
    return "\n".join(["usage: maskgym COMMAND ...", "", *lines, "", "maskgym COMMAND --help lists its options."])


if __name__ == "__main__":
    main()
