"""Render a report for a terminal, for one comment on a pull request, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cosmos3_pipeline.planning.units import quantity
from cosmos3_pipeline.review.report import COMPRESSED, TOTALS, Change, Effect, Report, growth

SHOWN_CASES = 4  # case names shown before "and N more"
OPEN_ROWS = 8  # rows of a markdown table before the rest is folded
# The plan's fields that have a column of their own. All other fields are listed in one column.
COLUMNS = dict(zip(("memory per rank", "seconds"), TOTALS, strict=True))


def as_json(report: Report) -> str:
    return json.dumps(report.as_dict(), indent=2, sort_keys=True)


def headline(report: Report) -> str:
    """The report in one sentence."""
    if report.compared is None:
        return "Nothing changes: code and configs say the same, so no case was composed."
    if not report.differs:
        return f"Nothing changes in {report.compared} cases."
    effects = report.effects

    def cases(wanted: Callable[[Effect], bool]) -> int:
        return sum(len(effect.cases) for effect in effects if wanted(effect))

    def moves(field: str, sign: int) -> int:
        return sum(effect.moves(field, sign) for effect in effects)

    counts = [
        (len(report.broken), "stopped composing"),
        (cases(lambda e: e.exactness_weaker), "less exact"),
        (cases(lambda e: e.stops_fitting), "no longer fit"),
        (cases(lambda e: e.pixels.startswith("another picture")), "with another picture"),
        (moves("memory.peak_bytes", 1), "with more memory"),
        (moves("memory.peak_bytes", -1), "with less memory"),
        (cases(lambda e: e.pixels == COMPRESSED), "with the same frames, compressed differently"),
        (moves("seconds.total", 1), "slower"),
        (moves("seconds.total", -1), "faster"),
        (len(report.mended), "compose again"),
    ]
    told = [f"{count} {words}" for count, words in counts if count]
    if not told:
        told = ["no case changes in memory, speed or pixels"]
    of = "The case" if report.compared == 1 else f"Of {report.compared} cases"
    return " ".join([f"{of}: {', '.join(told)}.", *_changed(report), *_from_files(report)])


def _changed(report: Report) -> Iterable[str]:
    """A sentence with the changed keys, and with their values if these are the same in all cases."""
    values: dict[str, set[str]] = {}
    for change in report.changes:
        if change.cases:
            moved = f"{change.key} from {_value(change.old)} to {_value(change.new)}"
            values.setdefault(change.key, set()).add(moved)
    if values:
        yield f"Changed: {_names([moved.pop() if len(moved) == 1 else key for key, moved in values.items()])}."


def _from_files(report: Report) -> Iterable[str]:
    """Sentences about what the files alone tell."""
    if report.renamed:
        yield f"Renamed: {_names([f'{old} -> {new}' for old, new in report.renamed.items()])}."
    if report.added or report.added_refused:
        yield f"New: {_names([*report.added, *report.added_refused])}."
    if keys := [change.key for change in report.changes if change.runs]:
        yield f"Hydra's own settings change: {_names(keys)}."


def as_text(report: Report) -> str:
    """The report for a terminal: everything, the worst first."""
    lines = [f"{report.base} -> {report.head}", headline(report), *report.notes]
    for stopped, reasons in _stopped(report):
        lines += ["", f"STOPPED COMPOSING  {_names(stopped)}", *(f"  {line}" for line in reasons)]
    for effect in report.effects:
        everywhere = len(effect.cases) == report.compared and len(effect.cases) > SHOWN_CASES
        each = _each(effect)
        few = len(effect.cases) <= OPEN_ROWS
        count = f"{len(effect.cases)} cases, listed below" if each else _names(list(effect.cases), every=few)
        cases = f"all {report.compared} cases" if everywhere else count
        lines += ["", cases, f"  pixels: {effect.pixels}"]
        lines += [f"  {name}: {_range(name, effect)}" for name in effect.fields]
        lines += [f"    {_names(names, every=True)}: {words}" for words, names in each.items()]
        lines.append(f"  because of {_because(effect)}")
    if report.changes:
        lines += ["", "changes"]
    for change in report.changes:
        lines.append(f"  [{change.number}] {_change(change, quote='')}")
        lines.append(
            f"      in {len(change.cases)} case{'s' * (len(change.cases) > 1)}: {_names(change.cases)}"
            if change.cases
            else f"      in {change.runs}"
            if change.runs
            else "      no value moved"
        )
    if new := _new(report):
        lines += ["", "new", *(f"  {name}: {words}" for name, words in new)]
    if report.measured:
        lines += ["", "measured", *(f"  {name}: {_pair(name, pair)}" for name, pair in report.measured.items())]
    for title, names in _lists(report):
        lines += ["", f"{title}: {_names(names, every=True)}"]
    return "\n".join(lines)


def as_markdown(report: Report) -> str:
    """The report for one comment on a pull request: headline, broken cases, consequences, changes."""
    lines = [
        f"### What this does to the runs: `{report.base}` -> `{report.head}`",
        "",
        f"**{headline(report)}**",
        "",
    ]
    lines += [f"> {note}" for note in report.notes]
    if report.broken:
        lines += ["#### Stopped composing", ""]
        for stopped, reasons in _stopped(report):
            lines += [f"- {_names(stopped, code=True)}"]
            lines += [f"  - {_escape(line)}" for line in reasons]
        lines.append("")
    if report.effects:
        head = ["| cases | pixels | memory per rank | seconds | also | because |", "|---|---|---|---|---|---|"]
        lines += ["#### Consequences, worst first", ""]
        lines += _folded(head, [_row(e) for e in report.effects], "more consequences")
        lines += _each_case(report)
    if report.changes:
        head = ["| | key | from | to | in | cases |", "|---|---|---|---|---|---|"]
        lines += ["#### Changes", ""]
        lines += _folded(head, [_change_row(c) for c in report.changes], "more changes")
    if new := _new(report):
        lines += ["#### New", "", *(f"- `{name}`: {_escape(words)}" for name, words in new), ""]
    if report.measured:
        rows = [f"- {name}: {_cell(_pair(name, pair))}" for name, pair in report.measured.items()]
        lines += ["#### Measured", "", *rows, ""]
    for title, names in _lists(report):
        lines += [f"**{title}:** {', '.join(f'`{n}`' for n in names)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _stopped(report: Report) -> list[tuple[list[str], list[str]]]:
    """The cases that one value stopped, and lines with the reasons; the value that stopped most cases first.

    A value may have several reasons: `task.sound=true` is refused with images and with transfer. The value is told
    once, and each reason with its cases.
    """
    values: dict[str, list[tuple[Sequence[Mapping[str, str]], list[str]]]] = {}
    for problems, stopped in report.causes:
        refused = {(problem["what"].partition(" with ")[0], problem.get("set", "")) for problem in problems}
        value = repr(refused) if len(refused) == 1 else repr(problems)
        values.setdefault(value, []).append((problems, [broken.case for broken in stopped]))
    found = []
    for reasons in values.values():
        lines = _problem_lines(reasons[0][0]) if len(reasons) == 1 else _reason_lines(reasons)
        found.append(([case for _, cases in reasons for case in cases], lines))
    return sorted(found, key=lambda one: -len(one[0]))


def _reason_lines(reasons: Sequence[tuple[Sequence[Mapping[str, str]], list[str]]]) -> list[str]:
    """A value that is refused for several reasons, and each reason with its cases."""
    told: dict[tuple[str, str, str], list[str]] = {}
    for problems, cases in reasons:
        for problem in problems:
            beside = problem["what"].partition(" with ")[2]
            told.setdefault((beside, problem["why"], problem["works"]), []).extend(cases)
    first = reasons[0][0][0]
    lines = [first["what"].partition(" with ")[0]]
    lines += [f"set: {first['set']}"] if first.get("set") else []
    for (beside, why, works), cases in told.items():
        lines += [f"with {beside} ({_names(cases)}): {why}; works: {works}"]
    return lines


def _lists(report: Report) -> Iterable[tuple[str, Sequence[str]]]:
    lists = (
        ("compose again", report.mended),
        ("cases that are gone", report.removed),
        ("refused before and after", report.refused_in_both),
    )
    return [(title, names) for title, names in lists if names]


def _new(report: Report) -> list[tuple[str, str]]:
    """Each new option or case, with when to choose it, and its plan or why it is refused alone."""
    planned = {name: _plan_words(plan) for name, plan in report.plans.items()}
    refused = {name: f"refused without more overrides: {what}" for name, what in report.added_refused.items()}
    words = {**dict.fromkeys(report.added, ""), **planned, **refused}
    return [(n, " | ".join(filter(None, [report.abouts.get(n, ""), w]))) for n, w in words.items()]


def _folded(head: list[str], rows: list[str], what: str) -> list[str]:
    lines = [*head, *rows[:OPEN_ROWS], ""]
    if rest := rows[OPEN_ROWS:]:
        lines += [f"<details><summary>{len(rest)} {what}</summary>", "", *head, *rest, "", "</details>", ""]
    return lines


def _row(effect: Effect) -> str:
    columns = [_range(name, effect) if name in effect.fields else "same" for name in COLUMNS.values()]
    others = [f"{name}: {_range(name, effect)}" for name in effect.fields if name not in COLUMNS.values()]
    names = _names(list(effect.cases), code=True)
    cells = [names, effect.pixels, *columns, "<br>".join(others) or "-", _because(effect)]
    return f"| {' | '.join(_cell(c) for c in cells)} |"


def _each_case(report: Report) -> list[str]:
    """The numbers of each case in a folded table, for consequences that several cases share."""
    told = [(words, names) for e in report.effects for words, names in _each(e).items()]
    rows = [f"| {_names(names, every=True, code=True)} | {_cell(words)} |" for words, names in told]
    if not rows:
        return []
    lines = ["<details><summary>memory and seconds of each case</summary>", "", "| case | |", "|---|---|"]
    return [*lines, *rows, "", "</details>", ""]


def _each(effect: Effect) -> dict[str, list[str]]:
    """The cases of an effect that several share, by the words for their memory and seconds; none for one case."""
    found: dict[str, list[str]] = {}
    for case, fields in effect.cases.items() if len(effect.cases) > 1 else ():
        found.setdefault(_totals(fields) or "the same memory and seconds", []).append(case)
    return found if found.keys() - {"the same memory and seconds"} else {}


def _change_row(change: Change) -> str:
    key = f"`{change.key}`" + (f" (was `{change.was}`)" if change.was else "")
    if change.follows:
        key += f"<br>moves along: {', '.join(f'`{k}`' for k in change.follows)}"
    moved = change.cases or change.runs
    values = [f"`{_value(v)}`" for v in (change.old, change.new)] if moved else ["no value moved", ""]
    cases = change.runs or _names(change.cases, code=True)
    cells = [f"[{change.number}]", key, *values, _places(change, quote="`"), cases]
    return f"| {' | '.join(_cell(c) for c in cells)} |"


def _change(change: Change, *, quote: str) -> str:
    name = f"{change.key} (was {change.was})" if change.was else change.key
    if not (change.cases or change.runs):
        return f"{name}: renamed, every value kept; {_breaks(change)}"
    words = f"{name}: {_value(change.old)} -> {_value(change.new)}"
    words += f"; {_breaks(change)}" if change.was else ""
    places = _places(change, quote=quote)
    words += f"  ({places})" if places else ""
    return words + (f"; moves along: {', '.join(change.follows)}" if change.follows else "")


def _breaks(change: Change) -> str:
    return f"command lines and other files that say {change.was} are refused from now on"


def _plan_words(plan: Mapping[str, Any]) -> str:
    """A plan in one line: ranks, layout, memory, seconds, and the weakest exactness."""
    if not plan:
        return "no plan"
    exactness = [value for name, value in plan.items() if name.startswith("exactness.")]
    weakest = next((value for value in ("approximate", "rounding") if value in exactness), "bitwise")
    memory = quantity("bytes", plan["memory.peak_bytes"])
    return (
        f"{plan['ranks']} rank{'s' * (plan['ranks'] > 1)}, {plan['layout']}, {memory} per rank"
        f"{'' if plan['fits'] else ', which DOES NOT FIT'}, about {quantity('seconds', plan['seconds.total'])}, "
        f"{weakest}"
    )


def _places(change: Change, *, quote: str) -> str:
    old, new = (", ".join(f"{quote}{p}{quote}" for p in side) for side in change.places)
    return new if old == new or not old else f"{old} -> {new}" if new else f"{old} -> nothing"


def _because(effect: Effect) -> str:
    if not effect.changes:
        return "no key: the code plans differently"
    return " ".join(f"[{number}]" for number in effect.changes)


def _problem_lines(problems: Sequence[Mapping[str, str]]) -> list[str]:
    return [
        line
        for problem in problems
        for line in (
            problem["what"],
            f"set: {problem['set']}" if problem.get("set") else "",
            f"why: {problem['why']}" if problem["why"] else "",
            f"works: {problem['works']}" if problem["works"] else "",
        )
        if line
    ]


def _pair(name: str, pair: tuple[Any, Any]) -> str:
    words = f"{quantity(name, pair[0])} -> {quantity(name, pair[1])}"
    return f"{words} ({_growth(growth(pair))})" if pair[0] and growth(pair) else words


def _growth(share: float) -> str:
    """`+12.5%`, or `14.2x` from three times the old value on. A small difference is not written as none."""
    if 0 < abs(share) < 0.0005:
        return f"{'+' if share > 0 else '-'}<0.1%"
    return f"{share:+.1%}" if share < 2 else f"{1 + share:.1f}x"


def _range(name: str, effect: Effect) -> str:
    """A field's old and new value, or the range of its changes if they differ from case to case."""
    found = effect.pairs(name)
    pairs = [pair for place, pair in enumerate(found) if pair not in found[:place]]
    where = f" (in {len(found)} of the {len(effect.cases)} cases)" if len(found) < len(effect.cases) else ""
    if len(pairs) == 1:
        return _pair(name, pairs[0]) + where
    if all(old is None and isinstance(new, int | float) for old, new in pairs):
        low, high = (quantity(name, end(new for _, new in pairs)) for end in (min, max))
        return f"- -> {low} to {high}{where}"
    if not any(map(growth, pairs)):  # words, not numbers
        return "; ".join(_pair(name, pair) for pair in pairs) + where
    moves = sorted(growth(pair) for pair in pairs)
    low, high = _growth(moves[0]), _growth(moves[-1])
    return (low if low == high else f"{low} to {high}") + where


def _totals(fields: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{words} {_pair(name, fields[name])}" for words, name in COLUMNS.items() if name in fields)


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
