"""What a simulation of other numbers of ranks needs: the seconds of each op, and of a message, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cosmos3_pipeline.jobs.bench.weights import Autoencoders
from cosmos3_pipeline.jobs.bench.world import World
from cosmos3_pipeline.vae.bound_ops import BoundOp, Flow
from cosmos3_pipeline.vae.executor import Slice
from cosmos3_pipeline.vae.frames import HaloExchange
from cosmos3_pipeline.vae.ops import LatentShape, Op, Room
from cosmos3_pipeline.vae.pixels import latent_chunk
from cosmos3_pipeline.vae.program import program_for
from cosmos3_pipeline.vae.weights import ModuleWeights

CHUNKS = 4  # of the clip of which the ops are timed: one first, three later ones
SMALL_MESSAGE, LARGE_MESSAGE = 8, 1 << 22  # bytes
PINGS = 50


class TimedOp:
    """A bound op that notes the seconds of each chunk: of first ones, and of later ones, in `portions` each."""

    def __init__(self, op: BoundOp[Op], portions: int) -> None:
        self._op = op
        self._portions = portions
        self.name = op.op.name
        self.first: list[float] = []
        self._later: list[float] = []

    @property
    def later(self) -> list[float]:
        """Seconds of each later chunk."""
        return [sum(self._later[i : i + self._portions]) for i in range(0, len(self._later), self._portions)]

    def room(self, x: Tensor, *, first: bool, exchange: HaloExchange | None) -> Room:
        """As the op's."""
        return self._op.room(x, first=first, exchange=exchange)

    def run(self, flow: Flow) -> None:
        """Run the op on the chunk, in its place among the others, where its input is as warm as in a real run."""
        started = time.perf_counter()
        self._op.run(flow)
        if flow.at.buffer.device.type == "cuda":
            torch.cuda.synchronize(flow.at.buffer.device)
        (self.first if flow.first else self._later).append(time.perf_counter() - started)


class TimedSlice(Slice):
    """The whole of a program, each op timed."""

    def timed(self) -> list[TimedOp]:
        """From now on each op is one of these."""
        ops = [
            TimedOp(op, self.program.portions_at(number + 1, first=False))
            for number, op in enumerate(self._ops, self.start)
        ]
        self._ops = ops  # type: ignore[assignment] # all that a slice asks of an op
        return ops


def op_costs(
    dimensions: Mapping[str, Any], autoencoders: Autoencoders, world: World, latent: LatentShape, rounds: int
) -> list[dict[str, Any]]:
    """Seconds of each op of the decoder, in a first and a later chunk, on all rows of `latent` and on half.

    Every rank runs the same at the same time, as in a real run: what they do to each other's memory traffic is
    in the numbers. Medians over the rounds and chunks, then the mean of the ranks.
    """
    slabs = sorted({latent.rows, (latent.rows + 1) // 2}, reverse=True)
    program = program_for("decode", dimensions)
    names = [w.name for w in program.weights()]
    weights = ModuleWeights(autoencoders.model(torch.float32)).load(
        names, dtype=torch.float32, device=world.device
    )
    found = []
    for slab in slabs:
        part = TimedSlice(program, 0, len(program), weights)
        z = torch.randn(1, program.z_dim, CHUNKS, slab, latent.cols, generator=torch.Generator().manual_seed(0))
        _run(part, z.to(world.device))
        ops = part.timed()
        for _ in range(rounds):
            world.wait()
            _run(part, z.to(world.device))
        own = [(statistics.median(op.first), statistics.median(op.later)) for op in ops]
        everyone = world.comm.agree(own)
        for index, op in enumerate(ops):
            first, later = (statistics.mean(rank[index][i] for rank in everyone) for i in range(2))
            found.append({"name": op.name, "rows": slab, "first_s": first, "later_s": later})
    return found


def _run(part: Slice, z: Tensor) -> None:
    """Decode latents [1, C, T, h, w] and forget the picture."""
    state = part.state(z.shape[2])
    for index in range(z.shape[2]):
        for _ in part.portions([[latent_chunk(z, index)]], state):
            pass


def link_costs(world: World) -> dict[str, float] | None:
    """Of messages between the first two ranks, one way: the arguments of `plan.simulation.Link`.

    The seconds of an empty one and the bytes per second of a large one; and what a message takes from the
    computing of each of its ranks, which is the processor's seconds, since on CPU their cores copy it.
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
