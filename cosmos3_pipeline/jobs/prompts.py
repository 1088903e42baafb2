"""Several prompts in one run: one folder per line of the prompt file, and an index of the results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosmos3_pipeline.stages.files import write_whole

INDEX_FILE = "prompts.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PromptLine:
    """One line of the prompt file; numbers count from 1. `failed` says why the line has no picture, else None."""

    number: int
    prompt: str
    folder: str
    failed: str | None


class PromptsFailed(RuntimeError):
    """Some lines of a prompt file have no picture. The other lines have one."""


def line_folder(directory: Path, number: int) -> Path:
    """The folder for the clip of line `number` of the file (from 1): line_0001 and so on."""
    return directory / f"line_{number:04d}"


def write_index(directory: Path, lines: Mapping[int, PromptLine]) -> None:
    """Write prompts.json: every line in order, with its folder and, if it failed, the reason."""
    listed = [asdict(lines[number]) for number in sorted(lines)]
    write_whole(directory / INDEX_FILE, json.dumps({"schema_version": SCHEMA_VERSION, "lines": listed}, indent=2))


def show(output: Path) -> None:
    """Print the result of each line. Raises PromptsFailed if a line has no picture."""
    lines = json.loads((output / INDEX_FILE).read_text())["lines"]
    table = Table(title=f"{len(lines)} prompts")
    table.add_column("line", justify="right")
    table.add_column("prompt", overflow="ellipsis", max_width=60)
    table.add_column("seconds", justify="right")
    table.add_column("picture")
    for line in lines:
        if line["failed"] is not None:
            why = Text(line["failed"].splitlines()[0], style="red")
            table.add_row(str(line["number"]), line["prompt"], "", why)
            continue
        metrics = json.loads((output / line["folder"] / "metrics.json").read_text())
        picture = f"{line['folder']}/{metrics['picture'] or metrics['actions']}"
        table.add_row(str(line["number"]), line["prompt"], f"{metrics['seconds']:.2f}", picture)
    console = Console(markup=False)
    console.print(table)
    console.print(f"{output}", soft_wrap=True, highlight=False)
    failed = [line["number"] for line in lines if line["failed"] is not None]
    if failed:
        raise PromptsFailed(f"lines {failed} of {len(lines)} have no picture, see {output / INDEX_FILE}")
