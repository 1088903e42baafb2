"""The report of a benchmark as tables, for the terminal and as markdown to paste. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table as RichTable

from cosmos3_pipeline.jobs.bench.judge import FEWEST_ROUNDS
from cosmos3_pipeline.jobs.bench.suite import DIFFUSERS, ONE_RANK, ONE_RANK_EACH, ROOFLINE
from cosmos3_pipeline.plan.units import quantity

# A contestant that had less of a core than this in any round shared it: its times are not its own.
QUIET = 0.9

COLUMNS = (
    *("", "ranks", "seconds", "x diffusers", "x one rank", "of roofline", "peak beyond weights", "planned"),
    *("weights", "sent", "messages", "differs by"),
)


@dataclass(frozen=True)
class Table:
    """A title, columns, rows of cells and notes below them; all but the first `left` columns hold numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    notes: Sequence[str] = ()

    def filled(self) -> Table:
        """Without the columns that no row has anything in."""
        kept = [index for index in range(len(self.columns)) if any(row[index] for row in self.rows)]
        rows = [[row[index] for index in kept] for row in self.rows]
        return replace(self, columns=[self.columns[index] for index in kept], rows=rows)

    def rich(self) -> RichTable:
        """For the terminal."""
        caption = "\n".join(self.notes) or None
        table = RichTable(title=self.title, title_justify="left", caption=caption, caption_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """A heading and a table."""
        aligned = [":--" if index < self.left else "--:" for index in range(len(self.columns))]
        lines = [f"| {' | '.join(line)} |" for line in (self.columns, aligned, *self.rows)]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"### {self.title}", "", *lines, *notes])


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report, what it ran on first."""
    parts = [about(report), *(table.markdown() for table in tables(report))]
    return "\n\n".join(parts) + "\n"


def about(report: Mapping[str, Any]) -> str:
    """What the numbers of the report rest on, in a few sentences."""
    m, vae = report["machine"], report["vae"]
    versions = ", ".join(
        f"{name} {number}"
        for name, number in m["versions"].items()
        if number and name in ("torch", DIFFUSERS, "distvae")
    )
    timing = "nothing was timed"
    if counts := _rounds(report):
        spread = " to ".join(str(count) for count in sorted({counts[0], counts[-1]}))
        timing = f"medians and least to most of {spread} interleaved rounds after one warm-up"
        if counts[0] < FEWEST_ROUNDS:
            timing += f" (fewer than {FEWEST_ROUNDS}: provisional)"
    threads = f"{m['threads_per_rank']} thread{'s' * (m['threads_per_rank'] > 1)} per rank"
    threads += " on cores of its own" if all(m["pinned_to"]) else ", not pinned to cores"
    messages = ""
    if report["ranks"] > 1 and m["device"] == "cpu":
        messages = ", some or all large messages sent through gloo"
        if all(m["reads_memory"]):
            messages = ", large messages read out of the sender's memory"
    left = report["not_run"]
    unfinished = f"**Not finished.** Not run: {', '.join(left)}.\n\n" if left else ""
    without = "" if m["versions"]["matplotlib"] else "\n\nThere are no plots: matplotlib is not installed."
    return (
        f"{unfinished}"
        f"VAE of width {report['width']} ({vae['base_dim']}/{vae['decoder_base_dim']}), random weights; "
        f"{timing}; {report['ranks']} ranks, {threads}{messages}, on "
        f"{m['processor']} with {m['cores']} cores ({m['instructions']}), "
        f"load {m['load_before']:.2f} before the start; {versions}.\n\n"
        "Peak bytes are those of tensors, rank by rank, and weights those that a rank reads; what the convolution "
        "library keeps is not counted. `differs by`: the largest difference from diffusers' result in that dtype."
        f"{without}"
    )


def _rounds(report: Mapping[str, Any]) -> list[int]:
    """How many rounds each timed case had, in ascending order."""
    counts = (len(row["seconds"]) for case in report["cases"].values() for row in case["contestants"].values())
    return sorted(filter(None, counts))


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """The targets, then one table per case."""
    if report["targets"]:
        yield targets_table(report["targets"])
    for case in report["cases"].values():
        yield case_table(case)
    if report["simulated"] is not None:
        yield runs_table(report["simulated"]["runs"])
        yield speed_ups_table(report["simulated"]["speed_ups"])


def targets_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """Every target, what was measured, and whether it is met."""
    rows = [[v["case"], v["target"], *_verdict_cells(v)] for v in verdicts]
    notes = [f"{v['case']}: {v['target']}: not measured, {v['why']}" for v in verdicts if v["met"] is None]
    return Table("Targets", ("case", "target", "measured", "least to most", "met"), rows, 2, notes).filled()


def _verdict_cells(v: Mapping[str, Any]) -> list[str]:
    if v["met"] is None:
        return ["", "", "not measured"]
    spread = f"{times(v['low'])} to {times(v['high'])}" if v["low"] != v["high"] else ""
    return [times(v["value"]), spread, "yes" if v["met"] else "no"]


def times(ratio: float) -> str:
    """A ratio for a person: small ones are held against targets with two decimals, so they have three."""
    return f"{ratio:.2f}" if ratio >= 1 else f"{ratio:.3f}"


def runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """What was measured beside what is simulated from the seconds of the ops and of a message."""
    rows = []
    for run in runs:
        told = run["simulated_s"] is not None
        seconds = [f"{run['measured_s']:.3f}", f"{run['simulated_s']:.3f}" if told else ""]
        difference = f"{run['difference']:+.1%}" if told else "not simulated"
        rows.append([run["case"], run["contestant"], str(run["ranks"]), *seconds, difference])
    notes = [f"{run['case']}: {run['contestant']}: {run['why']}" for run in runs if run["why"]]
    columns = ("case", "", "ranks", "measured s", "simulated s", "difference")
    return Table("Measured and simulated", columns, rows, 2, notes)


def speed_ups_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Simulated speed-ups over one rank."""
    ranks = list(rows[0]["speed_up"])
    cells = [
        [
            row["case"],
            row["strategy"],
            *("" if row["speed_up"][n] is None else f"{row['speed_up'][n]:.2f}" for n in ranks),
        ]
        for row in rows
    ]
    notes = [
        "simulated, not measured: as if every rank had a core of its own, and memory as the measured ones had"
    ]
    title = "Simulated speed-up over one rank, by the number of ranks"
    return Table(title, ("case", "", *ranks), cells, 2, notes)


