"""Compare two surveys of cases. The report tells each change once, and its effect on each case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cosmos3_pipeline.review.files import FileChanges
from cosmos3_pipeline.review.renames import renamed_keys
from cosmos3_pipeline.review.report import (
    ABSENT,
    COMPRESSED,
    TOTALS,
    Broken,
    Change,
    Effect,
    Report,
    direction,
    strength,
    weaker,
)

Survey = Mapping[str, Mapping[str, Any]]
# For each (overrides, keys): key -> (where its value was written, the key that was written there).
Trace = Callable[[Sequence[tuple[Sequence[str], Sequence[str]]]], list[dict[str, tuple[str, str]]]]

# Keys that decide the frames. model.recommended acts only through task and sampler.
PICTURE = ("model.", "task.", "sampler.")
NOT_PICTURE = ("model.recommended.", "model.trained.", "model.name", "task.name", "task.modality")
FILE_ONLY = ("output.crf", "output.preset", "output.encoder", "output.encoders")


_Name = tuple[str, str]  # of a change: its key, and its values as text


@dataclass
class _Pair:
    """One case on both sides. `moved` maps a key (named as in head) to (old, new)."""

    name: str
    old: Mapping[str, Any]
    new: Mapping[str, Any]
    moved: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def signature(self) -> str:
        return repr(sorted(self.moved.items(), key=lambda item: item[0]))


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its name, its survey, and a function that tells where values came from."""

    label: str
    survey: Survey
    trace: Trace


def compare(base: Side, head: Side, *, untouched: int = 0, files: FileChanges | None = None) -> Report:
    """The report of differences from `base` to `head`.

    `untouched` counts cases that are in neither survey. `files` has what the files alone tell.
    """
    files = files or FileChanges()
    pairs, broken = _match(base.survey, head.survey, files)
    refused = _refused_in_both(base.survey, head.survey)
    names = renamed_keys([(p.old["config"], p.new["config"]) for p in pairs])
    for pair in [*pairs, *refused]:
        pair.moved = _moved(pair, names)
    changes, numbers = _changes([*pairs, *refused], names, files, base.trace, head.trace)
    changes += tuple(replace(one, number=number) for number, one in enumerate(files.hydra, len(changes) + 1))
    valid = [n for n, case in head.survey.items() if "config" in case]
    came = [n for n in head.survey if n not in base.survey and n not in files.renamed.values()]
    new = [n for n in came if n in valid]
    return Report(
        base=base.label,
        head=head.label,
        compared=len(pairs) + len(broken) + untouched,
        broken=tuple(broken),
        mended=tuple(n for n in valid if "problems" in base.survey.get(n, {})),
        refused_in_both=tuple(
            n for n, c in head.survey.items() if "problems" in c and "problems" in base.survey.get(n, {})
        ),
        added=(*new, *files.new),
        added_refused={n: head.survey[n]["problems"][0]["what"] for n in came if n not in valid},
        abouts=files.abouts,
        renamed=files.renames,
        plans={n: dict(head.survey[n]["plan"] or {}) for n in new},
        removed=tuple(n for n in base.survey if n not in head.survey and not _is_option(n)),
        changes=changes,
        effects=_effects(pairs, numbers),
        notes=_notes(pairs),
    )


def _match(base: Survey, head: Survey, files: FileChanges) -> tuple[list[_Pair], list[Broken]]:
    pairs, broken = [], [Broken(n, (files.problem_of(n),), files.renamed.get(n, "")) for n in files.gone]
    for name, old in base.items():
        new, now_called = head.get(name), files.renamed.get(name, "")
        if new is None and _is_option(name):
            broken.append(Broken(name, (files.problem_of(name),), now_called))
            after = head.get(now_called, {})
            if "config" in old and "config" in after:
                pairs.append(_Pair(f"{now_called} (was {name})", old, after))
            elif "config" in old and "problems" in after:
                broken.append(Broken(f"{now_called} (was {name})", _causes(after, files)))
            continue
        if "config" not in old:
            continue
        if new is not None and _is_option(name) and old["overrides"] != new["overrides"]:
            continue  # the option that it is planned with is gone or renamed, which is reported by itself
        if new is not None and "problems" in new:
            broken.append(Broken(name, _causes(new, files)))
        elif new is not None:
            pairs.append(_Pair(name, old, new))
    return pairs, broken


