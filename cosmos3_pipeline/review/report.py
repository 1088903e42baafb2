"""The result of a comparison as plain data: the changes, and their effects on each case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1
UNMOVED = 0.001  # a change that is a smaller share of the value does not count
# The numbers of a plan that say most about a run.
TOTALS = ("memory.peak_bytes", "seconds.total")
COMPRESSED = "same frames, compressed differently"  # the effect of a setting of the encoder
STRENGTH = ("bitwise", "rounding", "approximate")  # exactness of a stage, strongest first


class Absent:
    """The value of a key that does not exist."""

    def __repr__(self) -> str:
        return "not there"


ABSENT = Absent()


@dataclass(frozen=True)
class Change:
    """One key with another value, told once for all `cases`.

    was: the key's earlier name if it was renamed. Its value may be the same then.
    places: the files or overrides that set the old and the new value.
    follows: the keys that changed with this key, because they refer to it.
    runs: for a key of Hydra's own node, which runs read it. No case of a survey does.
    """

    number: int
    key: str
    was: str
    old: Any
    new: Any
    places: tuple[tuple[str, ...], tuple[str, ...]]
    follows: tuple[str, ...]
    cases: tuple[str, ...]
    runs: str = ""


@dataclass(frozen=True)
class Effect:
    """A difference that some cases share.

    changes: the numbers of the changes that cause it; none if the code plans differently.
    pixels: the effect on the picture, in words.
    cases: for each case, the fields of its plan that differ, as (old, new).
    """

    changes: tuple[int, ...]
    pixels: str
    cases: dict[str, dict[str, tuple[Any, Any]]]

    @property
    def fields(self) -> list[str]:
        """The fields that differ in any case."""
        return list(dict.fromkeys(name for fields in self.cases.values() for name in fields))

    def pairs(self, field: str) -> list[tuple[Any, Any]]:
        """(old, new) of a field in every case."""
        return [fields[field] for fields in self.cases.values() if field in fields]

    @property
    def exactness_weaker(self) -> bool:
        """Whether a stage is less exact than before. A new stage does not count."""
        return any(map(weaker, self.cases.values()))

    @property
    def stops_fitting(self) -> bool:
        return (True, False) in self.pairs("fits")

    def moves(self, field: str, sign: int) -> int:
        """In how many cases a field grows (`sign` is 1) or shrinks (-1) by a share that counts."""
        return sum(direction(pair) == sign for pair in self.pairs(field))

    def growth(self, field: str) -> float:
        """The largest growth of a field in any case, as a share of its old value; negative if all shrank."""
        return max((growth(pair) for pair in self.pairs(field)), default=0.0)

    def badness(self) -> tuple[Any, ...]:
        """A sort key, worst first: exactness, memory that no longer fits, another picture, memory, seconds."""
        return (
            not self.exactness_weaker,
            not self.stops_fitting,
            not self.pixels.startswith("another picture"),
            -self.growth("memory.peak_bytes"),
            -self.growth("seconds.total"),
            list(self.cases),
        )


@dataclass(frozen=True)
class Broken:
    """A case that composed before and is refused now, or an option that is gone.

    `now_called` is the option that replaced it, if any.
    """

    case: str
    problems: tuple[dict[str, str], ...]
    now_called: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that differs between `base` and `head`, two labels.

    `compared` counts the cases. It is None if configs and code are the same, because no case is composed then.
    """

    base: str
    head: str
    compared: int | None
    broken: tuple[Broken, ...] = ()
    mended: tuple[str, ...] = ()
    refused_in_both: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    effects: tuple[Effect, ...] = ()
    notes: tuple[str, ...] = field(default=())
    # The plans of new cases, by name.
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    # When to choose each new option, in the words of its file.
    abouts: Mapping[str, str] = field(default_factory=dict)
    # New options that are refused without further overrides, with the reason.
    added_refused: dict[str, str] = field(default_factory=dict)
    # Options and whole groups with another name: old -> new.
    renamed: Mapping[str, str] = field(default_factory=dict)
    # Measurements of two runs, by name: (old, new).
    measured: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def causes(self) -> list[tuple[tuple[dict[str, str], ...], list[Broken]]]:
        """The reasons why cases no longer compose, each with these cases; the reason with most cases first.

        Cases with the same problems have one reason, such as an option that is gone.
        """
        found: dict[tuple[str, ...], list[Broken]] = {}
        for broken in self.broken:
            found.setdefault(tuple(problem["what"] for problem in broken.problems), []).append(broken)
        return sorted(((stopped[0].problems, stopped) for stopped in found.values()), key=lambda c: -len(c[1]))

    @property
    def differs(self) -> bool:
        told = (self.broken, self.mended, self.added, self.added_refused, self.removed, self.changes, self.effects)
        return any((*told, any(old != new for old, new in self.measured.values())))

    def exit_code(self, fail_on: str | None) -> int:
        """0 same, 1 differs, 2 a case stopped composing or planning.

        `fail_on` restricts 1: `plan` to a changed plan, `exactness` to a stage that is less exact. With `invalid`
        there is no 1.
        """
        if self.broken:
            return 2
        if fail_on is None:
            return int(self.differs)
        if fail_on == "plan":
            return int(any(effect.fields for effect in self.effects))
        return int(fail_on == "exactness" and any(effect.exactness_weaker for effect in self.effects))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The value of a key that does not exist is left out."""
        plain = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        for change in plain["changes"]:
            for side in ("old", "new"):
                if isinstance(change[side], Absent):
                    del change[side]
        return plain


def strength(exactness: Any) -> int:
    """A sort key, strongest exactness first."""
    return STRENGTH.index(exactness) if exactness in STRENGTH else 0


def growth(pair: tuple[Any, Any]) -> float:
    """How much larger the new value is, as a share of the old one; 0 if they are not numbers."""
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in pair):
        return 0.0
    old, new = pair
    return float((new - old) / old) if old else float(new > 0)


def direction(pair: tuple[Any, Any]) -> int:
    """1 if a number grew, -1 if it shrank, 0 if it moved by less than `UNMOVED`."""
    share = growth(pair)
    return 0 if abs(share) <= UNMOVED else 1 if share > 0 else -1


def weaker(fields: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether a stage of a case is less exact than before. A new stage does not count."""
    pairs = [pair for name, pair in fields.items() if name.startswith("exactness.")]
    return any(old in STRENGTH and strength(new) > strength(old) for old, new in pairs)
