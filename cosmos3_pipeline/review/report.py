"""What a comparison found: the changes that were made, and what each case gets from them. Plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1
STRENGTH = ("bitwise", "rounding", "approximate")  # of a stage's exactness, strongest first


class Absent:
    """Stands for the value of a key that is not there."""

    def __repr__(self) -> str:
        return "not there"


ABSENT = Absent()


@dataclass(frozen=True)
class Change:
    """One key that has another value, told once for all `cases`.

    `was` is the key's name before where it was renamed (its value may be the same then), `places` the files or
    overrides that provide the old and the new value, `follows` the keys that refer to this one and moved along.
    """

    number: int
    key: str
    was: str
    old: Any
    new: Any
    places: tuple[tuple[str, ...], tuple[str, ...]]
    follows: tuple[str, ...]
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Effect:
    """What became different for some cases in the same way: `cases` maps each to its plan's fields, (old, new).

    `pixels` says in words what happens to the picture, `changes` the numbers of the changes behind it; none
    means that the code plans differently.
    """

    changes: tuple[int, ...]
    pixels: str
    cases: dict[str, dict[str, tuple[Any, Any]]]

    @property
    def fields(self) -> list[str]:
        """The fields that differ, the same ones in every case."""
        return list(next(iter(self.cases.values())))

    def pairs(self, field: str) -> list[tuple[Any, Any]]:
        """(old, new) of a field in every case."""
        return [fields[field] for fields in self.cases.values() if field in fields]

    @property
    def exactness_weaker(self) -> bool:
        """Whether a stage promises less than before; one that was not there had promised nothing."""
        pairs = [pair for name in self.fields if name.startswith("exactness.") for pair in self.pairs(name)]
        return any(old in STRENGTH and strength(new) > strength(old) for old, new in pairs)

    @property
    def stops_fitting(self) -> bool:
        return (True, False) in self.pairs("fits")

    def growth(self, field: str) -> float:
        """The most by which a field became larger, as a share of what it was; negative where all shrank."""
        return max((growth(pair) for pair in self.pairs(field)), default=0.0)

    def badness(self) -> tuple[Any, ...]:
        """Sorts the worst first: exactness, memory that no longer fits, another picture, memory, seconds."""
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
    """A case that composed before and is refused now. `now_called` is the option that took its place, if any."""

    case: str
    problems: tuple[dict[str, str], ...]
    now_called: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that differs between `base` and `head`, two labels.

    `compared` counts the cases; None where configs and code are the same, so that no case was composed.
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
    # What new cases do: their plans by name.
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    # What two runs have measured, by name: (old, new).
    measured: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def causes(self) -> list[tuple[tuple[dict[str, str], ...], list[Broken]]]:
        """What stopped cases from composing, each with the cases that it stopped; the most first.

        An option that is gone is one cause, wherever it was named.
        """
        found: dict[tuple[str, ...], list[Broken]] = {}
        for broken in self.broken:
            found.setdefault(tuple(problem["what"] for problem in broken.problems), []).append(broken)
        return sorted(((stopped[0].problems, stopped) for stopped in found.values()), key=lambda c: -len(c[1]))

    @property
    def differs(self) -> bool:
        told = (self.broken, self.mended, self.added, self.removed, self.changes, self.effects)
        return any((*told, any(old != new for old, new in self.measured.values())))

    def exit_code(self, fail_on: str | None) -> int:
        """0 same, 1 differs, 2 a case stopped composing or planning.

        With `fail_on` 1 is given only for: `plan` an effect that the plan sees, `exactness` a weaker promise,
        `invalid` never.
        """
        if self.broken:
            return 2
        if fail_on is None:
            return int(self.differs)
        if fail_on == "plan":
            return int(any(effect.fields for effect in self.effects))
        return int(fail_on == "exactness" and any(effect.exactness_weaker for effect in self.effects))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a value that is not there is left out."""
        plain = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        for change in plain["changes"]:
            for side in ("old", "new"):
                if isinstance(change[side], Absent):
                    del change[side]
        return plain


def strength(exactness: Any) -> int:
    """Sorts the strongest promise first."""
    return STRENGTH.index(exactness) if exactness in STRENGTH else 0


def growth(pair: tuple[Any, Any]) -> float:
    """How much larger the new value is, as a share of the old one; 0 for what is not a number."""
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in pair):
        return 0.0
    old, new = pair
    return float((new - old) / old) if old else float(new > 0)