def _causes(refused: Mapping[str, Any], files: FileChanges) -> tuple[dict[str, str], ...]:
    """The problems of a `refused` case, or the rename that they come from."""
    first = refused["problems"][0]["what"]
    chosen = [override.lstrip("+") for override in refused["overrides"]]
    for old in files.renamed:
        if old in chosen or first.startswith(f"{old} does not exist"):
            return (files.problem_of(old),)
    return tuple(refused["problems"])


def _refused_in_both(base: Survey, head: Survey) -> list[_Pair]:
    """Cases that are refused on both sides, although their values could be composed."""
    both = [(n, base[n], new) for n, new in head.items() if "values" in new and "values" in base.get(n, {})]
    return [
        _Pair(n, {**old, "config": old["values"], "plan": {}}, {**new, "config": new["values"], "plan": {}})
        for n, old, new in both
        if old["overrides"] == new["overrides"]
    ]


def _is_option(name: str) -> bool:
    return "=" in name


def _moved(pair: _Pair, names: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """Keys whose value differs, by their name in head. A renamed key is compared with the key of the old name."""
    old = {names.get(key, key): value for key, value in pair.old["config"].items()}
    new = pair.new["config"]
    keys = [*new, *(key for key in old if key not in new)]
    found = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys}
    return {key: values for key, values in found.items() if values[0] != values[1]}


def _changes(
    pairs: list[_Pair], names: Mapping[str, str], files: FileChanges, base: Trace, head: Trace
) -> tuple[tuple[Change, ...], dict[str, tuple[int, ...]]]:
    """All changes, and for each case, by name, the numbers of the changes that touch it."""
    was = {new: old for old, new in names.items()}
    one_of_each = {p.signature: p for p in pairs if p.moved}
    asked_old, asked_new = [], []
    for pair in one_of_each.values():
        asked_old.append(
            (pair.old["overrides"], [was.get(k, k) for k, (old, _) in pair.moved.items() if old is not ABSENT])
        )
        asked_new.append((pair.new["overrides"], [k for k, (_, new) in pair.moved.items() if new is not ABSENT]))
    traces = dict(zip(one_of_each, zip(base(asked_old), head(asked_new), strict=True), strict=True))

    told: dict[_Name, _Told] = {}
    touching: dict[str, list[_Name]] = {}
    for pair in pairs:
        if not pair.moved:
            continue
        old_places, new_places = traces[pair.signature]
        for key, (old, new) in pair.moved.items():
            root = new_places.get(key, ("", key))[1]
            if chosen := _choice_of(key, pair.moved):
                leader = (chosen, repr(pair.moved[chosen]))
                told.setdefault(leader, _Told(chosen, *pair.moved[chosen])).follows.add(key)
                continue
            if root != key and pair.moved.get(root) == (old, new):
                leader = (root, repr((old, new)))
                told.setdefault(leader, _Told(root, old, new)).follows.add(key)
                continue
            name = (key, repr((old, new)))
            entry = told.setdefault(name, _Told(key, old, new))
            entry.places[0].add(old_places.get(was.get(key, key), ("", ""))[0])
            entry.places[1].add(new_places.get(key, ("", ""))[0])
            entry.cases.append(pair.name)
            touching.setdefault(pair.name, []).append(name)
    told = _choices_told_once(told, files)
    renames = [_Told(new, ABSENT, ABSENT) for new, old in was.items() if not any(k == new for k, _ in told)]
    distinct = {id(t): t for t in told.values()}.values()
    ordered = sorted(distinct, key=lambda t: (-len(t.cases), t.key, repr((t.old, t.new))))
    places = {id(t): i for i, t in enumerate(ordered, 1)}
    numbers = {name: places[id(t)] for name, t in told.items()}
    changes = tuple(t.change(i, was.get(t.key, "")) for i, t in enumerate([*ordered, *renames], 1))
    return changes, {case: tuple(sorted({numbers[n] for n in touched})) for case, touched in touching.items()}


def _choices_told_once(told: Mapping[_Name, _Told], files: FileChanges) -> dict[_Name, _Told]:
    """`told`, where all keys that come from another option of a group are one change of the group's choice."""
    moves: dict[tuple[str, str, str], list[_Name]] = {}
    for name, one in told.items():
        if len(one.places[0]) == len(one.places[1]) == 1:
            (old, new) = (next(iter(side)).removesuffix(".yaml").rpartition("/") for side in one.places)
            group = old[0].rpartition("conf/")[2]
            renamed = files.renamed.get(f"{group}={old[2]}") == f"{group}={new[2]}"
            if old[0] == new[0] and old[2] != new[2] and not renamed:
                moves.setdefault((group, old[2], new[2]), []).append(name)
    found = dict(told)
    for (group, old_option, new_option), names in moves.items():
        if len(names) > 1:
            whole = _Told(group, old_option, new_option, told[names[0]].places)
            for one in map(told.__getitem__, names):
                whole.follows |= {one.key, *one.follows}
                whole.cases += [case for case in one.cases if case not in whole.cases]
            found |= dict.fromkeys(names, whole)
    return found


