"""The table at the end of a run: seconds and peak memory per stage, and the file of the picture."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cosmos3_pipeline.planning.text import GIVEN


def show(output: Path) -> None:
    """Print the summary of the run that left its metrics.json in `output`."""
    metrics = json.loads((output / "metrics.json").read_text())
    ranks = metrics["topology"]["ranks"]
    table = Table(title=f"{metrics['task']} with {metrics['model']} on {ranks} rank{'s' * (ranks > 1)}")
    for column in ("stage", "seconds", "peak MB per rank"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, stage in metrics["stages"].items():
        if not stage["seconds"]:  # the task does not have this stage
            continue
        peaks = ", ".join(f"{r['peak_bytes'] / 1e6:.0f}" for r in stage["ranks"])
        table.add_row(name, f"{stage['seconds']:.2f}", peaks)
    table.add_row("total", f"{metrics['seconds']:.2f}", f"{metrics['peak_bytes'] / 1e6:.0f}", style="bold")
    console = Console(markup=False)
    console.print(table)
    words = metrics["words"]
    if words is not None and words["negative_prompt_from"] != GIVEN:  # None if the stage `text` was replaced
        console.print(f"negative prompt: {words['negative_prompt_from']}", highlight=False)
    for key, changes in metrics["inputs"].items():
        for change in changes:
            console.print(f"{key}: {change['said']}", highlight=False)
    for made in filter(None, (metrics["picture"], metrics["actions"])):
        console.print(f"{output / made}", soft_wrap=True, highlight=False)
