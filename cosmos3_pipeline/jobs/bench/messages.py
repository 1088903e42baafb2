"""What messages between ranks take on this machine: by themselves, and between the ops of a decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.jobs.bench.world import World
from cosmos3_pipeline.vae.ops import Margins

SMALL_MESSAGE, LARGE_MESSAGE = 8, 1 << 22  # bytes
PINGS = 50


def link_costs(world: World) -> dict[str, float] | None:
    """Of messages between the first two ranks, one way: the arguments of `plan.simulation.Link`.

    The seconds of an empty one and the bytes per second of a large one; and what a message takes from the
    computing of each of its ranks, which is the processor's seconds, since on CPU their cores copy it. Between ops
    it takes more: `OpSeconds`.
    """
    if world.comm.size == 1:
        return None
    with world.comm.run():
        small, large = (_one_way(world, size) for size in (SMALL_MESSAGE, LARGE_MESSAGE))
    # What the root has measured is what counts; the others only answer.
    (latency, busy), (arrival, busy_large) = world.comm.agree((small, large))[0]
    return {
        "latency_s": latency,
        "bytes_per_s": LARGE_MESSAGE / max(arrival - latency, 1e-9),
        "busy_s": busy,
        "busy_s_per_byte": max(busy_large - busy, 0.0) / LARGE_MESSAGE,
    }


def _one_way(world: World, size: int) -> tuple[float, float]:
    """Seconds in which a message of `size` bytes goes to the next rank: half of there and back.

    On the clock (median), and of this rank's processor (mean).
    """
    comm, ball = world.comm, torch.zeros(size, dtype=torch.uint8, device=world.device)
    if comm.rank > 1:
        return 0.0, 0.0
    seconds, processor = [], time.process_time()
    for _ in range(PINGS):
        started = time.perf_counter()
        if comm.rank == 0:
            comm.exchange(sends=[(ball, 1)]).wait()
            comm.exchange(receives=[(ball, 1)]).wait()
        else:
            comm.exchange(receives=[(ball, 0)]).wait()
            comm.exchange(sends=[(ball, 0)]).wait()
        world.finish()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / 2, (time.process_time() - processor) / PINGS / 2


class Halos:
    """Halo rows between ranks 2k and 2k + 1, of which the first has the upper slab: a `HaloExchange`.

    `seconds` notes what both messages of one take this rank: to start them, and to end them when a convolution
    waits for them; `nbytes` how large each is.
    """

    rows, cols = True, False

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._peer = comm.rank ^ 1
        self._is_lower = comm.rank > self._peer
        self.seconds: list[float] = []
        self.nbytes: list[int] = []

    def coming(self, margins: Margins) -> Margins:
        """The side where the other slab is."""
        has_peer = self._peer < self._comm.size
        return margins.on(has_peer and self._is_lower, has_peer and not self._is_lower, False, False)

    def start(self, padded: Tensor, margins: Margins) -> Callable[[], None]:
        """As in a run on slabs."""
        if self._peer >= self._comm.size:
            return lambda: None
        started, end = time.perf_counter(), padded.shape[2]
        given, taken = (
            slice(end - margins.bottom - margins.top, end - margins.bottom),
            slice(end - margins.bottom, end),
        )
        if self._is_lower:
            given, taken = slice(margins.top, margins.top + margins.bottom), slice(0, margins.top)
        pending = self._comm.exchange([(padded[:, :, given], self._peer)], [(padded[:, :, taken], self._peer)])
        begun = time.perf_counter()

        def wait() -> None:
            waited = time.perf_counter()
            pending.wait()
            self.seconds.append(begun - started + time.perf_counter() - waited)
            self.nbytes.append(padded[:, :, taken].nbytes)

        return wait

    def gather(self, slab: Tensor) -> Tensor:
        """Without messages: only halos are timed."""
        return slab