def _choice_of(key: str, moved: Mapping[str, Any]) -> str | None:
    """The changed `_target_` if `key` is a setting of the new or old strategy there; else None."""
    node, _, leaf = key.rpartition(".")
    chosen = f"{node}._target_"
    return chosen if node and leaf != "_target_" and chosen in moved else None


@dataclass
class _Told:
    """A change while it is being collected."""

    key: str
    old: Any
    new: Any
    places: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))
    follows: set[str] = field(default_factory=set)
    cases: list[str] = field(default_factory=list)

    def change(self, number: int, was: str) -> Change:
        places = tuple(tuple(sorted(p for p in side if p)) for side in self.places)
        return Change(
            number=number,
            key=self.key,
            was=was,
            old=self.old,
            new=self.new,
            places=(places[0], places[1]),
            follows=tuple(sorted(self.follows)),
            cases=tuple(self.cases),
        )


def _effects(pairs: Iterable[_Pair], numbers: Mapping[str, tuple[int, ...]]) -> tuple[Effect, ...]:
    grouped: dict[str, Effect] = {}
    for pair in pairs:
        old, new = pair.old["plan"] or {}, pair.new["plan"] or {}
        names = [*new, *(name for name in old if name not in new)] if old and new else []
        fields = {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}
        pixels = picture(pair.moved, new, fields) if pair.moved or fields else SAME
        if not fields and pixels == SAME:
            continue
        touched = numbers.get(pair.name, ())
        # Cases are told together if the reader would judge them alike; the ranges of their numbers are told.
        totals = [direction(fields.get(name, (None, None))) for name in TOTALS]
        key = repr((touched, pixels, weaker(fields), fields.get("fits"), totals))
        grouped.setdefault(key, Effect(touched, pixels, {})).cases[pair.name] = fields
    return tuple(sorted(grouped.values(), key=Effect.badness))


SAME = "same pixels"


def picture(
    moved: Mapping[str, tuple[Any, Any]], plan: Mapping[str, Any], fields: Mapping[str, tuple[Any, Any]]
) -> str:
    """The effect on the picture, in words, of the keys `moved`, the new `plan` and its changed `fields`."""
    causes = sorted(k for k in moved if k.startswith(PICTURE) and not k.startswith(NOT_PICTURE))
    causes += sorted(k for k in moved if k.startswith("stages.") and k.endswith("._target_"))
    if causes:
        return f"another picture ({', '.join(causes[:3])}{', ...' if len(causes) > 3 else ''})"
    touched = {stage for stage in ("encode", "decode") if any(k.startswith(f"vae.{stage}.") for k in moved)}
    exact = {name.rpartition(".")[2]: (value, value) for name, value in plan.items() if _is_exactness(name)}
    exact |= {name.rpartition(".")[2]: pair for name, pair in fields.items() if _is_exactness(name)}
    everywhere = bool({"layout", "ranks"} & set(fields))  # another layout sums in another order
    # Threads share a sum, so another number of threads rounds in another order.
    loose = ["another number of threads"] if "topology.threads_per_rank" in moved else []
    for stage, pair in exact.items():
        weaker = max(pair, key=strength)
        if weaker != "bitwise" and (everywhere or stage in touched or pair[0] != pair[1]):
            loose.append(f"{stage} {f'is {weaker}' if pair[1] == weaker else f'was {weaker}'}")
    if any("approximate" in words for words in loose):
        return f"another picture, close to the eye ({'; '.join(loose)})"
    if loose:
        return f"equal up to rounding ({'; '.join(loose)})"
    if any(k in FILE_ONLY for k in moved):
        return COMPRESSED
    return SAME


def _is_exactness(field: str) -> bool:
    return field.startswith("exactness.")


def _notes(pairs: Iterable[_Pair]) -> tuple[str, ...]:
    unplanned = {side for p in pairs for side in ("old", "new") if getattr(p, side)["plan"] is None}
    words = {"old": "the base's code", "new": "the head's code"}
    return tuple(f"{words[side]} makes no plan, so consequences cannot be compared" for side in sorted(unplanned))
