"""What each stage of a rehearsed rank holds, sends and launches, and where the host waits."""

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
    """What grows as a rank works. `copied_bytes` go from the host to the accelerator."""

    works: Works = field(default_factory=dict)
    sent_bytes: int = 0
    sent_messages: int = 0
    copied_bytes: int = 0

    def plus(self, other: Counts, times: int = 1) -> Counts:
        """The sum with `times` as much as `other`."""
        works = dict(self.works)
        for kernel, work in other.works.items():
            works[kernel] = works.get(kernel, NO_WORK).plus(work, times)
        return Counts(
            {kernel: work for kernel, work in works.items() if work.calls},
            self.sent_bytes + times * other.sent_bytes,
            self.sent_messages + times * other.sent_messages,
            self.copied_bytes + times * other.copied_bytes,
        )


# So many steps UniPC takes until it keeps no more of those before: each keeps its own prediction.
SOLVER_ORDER = 2


class Unit(NamedTuple):
    """What has been done, and what is held by the line that has allocated it, when a unit of a stage is done."""

    counts: Counts
    waits: Counter[Place]
    live: Counter[Place]


@dataclass
class Measured:
    """One stage of one rank.

    `units` are the steps of denoising, or the portions of frames that the root has had, that are done. `repeated`
    are waits of the host between the first and the last step, or more than once in all that is decoded. `left` is
    what a step leaves on the accelerator for ever.
    """

    peak_bytes: int = 0
    holders: list[tuple[Place, int]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    waits: Counter[Place] = field(default_factory=Counter)
    repeated: Counter[Place] = field(default_factory=Counter)
    left: Counter[Place] = field(default_factory=Counter)
    units: list[Unit] = field(default_factory=list)


class StageMeter:
    """The stages of one clip of a rank, measured by `tracker`; also what the stages report their progress to.

    `between` are waits of the host outside of all stages, once `finish` was called.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.stages: dict[str, Measured] = {}
        self._tracker = tracker
        self._ledgers: Sequence[Ledger] = ()
        self._current: str | None = None
        self._waits_before: Counter[Place] = Counter()
        self.between: Counter[Place] = Counter()

    def watching(self, ledgers: Sequence[Ledger]) -> StageMeter:
        """This meter, which counts what goes into `ledgers` from now on; the VAE adds its own to them."""
        self._ledgers = ledgers
        if not self.stages:
            self._waits_before = self._tracker.waits.copy()
        return self

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
                unit = Unit(self._now(), self._tracker.waits.copy(), self._tracker.live_by_place)
                self.stages[self._current].units.append(unit)

        yield advance

    def finish(self, *, steps: int, chunks: int = 1) -> None:
        """Find what is repeated; what one step does or leaves more often counts `steps` times in all.

        That is so in each of the `chunks` that a clip is made in.
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
