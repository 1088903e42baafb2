"""Measures each stage of a rehearsed rank: memory, sends, kernels, and lines on which the host waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.rehearsal.places import Place
from cosmos3_pipeline.rehearsal.roofline import NO_WORK, Works
from cosmos3_pipeline.rehearsal.tracker import Tracker
from cosmos3_pipeline.stages.progress import Advance


@dataclass(frozen=True)
class Counts:
    """Counters that grow as a rank works. `copied_bytes` are copied from the host to the accelerator."""

    works: Works = field(default_factory=dict)
    sent_bytes: int = 0
    sent_messages: int = 0
    copied_bytes: int = 0

    def plus(self, other: Counts, times: int = 1) -> Counts:
        """The sum of this and `times` x `other`."""
        works = dict(self.works)
        for kernel, work in other.works.items():
            works[kernel] = works.get(kernel, NO_WORK).plus(work, times)
        return Counts(
            {kernel: work for kernel, work in works.items() if work.calls},
            self.sent_bytes + times * other.sent_bytes,
            self.sent_messages + times * other.sent_messages,
            self.copied_bytes + times * other.copied_bytes,
        )


# UniPC keeps the predictions of this many steps, so its memory grows only in the first steps.
SOLVER_ORDER = 2


class Unit(NamedTuple):
    """The state when a unit of a stage is done: counters, waits by line, and live bytes by allocating line."""

    counts: Counts
    waits: Counter[Place]
    live: Counter[Place]


@dataclass
class Measured:
    """One stage of one rank.

    units: the finished units, which are denoising steps, or portions of frames on the root.
    repeated: waits of the host between the first and the last step, or more than once while a clip is decoded.
    left: bytes that each step leaves on the accelerator for ever.
    """

    peak_bytes: int = 0
    holders: list[tuple[Place, int]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    waits: Counter[Place] = field(default_factory=Counter)
    repeated: Counter[Place] = field(default_factory=Counter)
    left: Counter[Place] = field(default_factory=Counter)
    units: list[Unit] = field(default_factory=list)


class StageMeter:
    """The stages of one clip of a rank, measured by `tracker`. The stages report their progress to this object.

    `between` has the host's waits outside of all stages, after `finish`.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.stages: dict[str, Measured] = {}
        self._tracker = tracker
        self._ledgers: Sequence[Ledger] = ()
        self._current: str | None = None
        self._waits_before: Counter[Place] = Counter()
        self.between: Counter[Place] = Counter()

    def watching(self, ledgers: Sequence[Ledger]) -> StageMeter:
        """Let this meter count the sends in `ledgers` from now on. The VAE adds its ledger to this sequence."""
        self._ledgers = ledgers
        if not self.stages:
            self._waits_before = self._tracker.waits.copy()
        return self

    @contextmanager
    def stage(self, name: str, /, *, portion: bool = False) -> Iterator[None]:
        """Count the work of the block for the stage `name`."""
        measured = self.stages.setdefault(name, Measured())
        before, waits = self._now(), self._tracker.waits.copy()
        self._tracker.restart_peak()
        self._current = name
        yield
        measured.counts = measured.counts.plus(self._now()).plus(before, -1)
        measured.waits += self._tracker.waits - waits
        if self._tracker.peak > measured.peak_bytes:
            measured.peak_bytes, measured.holders = self._tracker.peak, self._tracker.holders

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        """Follow a block of work, as `stages.progress.Reporter`."""

        def advance(units: int = 1) -> None:
            if self._current is not None:
                unit = Unit(self._now(), self._tracker.waits.copy(), self._tracker.live_by_place)
                self.stages[self._current].units.append(unit)

        yield advance

    def finish(self, *, steps: int, chunks: int = 1) -> None:
        """Find repeated waits and memory that steps leave, and extrapolate to `steps` denoising steps per chunk.

        Only a few steps were rehearsed, so the work of one step is added for each missing step. `chunks` is the
        number of chunks in which the clip is made.
        """
        if denoise := self.stages.get("denoise"):
            run = len(denoise.units) // chunks
            done = denoise.units[:run]
            more = max(steps - run, 0)
            if run > 1:
                denoise.repeated = done[-1].waits - done[0].waits
                for first in range(0, run * chunks, run):
                    one = denoise.units[first + 1].counts.plus(denoise.units[first].counts, -1)
                    denoise.counts = denoise.counts.plus(one, more)
            if run > SOLVER_ORDER:
                denoise.left = done[-1].live - done[-2].live
                denoise.peak_bytes += more * denoise.left.total()
        self.between = self._tracker.waits - self._waits_before
        for measured in self.stages.values():
            self.between -= measured.waits
        if decode := self.stages.get("decode"):
            decode.repeated = Counter({place: count for place, count in decode.waits.items() if count > chunks})

    def _now(self) -> Counts:
        sent_bytes = sum(ledger.sent_bytes for ledger in self._ledgers)
        sent_messages = sum(ledger.sent_messages for ledger in self._ledgers)
        works = dict(self._tracker.roofline.works)
        return Counts(works, sent_bytes, sent_messages, self._tracker.copied_bytes)
