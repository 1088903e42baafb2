"""What each stage of a rehearsed rank holds, sends and launches, and where the host waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.rehearsal.places import Place
from cosmos3_pipeline.rehearsal.tracker import Tracker
from cosmos3_pipeline.stages.progress import Advance


class Counts(NamedTuple):
    """What grows as a rank works."""

    kernels: int = 0
    moved_bytes: int = 0
    sent_bytes: int = 0
    sent_messages: int = 0

    def plus(self, other: Counts, times: int = 1) -> Counts:
        """The sum with `times` as much as `other`."""
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


@dataclass
class Measured:
    """One stage of one rank.

    `units` are the steps of denoising, or the portions of frames that the root has had, that are done. `repeated`
    are waits of the host between the first and the last step, or more than once in all that is decoded.
    """

    peak_bytes: int = 0
    holders: list[tuple[Place, int]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    waits: Counter[Place] = field(default_factory=Counter)
    repeated: Counter[Place] = field(default_factory=Counter)
    units: list[tuple[Counts, Counter[Place]]] = field(default_factory=list)


class StageMeter:
    """The stages of one rank, measured by `tracker`; also what the stages report their progress to."""

    def __init__(self, tracker: Tracker, ledgers: Sequence[Ledger]) -> None:
        self.stages: dict[str, Measured] = {}
        self._tracker = tracker
        self._ledgers = ledgers
        self._current: str | None = None
        self._waits_before: Counter[Place] = Counter()

    def watch(self, ledgers: Sequence[Ledger]) -> None:
        """Count what goes into `ledgers`, to which the VAE adds its own."""
        self._ledgers = ledgers

    @contextmanager
    def stage(self, name: str, /, *, portion: bool = False) -> Iterator[None]:
        """Add what the block does to the stage `name`."""
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
        """Follow a block of work: as `stages.progress.Reporter`."""

        def advance(units: int = 1) -> None:
            if self._current is not None:
                self.stages[self._current].units.append((self._now(), self._tracker.waits.copy()))

        yield advance

    def finish(self, *, steps: int) -> None:
        """Find what is repeated; what one step does more often counts `steps` times in all."""
        if denoise := self.stages.get("denoise"):
            done = denoise.units
            if len(done) > 1:
                (first, before), (second, _), (_, after) = done[0], done[1], done[-1]
                denoise.repeated = after - before
                one = second.plus(first, -1)
                denoise.counts = denoise.counts.plus(one, max(steps - len(done), 0))
        if decode := self.stages.get("decode"):
            decode.repeated = Counter({place: count for place, count in decode.waits.items() if count > 1})

    def _now(self) -> Counts:
        sent_bytes = sum(ledger.sent_bytes for ledger in self._ledgers)
        sent_messages = sum(ledger.sent_messages for ledger in self._ledgers)
        return Counts(self._tracker.kernels, self._tracker.moved_bytes, sent_bytes, sent_messages)
