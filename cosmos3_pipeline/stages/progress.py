"""The progress of a stage: the reporters that stages call, and the bar that a person sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# A console that is no terminal cannot move a bar. It gets a plain line about long work this often.
SECONDS_BETWEEN_LINES = 30.0


class Advance(Protocol):
    """Reports that `units` more are done."""

    def __call__(self, units: int = 1, /) -> None: ...


class Reporter(Protocol):
    """Receives the progress of a stage."""

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        """A block of work of `total` units, which the user sees as `what`."""
        ...


class Silent:
    """Reports nothing. Ranks other than the root use it, and tests."""

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        yield lambda units=1: None


class Bars:
    """One line per block of work on `console`, with a bar, the count and the time.

    If the console is no terminal, the bar is printed only at the end, and plain lines report the progress before.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        name = TextColumn("{task.description:<16}")
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=total)
            started = told = self._clock()

            def advance(units: int = 1) -> None:
                nonlocal told
                progress.advance(task, units)
                now, done = self._clock(), int(progress.tasks[0].completed)
                if not self._console.is_terminal and done < total and now - told >= SECONDS_BETWEEN_LINES:
                    told = now
                    self._console.print(f"{what}: {done} of {total} after {now - started:.0f} s")

            yield advance