def case_table(case: Mapping[str, Any]) -> Table:
    """What every contestant of a case took, held, sent and made."""
    rows = [_contestant_cells(name, row, case["contestants"]) for name, row in case["contestants"].items()]
    notes = [f"{name}: {row['note']}" for name, row in case["contestants"].items() if row["note"]]
    notes += [f"{name} was not run: {why}" for name, why in case["absent"].items()]
    notes += _ceiling(case["contestants"])
    shares = {name: core_share(row) for name, row in case["contestants"].items() if row["seconds"]}
    starved = [f"{name} {share:.0%}" for name, share in shares.items() if share < QUIET]
    if starved:
        notes.append(f"others used the cores meanwhile, these had only a part of theirs: {', '.join(starved)}")
    return Table(case["title"], COLUMNS, rows, notes=notes).filled()


def _ceiling(contestants: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What ranks that have nothing to do with each other reach on this machine, where that was measured."""
    each, one = contestants.get(ONE_RANK_EACH), contestants.get(ONE_RANK)
    if each and one and each["seconds"]:
        ratios = [alone / own for alone, own in zip(one["seconds"], each["seconds"], strict=True)]
        work = each["ranks"] * statistics.median(ratios)
        yield (
            f"{ONE_RANK_EACH}: {each['ranks']} ranks that do not talk do {work:.2f} times the work of one in "
            "the same time, since they share memory and clock; ranks that do talk cannot do more"
        )


def core_share(row: Mapping[str, Any]) -> float:
    """The part of its time in which a contestant alone on its rank had a core; 1 of several, who also wait."""
    if row["ranks"] > 1:
        return 1.0
    shares = [own / clock for own, clock in zip(row["processor_seconds"], row["clock_seconds"], strict=True)]
    return float(min(1.0, *shares))


def _contestant_cells(name: str, row: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> list[str]:
    seconds = row["seconds"]
    if name == ROOFLINE:
        return [name, "1", f"{seconds[0]:.3f}" if seconds else "", *[""] * (len(COLUMNS) - 3)]
    times = [_ratio(others.get(other), seconds) for other in (DIFFUSERS, ONE_RANK)]
    best = others.get(ROOFLINE)
    return [
        name,
        str(row["ranks"]),
        _spread(seconds, "{:.3f}"),
        *times,
        f"{best['seconds'][0] / statistics.median(seconds):.0%}" if best and seconds and row["ranks"] == 1 else "",
        *(_per_rank(row[key]) for key in ("peak_bytes", "planned_peak_bytes", "weight_bytes")),
        *(_total(row[key], key) for key in ("sent_bytes", "sent_messages")),
        "" if row["max_abs"] is None else f"{row['max_abs']:.1e}" if row["max_abs"] else "0",
    ]


def _ratio(other: Mapping[str, Any] | None, seconds: Sequence[float]) -> str:
    if other is None or not seconds:
        return ""
    return _spread([theirs / mine for theirs, mine in zip(other["seconds"], seconds, strict=True)], "{:.2f}")


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    middle, low, high = (form.format(v) for v in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _per_rank(values: Sequence[int] | None) -> str:
    return ", ".join(quantity("bytes", value) for value in values or ())


def _total(values: Sequence[int] | None, key: str) -> str:
    total = sum(values or ())
    return quantity(key, total) if total else ""
