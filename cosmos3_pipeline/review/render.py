"""A report in words: for a terminal, for one comment on a pull request, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cosmos3_pipeline.plan.units import quantity
from cosmos3_pipeline.review.report import Broken, Change, Effect, Report

SHOWN_CASES = 4  # of a list of case names, before "and N more"
OPEN_ROWS = 8  # of a table in markdown, before the rest is folded
# The plan's fields that get a column of their own; all others are told one by one.
COLUMNS = {"memory per rank": "memory.peak_bytes", "seconds": "seconds.total"}


def as_json(report: Report) -> str:
    return json.dumps(report.as_dict(), indent=2, sort_keys=True)


def headline(report: Report) -> str:
    """The report in one sentence."""
    if not report.differs:
        return f"Nothing changes in {report.compared} cases."
    effects = report.effects

    def cases(wanted: Callable[[Effect], bool]) -> int:
        return sum(len(effect.cases) for effect in effects if wanted(effect))

    def grows(field: str, sign: int) -> Callable[[Effect], bool]:
        def test(effect: Effect) -> bool:
            old, new = effect.fields.get(field, (0, 0))
            return bool((new - old) * sign > 0)

        return test

    counts = [
        (len(report.broken), "stopped composing"),
        (cases(lambda e: e.exactness_weaker), "less exact"),
        (cases(lambda e: e.stops_fitting), "no longer fit"),
        (cases(lambda e: e.pixels.startswith("another picture")), "with another picture"),
        (cases(grows("memory.peak_bytes", 1)), "with more memory"),
        (cases(grows("memory.peak_bytes", -1)), "with less memory"),
        (cases(grows("seconds.total", 1)), "slower"),
        (cases(grows("seconds.total", -1)), "faster"),
        (len(report.mended), "compose again"),
        (len(report.added), "new"),
    ]
    told = [f"{count} {words}" for count, words in counts if count]
    if not told:
        told = ["no case changes in memory, speed or pixels"]
    return f"Of {report.compared} cases: {', '.join(told)}."


def as_text(report: Report) -> str:
    """For a terminal: everything, worst first."""
    lines = [f"{report.base} -> {report.head}", headline(report), *report.notes]
    for broken in report.broken:
        lines += ["", f"STOPPED COMPOSING  {broken.case}", *(f"  {line}" for line in _problem_lines(broken))]
    for effect in report.effects:
        lines += ["", _names(effect.cases, every=True), f"  pixels: {effect.pixels}"]
        lines += [f"  {name}: {_pair(name, pair)}" for name, pair in effect.fields.items()]
        lines.append(f"  because of {_because(effect)}")
    if report.changes:
        lines += ["", "changes"]
    for change in report.changes:
        lines.append(f"  [{change.number}] {_change(change, quote='')}")
        lines.append(
            f"      in {len(change.cases)} cases: {_names(change.cases)}"
            if change.cases
            else "      no value moved"
        )
    for title, names in _lists(report):
        lines += ["", f"{title}: {_names(names, every=True)}"]
    return "\n".join(lines)


def as_markdown(report: Report) -> str:
    """For one comment on a pull request: the sentence, what broke, the consequences, then the changes."""
    lines = [
        f"### What this does to the runs: `{report.base}` -> `{report.head}`",
        "",
        f"**{headline(report)}**",
        "",
    ]
    lines += [f"> {note}" for note in report.notes]
    if report.broken:
        lines += ["#### Stopped composing", ""]
        for broken in report.broken:
            lines += [f"- `{broken.case}`", *(f"  - {_escape(line)}" for line in _problem_lines(broken))]
        lines.append("")
    if report.effects:
        head = ["| cases | pixels | memory per rank | seconds | also | because |", "|---|---|---|---|---|---|"]
        lines += ["#### Consequences, worst first", ""]
        lines += _folded(head, [_row(e) for e in report.effects], "more cases")
    if report.changes:
        head = ["| | key | from | to | in | cases |", "|---|---|---|---|---|---|"]
        lines += ["#### Changes", ""]
        lines += _folded(head, [_change_row(c) for c in report.changes], "more changes")
    for title, names in _lists(report):
        lines += [f"**{title}:** {', '.join(f'`{n}`' for n in names)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _lists(report: Report) -> Iterable[tuple[str, Sequence[str]]]:
    lists = (
        ("compose again", report.mended),
        ("new cases", report.added),
        ("cases that are gone", report.removed),
        ("refused before and after", report.refused_in_both),
    )
    return [(title, names) for title, names in lists if names]


def _folded(head: list[str], rows: list[str], what: str) -> list[str]:
    lines = [*head, *rows[:OPEN_ROWS], ""]
    if rest := rows[OPEN_ROWS:]:
        lines += [f"<details><summary>{len(rest)} {what}</summary>", "", *head, *rest, "", "</details>", ""]
    return lines


def _row(effect: Effect) -> str:
    columns = [_pair(name, effect.fields[name]) if name in effect.fields else "same" for name in COLUMNS.values()]
    if not effect.fields:
        columns = ["same", "same"]
    others = [f"{n}: {_pair(n, p)}" for n, p in effect.fields.items() if n not in COLUMNS.values()]
    cells = [
        _names(effect.cases, code=True),
        effect.pixels,
        *columns,
        "<br>".join(others) or "-",
        _because(effect),
    ]
    return f"| {' | '.join(_cell(c) for c in cells)} |"


def _change_row(change: Change) -> str:
    key = f"`{change.key}`" + (f" (was `{change.was}`)" if change.was else "")
    if change.follows:
        key += f"<br>moves along: {', '.join(f'`{k}`' for k in change.follows)}"
    values = [f"`{_value(v)}`" for v in (change.old, change.new)] if change.cases else ["no value moved", ""]
    cells = [f"[{change.number}]", key, *values, _places(change, quote="`"), _names(change.cases, code=True)]
    return f"| {' | '.join(_cell(c) for c in cells)} |"


def _change(change: Change, *, quote: str) -> str:
    name = f"{change.key} (was {change.was})" if change.was else change.key
    if not change.cases:
        return f"{name}: renamed, every value kept"
    words = f"{name}: {_value(change.old)} -> {_value(change.new)}  ({_places(change, quote=quote)})"
    return words + (f"; moves along: {', '.join(change.follows)}" if change.follows else "")


def _places(change: Change, *, quote: str) -> str:
    old, new = (", ".join(f"{quote}{p}{quote}" for p in side) for side in change.places)
    return new if old == new or not old else f"{old} -> {new}" if new else f"{old} -> nothing"


def _because(effect: Effect) -> str:
    if not effect.changes:
        return "no key: the code plans differently"
    return " ".join(f"[{number}]" for number in effect.changes)


def _problem_lines(broken: Broken) -> list[str]:
    return [
        line
        for problem in broken.problems
        for line in (
            problem["what"],
            f"why: {problem['why']}" if problem["why"] else "",
            f"works: {problem['works']}" if problem["works"] else "",
        )
        if line
    ]


def _pair(name: str, pair: tuple[Any, Any]) -> str:
    old, new = pair
    words = f"{quantity(name, old)} -> {quantity(name, new)}"
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in pair)
    if numbers and old and name.rpartition(".")[2] != "ranks":
        words += f" ({(new - old) / old:+.1%})"
    return words


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | bool) or value is None else str(value)


def _names(names: Sequence[str], *, every: bool = False, code: bool = False) -> str:
    quote = "`" if code else ""
    shown = names if every else names[:SHOWN_CASES]
    words = ", ".join(f"{quote}{n}{quote}" for n in shown)
    return words + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _cell(text: str) -> str:
    return _escape(text).replace("\n", " ")


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
