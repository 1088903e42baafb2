"""Errors that a person can act on: what is wrong, why it cannot work, what would. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

REFUSED = 2  # the exit code if what was asked for is refused before any work starts


@dataclass(frozen=True)
class Problem:
    """One problem of a composition.

    what: what is wrong, with keys and values.
    why: why it cannot work.
    works: what would work.
    set_by: the file or override that set each key in `what`, as far as it is known.
    """

    what: str
    why: str
    works: str
    set_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        set_by = f"\n  set:   {'; '.join(self.set_by)}" if self.set_by else ""
        return f"{self.what}{set_by}\n  why:   {self.why}\n  works: {self.works}"


class Portable(Exception):
    """An exception that can be pickled with its text and its fields, whatever arguments its constructor has."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (type(self), self.args, self.__dict__)


def _copied(kind: type[Portable], args: tuple[Any, ...], fields: dict[str, Any]) -> Portable:
    copy = kind.__new__(kind)
    copy.args = args
    copy.__dict__.update(fields)
    return copy


class Refusal(ValueError):
    """An error with the three parts of a Problem, for code that does not know the config's keys."""

    def __init__(self, what: str, why: str, works: str) -> None:
        self.problem = Problem(what=what, why=why, works=works)
        super().__init__(what, why, works)

    def __str__(self) -> str:
        return str(self.problem)


class Fault(Refusal):
    """A Refusal while ranks work together, for example NaN in the weights. It ends the run on all ranks."""


class ConfigError(Portable, ValueError):
    """The refusal of a composition before any work starts, with every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The word of `known` that is nearest to `word`, or None if none is near.

    A word of at least three letters that begins one name alone is short for this name.
    """
    names = sorted(set(known))
    begun = [name for name in names if len(word) >= 3 and name.startswith(word)]
    if len(begun) == 1:
        return begun[0]
    # in a short name, two swapped letters already reduce the similarity by a third
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.6 if len(word) < 5 else 0.75)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str) -> str:
    """`did you mean X?` for the nearest of `known`, or `otherwise` if none is near."""
    near = nearest(word, known)
    return f"did you mean {near}?" if near else otherwise
