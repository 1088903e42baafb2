"""Errors a person can act on: what is wrong, why it cannot work, what would. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a composition: `what` (with keys and values in it), `why`, and `works` (what would).

    `set_by` says for each key in `what` which file or override set it, as far as that is known.
    """

    what: str
    why: str
    works: str
    set_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        set_by = f"\n  set:   {'; '.join(self.set_by)}" if self.set_by else ""
        return f"{self.what}{set_by}\n  why:   {self.why}\n  works: {self.works}"


class Portable(Exception):
    """An exception whose copy in another process has its text and its fields, whatever its constructor takes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (type(self), self.args, self.__dict__)


def _copied(kind: type[Portable], args: tuple[Any, ...], fields: dict[str, Any]) -> Portable:
    copy = kind.__new__(kind)
    copy.args = args
    copy.__dict__.update(fields)
    return copy


class Refusal(ValueError):
    """What cannot be honoured, found below the config: the three parts of a Problem, as an error."""

    def __init__(self, what: str, why: str, works: str) -> None:
        self.problem = Problem(what=what, why=why, works=works)
        super().__init__(what, why, works)

    def __str__(self) -> str:
        return str(self.problem)


class Fault(Refusal):
    """A Refusal that is found while ranks work together, such as weights that are NaN: it ends the run on all."""


class ConfigError(Portable, ValueError):
    """A composition that is refused before any work starts. Holds every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that a typo most likely meant, or None."""
    # one swapped pair of letters in a short name already costs a third of the likeness
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6 if len(word) < 5 else 0.75)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str) -> str:
    """`did you mean X?` for the nearest of `known`, or `otherwise` where nothing is near."""
    near = nearest(word, known)
    return f"did you mean {near}?" if near else otherwise
