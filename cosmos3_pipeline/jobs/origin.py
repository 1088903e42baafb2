"""The origin of a run: the typed command, and the state of the repository in which it was started."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """How to repeat a run: `command` starts it again. `commit` and `dirty` are None outside of a git repository.

    `dirty` says that tracked files differed from the commit.
    """

    command: str
    commit: str | None
    dirty: bool | None


def origin_of(overrides: Sequence[str] | None) -> Origin:
    """The origin of a run with `overrides` that this process starts in its working directory."""
    script = Path(sys.argv[0])
    # A notebook, or a script that calls `cosmos3_pipeline.run`, has no command line for the run.
    program = f"python {script.name}" if script.stem == "launch" else "cosmos3"
    commit = _git("rev-parse", "HEAD")
    changes = None if commit is None else _git("status", "--porcelain", "--untracked-files=no")
    dirty = None if changes is None else bool(changes)
    command = "cosmos3_pipeline.run(config)" if overrides is None else f"{program} {shlex.join(overrides)}".strip()
    return Origin(command, commit, dirty)


def _git(*arguments: str) -> str | None:
    """The output of git, or None if there is no git, no repository or no commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
