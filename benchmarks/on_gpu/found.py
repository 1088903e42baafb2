"""The results of a step. They are written to disk after every line, because the step may be ended at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Found:
    """The tables, notes and faults of one step, in order, kept in `file`."""

    def __init__(self, file: str | Path) -> None:
        self._file = Path(file)
        self._content: dict[str, Any] = {"tables": {}, "notes": [], "wrong": []}

    def row(self, table: str, **cells: str) -> None:
        """Add a line to the table called `table`. The names of the cells are its columns."""
        self._content["tables"].setdefault(table, []).append(cells)
        self._write()

    def note(self, text: str) -> None:
        """Add a note for the reader."""
        self._content["notes"].append(text)
        self._write()

    def wrong(self, text: str) -> None:
        """Add a fault."""
        self._content["wrong"].append(text)
        self._write()

    def _write(self) -> None:
        """Replace the file in one operation, so that no reader sees half of it."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._content, indent=1), encoding="utf-8")
        partial.replace(self._file)


def read(file: Path) -> dict[str, Any]:
    """The results that a step left in `file`: tables, notes, wrong."""
    if not file.exists():
        return {"tables": {}, "notes": [], "wrong": []}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
