"""Planning and running from Python, for example in a notebook. Importing this module imports no torch."""

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
    """The files that a run left in `folder`, and the numbers that it returned for the config key `objective`."""

    folder: Path
    objective: float | tuple[float, ...] | None

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json. Raises FileNotFoundError if the job leaves none."""
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return found

    @property
    def picture(self) -> Path | None:
        """The file of the video or the image. None if the task makes neither."""
        name = self.metrics["picture"]
        return None if name is None else self.folder / name

    @property
    def actions(self) -> Path | None:
        """The file of the predicted actions. None if the task predicts none."""
        name = self.metrics["actions"]
        return None if name is None else self.folder / name


def plan(asked: Asked = ()) -> Plan:
    """The plan of `asked`, without running it. `print` shows the plan in a few lines."""
    return check_composition(composition_of(asked)).plan()


def run(asked: Asked = (), output: str | Path | None = None) -> Run:
    """Do `asked` and leave its files in the folder `output`, by default a new folder below outputs/.

    If there are several ranks, this process starts a process for each.

    Raises:
        ConfigError: `asked` cannot be done here, and nothing was started.
        RankFailed: a rank failed; the error has the reason of that rank.
    """
    prepared = prepare(composition_of(asked))
    folder = Path(output) if output is not None else Path("outputs", f"{datetime.now():%Y-%m-%d/%H-%M-%S.%f}")
    with claimed(folder), _ranks_without_main():
        clear(folder)
        return Run(folder, jobs.run(prepared, folder, multirun=False))


@contextmanager
def _ranks_without_main() -> Iterator[None]:
    """Ranks do not import the script that starts them, so the script needs no `if __name__ == "__main__"`."""
    told = spawn.get_preparation_data

    def told_without_main(name: str) -> dict[str, Any]:
        return {key: value for key, value in told(name).items() if not key.startswith("init_main")}

    spawn.get_preparation_data = told_without_main
    try:
        yield
    finally:
        spawn.get_preparation_data = told
