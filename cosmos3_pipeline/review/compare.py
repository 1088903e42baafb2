"""Compare two surveys of cases. The report tells each change once, and its effect on each case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cosmos3_pipeline.review.renames import renamed_keys, renamed_options
from cosmos3_pipeline.review.report import ABSENT, Broken, Change, Effect, Report, growth, strength

Survey = Mapping[str, Mapping[str, Any]]
# For each (overrides, keys): key -> (where its value was written, the key that was written there).
Trace = Callable[[Sequence[tuple[Sequence[str], Sequence[str]]]], list[dict[str, tuple[str, str]]]]

# Keys that decide the frames. model.recommended acts only through task and sampler.
PICTURE = ("model.", "task.", "sampler.")
NOT_PICTURE = ("model.recommended.", "model.trained.", "model.name", "task.name", "task.modality")
FILE_ONLY = ("output.crf", "output.preset", "output.encoder", "output.encoders")


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


def compare(base: Side, head: Side, *, untouched: int = 0) -> Report:
    """The report of differences from `base` to `head`. `untouched` counts cases that are in neither survey."""
    options = renamed_options(base.survey, head.survey)
    pairs, broken = _match(base.survey, head.survey, options)
    names = renamed_keys([(p.old["config"], p.new["config"]) for p in pairs])
    for pair in pairs:
        pair.moved = _moved(pair, names)
    changes, numbers = _changes(pairs, names, base.trace, head.trace)
    valid = [n for n, case in head.survey.items() if "config" in case]
    new = [n for n in valid if n not in base.survey and n not in options.values()]
    return Report(
        base=base.label,
        head=head.label,
        compared=len(pairs) + len(broken) + untouched,
        broken=tuple(broken),
        mended=tuple(n for n in valid if "problems" in base.survey.get(n, {})),
        refused_in_both=tuple(
            n for n, c in head.survey.items() if "problems" in c and "config" not in base.survey.get(n, {})
        ),
        added=tuple(new),
        plans={n: dict(head.survey[n]["plan"] or {}) for n in new},
        removed=tuple(n for n in base.survey if n not in head.survey and not _is_option(n)),
        changes=changes,
        effects=_effects(pairs, numbers),
        notes=_notes(pairs),
    )


def _match(base: Survey, head: Survey, options: Mapping[str, str]) -> tuple[list[_Pair], list[Broken]]:
    pairs, broken = [], []
    for name, old in base.items():
        if "config" not in old:
            continue
        new, now_called = head.get(name), options.get(name, "")
        if new is not None and _is_option(name) and old["overrides"] != new["overrides"]:
            continue  # the option that it is planned with is gone or renamed, which is reported by itself
        if new is None and _is_option(name):
            group, _, option = name.partition("=")
            gone = {"what": f"{name} does not exist", "why": f"{group} has no option {option} any more"}
            gone["works"] = now_called or "another option"
            broken.append(Broken(name, (gone,), now_called))
        elif new is not None and "problems" in new:
            broken.append(Broken(name, tuple(new["problems"])))
        elif new is not None:
            pairs.append(_Pair(name, old, new))
        if new is None and now_called:
            pairs.append(_Pair(f"{now_called} (was {name})", old, head[now_called]))
    return pairs, broken


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
    pairs: list[_Pair], names: Mapping[str, str], base: Trace, head: Trace
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

    told: dict[tuple[str, str], _Told] = {}
    touching: dict[str, list[tuple[str, str]]] = {}
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
    renames = [_Told(new, ABSENT, ABSENT) for new, old in was.items() if not any(k == new for k, _ in told)]
    ordered = sorted(told.values(), key=lambda t: (-len(t.cases), t.key, repr((t.old, t.new))))
    numbers = {(t.key, repr((t.old, t.new))): i for i, t in enumerate(ordered, 1)}
    changes = tuple(t.change(i, was.get(t.key, "")) for i, t in enumerate([*ordered, *renames], 1))
    return changes, {case: tuple(sorted(numbers[n] for n in touched)) for case, touched in touching.items()}


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
        key = repr((touched, pixels, [(name, _kind(values)) for name, values in fields.items()]))
        grouped.setdefault(key, Effect(touched, pixels, {})).cases[pair.name] = fields
    return tuple(sorted(grouped.values(), key=Effect.badness))


def _kind(pair: tuple[Any, Any]) -> Any:
    """The key by which cases are reported together: the direction of a number, or the values themselves."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in pair)
    return growth(pair) > 0 if numbers else pair


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
        return "same frames, compressed differently"
    return SAME


def _is_exactness(field: str) -> bool:
    return field.startswith("exactness.")


def _notes(pairs: Iterable[_Pair]) -> tuple[str, ...]:
    unplanned = {side for p in pairs for side in ("old", "new") if getattr(p, side)["plan"] is None}
    words = {"old": "the base's code", "new": "the head's code"}
    return tuple(f"{words[side]} makes no plan, so consequences cannot be compared" for side in sorted(unplanned))
