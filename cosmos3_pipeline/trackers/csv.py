"""A table of all jobs in one file."""

from __future__ import annotations

import csv
import fcntl
from pathlib import Path
from typing import Any

from cosmos3_pipeline.trackers import Tracker


class Csv(Tracker):
    """A row per job in `file`: its folder, then its config, then its numbers. Jobs may end at the same time.

    A later job may add a column, which is then empty in earlier rows.
    """

    def __init__(self, file: str) -> None:
        self._file = Path(file).absolute()

    def track(self, folder: Path, config: dict[str, Any], numbers: dict[str, float]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a+", newline="", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            rows = [*csv.DictReader(stream), {"folder": str(folder), **config, **numbers}]
            columns = list(dict.fromkeys(name for row in rows for name in row))
            stream.truncate(0)
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
