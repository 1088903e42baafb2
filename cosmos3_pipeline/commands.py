"""The commands of `cosmos3` beside a run. Each imports only what it needs; `cli.py` takes a second to import."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

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
# What every command imports, directly or in the end.
NEEDED = ("hydra", "torch", "diffusers")
OLDEST_PYTHON = "3.11"


def check_environment() -> None:
    """End this process with an answer if its Python lacks what every command needs.

    A user who forgot to activate the environment would otherwise see a traceback about a missing module.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if sys.version_info < tuple(map(int, OLDEST_PYTHON.split("."))):
        what, why = f"this is Python {sys.version.split()[0]}", f"the oldest that works is {OLDEST_PYTHON}"
    elif missing:
        what, why = f"{' and '.join(missing)} cannot be imported", f"{sys.executable} has no such package"
    else:
        return
    from cosmos3_pipeline.errors import REFUSED, Problem

    checkout = Path(__file__).resolve().parent.parent
    made = checkout / ".venv" / "bin" / "python"
    works = f"an environment with Python {OLDEST_PYTHON} or newer, and pip install cosmos3-pipeline in it"
    if made.exists():
        typed = ["launch.py"] if Path(sys.argv[0]).name == "launch.py" else ["-m", str(__package__)]
        works = shlex.join([str(made), *typed, *sys.argv[1:]])
    elif (checkout / "Makefile").exists():
        works = f"make run in {checkout}, which makes an environment"
    print(Problem(what, why, works), file=sys.stderr)
    sys.exit(REFUSED)


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
