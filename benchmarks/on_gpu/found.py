"""What a step has found so far, on disk after every line, because the step may be ended at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Found:
    """The tables, notes and faults of one step, in the order in which they are found, kept in `file`."""

    def __init__(self, file: str | Path) -> None:
        self._file = Path(file)
        self._content: dict[str, Any] = {"tables": {}, "notes": [], "wrong": []}

    def row(self, table: str, **cells: str) -> None:
        """A line of the table called `table`; the cells' names are its columns."""
        self._content["tables"].setdefault(table, []).append(cells)
        self._write()

    def note(self, text: str) -> None:
        """Something that a reader has to know."""
        self._content["notes"].append(text)
        self._write()

    def wrong(self, text: str) -> None:
        """Something that is not as it must be."""
        self._content["wrong"].append(text)
        self._write()

    def _write(self) -> None:
        """Replace the file at once, so that whoever reads it never sees half of it."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._content, indent=1), encoding="utf-8")
        partial.replace(self._file)


def read(file: Path) -> dict[str, Any]:
    """What a step left in `file`: tables, notes, wrong."""
    if not file.exists():
        return {"tables": {}, "notes": [], "wrong": []}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
