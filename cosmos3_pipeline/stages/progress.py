"""How far a stage has come: what the stages report to, and the bar that a person sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Advance(Protocol):
    """Reports that `units` more are done."""

    def __call__(self, units: int = 1, /) -> None: ...


class Reporter(Protocol):
    """What a stage reports its progress to."""

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        """A block of work of `total` units, called `what` for a person."""
        ...


class Silent:
    """Reports nothing: the ranks that are not the root, and tests."""

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        yield lambda units=1: None


class Bars:
    """One line per block of work on `console`, with a bar, the count and the time."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        name = TextColumn("{task.description:<16}")
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=total)
            yield lambda units=1: progress.advance(task, units)
