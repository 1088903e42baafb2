"""Planning and running from Python, as in a notebook. Importing it imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from cosmos3_pipeline import jobs
from cosmos3_pipeline.config.shortcut import Asked, composition_of
from cosmos3_pipeline.jobs.folder import claimed, clear
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.planning.checks import check_composition
from cosmos3_pipeline.planning.plan import Plan


@dataclass(frozen=True)
class Run:
    """What a run has left in `folder`; `objective` is what it returned for the key of that name."""

    folder: Path
    objective: float | tuple[float, ...] | None

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds. Raises FileNotFoundError where the job leaves none."""
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return found

    @property
    def picture(self) -> Path | None:
        """The video or the image; None where the task makes none."""
        name = self.metrics["picture"]
        return None if name is None else self.folder / name

    @property
    def actions(self) -> Path | None:
        """The actions that were found; None where the task finds none."""
        name = self.metrics["actions"]
        return None if name is None else self.folder / name


def plan(asked: Asked = ()) -> Plan:
    """What `asked` will do, without doing it; `print` shows it in a few lines."""
    return check_composition(composition_of(asked)).plan()


def run(asked: Asked = (), output: str | Path | None = None) -> Run:
    """Do `asked` and leave its files in the folder `output`, by default one below outputs/ as `launch.py` makes.

    Several ranks are processes that this one starts.

    Raises:
        ConfigError: what is asked for cannot be done here; nothing was started.
        RankFailed: a rank failed, with its own reason.
    """
    prepared = prepare(composition_of(asked))
    folder = Path(output) if output is not None else Path("outputs", f"{datetime.now():%Y-%m-%d/%H-%M-%S.%f}")
    with claimed(folder), _ranks_without_main():
        clear(folder)
        return Run(folder, jobs.run(prepared, folder, multirun=False))


@contextmanager
def _ranks_without_main() -> Iterator[None]:
    """Ranks do not run the script that asks for them once more, so it needs no `if __name__ == "__main__"`."""
    told = spawn.get_preparation_data

    def told_without_main(name: str) -> dict[str, Any]:
        return {key: value for key, value in told(name).items() if not key.startswith("init_main")}

    spawn.get_preparation_data = told_without_main
    try:
        yield
    finally:
        spawn.get_preparation_data = told
