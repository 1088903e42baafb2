"""A plan as tables, for the terminal and as markdown: the same rows in both. Works on plan.json's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from cosmos3_pipeline.planning.summary import layout, placement, steps_in_words, tokens
from cosmos3_pipeline.planning.units import quantity

SHOWN_RANKS = 16  # of more ranks, only those that differ from the rank before are shown


@dataclass(frozen=True)
class Sheet:
    """One table: a title, column names and rows of words. All but the first column align right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets(plan: Mapping[str, Any]) -> list[Sheet]:
    """The tables of a plan: its stages, then its ranks."""
    return [_stages(plan), _ranks(plan)]


def headline(plan: Mapping[str, Any]) -> str:
    """One line: the clip, the devices, the time, and whether it fits."""
    clip, memory = plan["clip"], plan["memory"]
    free = quantity("bytes", abs(memory["limit_bytes"] - memory["peak_bytes"]))
    steps = steps_in_words(plan["steps"], plan["passes"], plan["cache"])
    fits = f"fits with {free} free" if memory["fits"] else f"DOES NOT FIT by {free}"
    return (
        f"{plan['model']} {plan['task']}, {clip['width']}x{clip['height']}, {clip['num_frames']} frames"
        f"{_in_chunks(clip)}, {tokens(clip)}, {steps}, on {len(plan['ranks'])} x "
        f"{plan['accelerator']['name']} ({layout(plan['topology'])}), weights {placement(plan['weights'])}: about "
        f"{quantity('seconds', plan['seconds']['total'])}, {fits}"
    )


def _in_chunks(clip: Mapping[str, Any]) -> str:
    return f" in {clip['chunks']} chunks of {clip['chunk_frames']}" if clip["chunks"] > 1 else ""


def _stages(plan: Mapping[str, Any]) -> Sheet:
    rows = []
    how = layout(plan["topology"])
    for name, stage in plan["stages"].items():
        slowest = max(plan["ranks"], key=lambda rank: sum(rank["stages"][name]["seconds"].values()))
        rows.append(
            (
                name,
                plan["strategies"].get(name, how),
                plan["exactness"][name],
                quantity("flops", stage["flops"]),
                quantity("bytes", stage["sent_bytes"]),
                f"{stage['sent_messages']:,}",
                quantity("seconds", stage["seconds"]),
                stage["bound"],
                ", ".join(f"{k} {quantity('seconds', s)}" for k, s in slowest["stages"][name]["seconds"].items()),
            )
        )
    rest = quantity("seconds", plan["seconds"]["rest"])
    rows.append(("rest", "file, host", "", "", "", "", rest, "", ""))
    columns = ("stage", "how", "exactness", "work", "sent", "messages", "about", "bound by", "slowest rank")
    return Sheet("stages, all ranks together", columns, tuple(rows))


def _ranks(plan: Mapping[str, Any]) -> Sheet:
    stages = list(plan["stages"])
    in_grid = plan["topology"]["cp"] != [1, 1]
    columns = ["rank", "cfg", *["cp"] * in_grid, "ulysses", "tokens", "text K/V"]
    for name in stages:
        columns += [f"{name} owns"] * ("ops" in plan["ranks"][0]["stages"][name])
        columns += [f"{name} weights", f"{name} activations", f"{name} peak"]
    rows, before = [], None
    for rank in plan["ranks"]:
        cells = [
            f"{rank['cfg']}",
            *[",".join(map(str, rank["cp"]))] * in_grid,
            f"{rank['ulysses']}",
            f"{rank['stages']['denoise']['tokens']:,}",
            quantity("bytes", rank["text_bytes"]),
        ]
        for name in stages:
            stage = rank["stages"][name]
            cells += [_owns(stage)] if "ops" in stage else []
            held = ("weight_bytes", "activation_bytes", "peak_bytes")
            cells += [quantity("bytes", stage[key]) for key in held]
        if len(plan["ranks"]) <= SHOWN_RANKS or cells != before:
            rows.append((f"{rank['rank']}", *cells))
        before = cells
    return Sheet("ranks", tuple(columns), tuple(rows))


def _owns(stage: Mapping[str, Any]) -> str:
    ops, rows, cols = stage["ops"], stage["rows"], stage["cols"]
    return f"ops {_span(ops)}{_moving(ops, stage['runs'])}, rows {_span(rows)}, cols {_span(cols)}"


def _moving(ops: Sequence[int], runs: Sequence[Sequence[int]]) -> str:
    """Text that names the `ops` which the rank does not run on every chunk; "" if there are none."""
    if not runs:
        return ""
    starts, stops = zip(*runs, strict=True)
    parts = [part for part in ((ops[0], max(starts)), (min(stops), ops[1])) if part[0] < part[1]]
    return f" ({' and '.join(map(_span, parts))} not on every chunk)" if parts else ""


def _span(bounds: Sequence[int]) -> str:
    return f"{bounds[0]}-{bounds[1] - 1}" if bounds[1] > bounds[0] else "none"


def markdown_of(sheet: Sheet) -> list[str]:
    """The lines of a table: its title, its rows, an empty line."""
    lines = [f"## {sheet.title.capitalize()}", "", f"| {' | '.join(sheet.columns)} |"]
    lines.append(f"|{'|'.join(['---'] + ['---:'] * (len(sheet.columns) - 1))}|")
    return [*lines, *(f"| {' | '.join(row)} |" for row in sheet.rows), ""]


def as_markdown(plan: Mapping[str, Any]) -> str:
    """The plan as a page of markdown."""
    lines = ["# Plan", "", f"{headline(plan)}.", ""]
    for sheet in sheets(plan):
        lines += markdown_of(sheet)
    lines += [f"- {note}" for note in _of_weights(plan)]
    lines += [f"- {name}: {note}" for name, note in plan["strategy_notes"].items()]
    lines += [f"- {note}" for note in plan["notes"]]
    return "\n".join(lines) + "\n"


def _of_weights(plan: Mapping[str, Any]) -> Iterator[str]:
    """Notes on the weights: why `auto` chose their placement, and the bytes that wait on the host."""
    if chosen := plan["weights"]["chosen"]:
        yield f"weights {placement(plan['weights'])}: {chosen}"
    waiting = max(rank["host_bytes"] for rank in plan["ranks"])
    if waiting:
        per_node = plan["topology"]["ranks_per_node"]
        yield (
            f"weights: {quantity('bytes', waiting)} wait in pinned memory of the host for each rank, "
            f"{quantity('bytes', waiting * per_node)} on a node"
        )


def show(plan: Mapping[str, Any], console: Console) -> None:
    """Print the plan to a terminal."""
    console.print(headline(plan), style="bold" if plan["memory"]["fits"] else "bold red", highlight=False)
    for sheet in sheets(plan):
        table = Table(title=sheet.title, title_justify="left")
        for i, column in enumerate(sheet.columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for note in _of_weights(plan):
        console.print(note, style="dim", highlight=False)
    for name, note in plan["strategy_notes"].items():
        console.print(f"{name}: {note}", style="dim", highlight=False)
    for note in plan["notes"]:
        console.print(f"note: {note}", style="dim", highlight=False)
