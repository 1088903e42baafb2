"""The commands of `cosmos3` beside a run. Each imports only what it needs; `cli.py` takes a second to import."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from io import TextIOWrapper

from cosmos3_pipeline import stopping

# For each command, the module whose `main` takes the arguments and returns the exit code. These commands do not
# reach Hydra.
COMMANDS = {
    "diff": "review.command",
    "blame": "review.blame",
    "sweep-plan": "review.sweep_plan",
    "plugins": "review.plugins",
    "report": "report.command",
    "completion": "config.completion",
    "make-checkpoint": "models.make_checkpoint",
}
# The commands that write files. The others do nothing but print.
WRITERS = ("report", "make-checkpoint")


def run() -> int:
    """Run the command that this process was asked for, and return its exit code."""
    set_up_terminal()
    if sys.argv[1] not in WRITERS:
        stopping.stdout_needed()
    code: int = import_module(f"cosmos3_pipeline.{COMMANDS[sys.argv[1]]}").main(sys.argv[2:])
    return code


def set_up_terminal() -> None:
    """Make tables in a file or a pipe wide, and make every character printable.

    An ASCII terminal shows other characters as escapes, because printing a prompt must not end a finished run.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "160")
