"""What a simulation of other numbers of ranks needs: the seconds of each op, and of the messages between ops."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cosmos3_pipeline.jobs.bench.messages import Halos
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
Taken = tuple[list[float], list[float]]  # seconds of an op, of each first chunk and of each later one


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

    def taken(self) -> Taken:
        """Seconds of first and of later chunks since it was last asked."""
        found = self.first, self.later
        self.first, self._later = [], []
        return found


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


class OpSeconds:
    """The seconds of each op of the decoder, in a first and a later chunk, on all rows of `latent` and on half.

    All ranks call it together, and run the same at the same time, as ranks with a part of the picture each do:
    what they do to each other's memory traffic is in the numbers. Ranks of a line are at different ops, and do
    less to each other: what the root takes alone says better how its ops compare. May be asked several times, so
    that what else the machine does meanwhile is more like what it does to what is compared with the costs. Holds
    no weights in between.
    """

    def __init__(
        self, dimensions: Mapping[str, Any], autoencoders: Autoencoders, world: World, latent: LatentShape
    ) -> None:
        self._program = program_for("decode", dimensions)
        self._autoencoders = autoencoders
        self._world = world
        self._latent = latent
        self._slabs = sorted({latent.rows, (latent.rows + 1) // 2}, reverse=True)
        # By the number of rows, for each op: of first and of later chunks.
        self._seconds: dict[int, list[Taken]] = {
            slab: [([], []) for _ in self._program.ops] for slab in self._slabs
        }
        # Of the root alone on all rows.
        self._alone: list[Taken] = [([], []) for _ in self._program.ops]
        self._messages: list[tuple[float, float]] = []

    def take(self, rounds: int) -> None:
        """In `rounds` decodes of each number of rows, as many by the root alone, and one with halos."""
        program, world = self._program, self._world
        names = [w.name for w in program.weights()]
        vae = self._autoencoders.model(torch.float32)
        weights = ModuleWeights(vae).load(names, dtype=torch.float32, device=world.device)
        for slab in self._slabs:
            part = TimedSlice(program, 0, len(program), weights)
            generator = torch.Generator().manual_seed(0)
            z = torch.randn(1, program.z_dim, CHUNKS, slab, self._latent.cols, generator=generator)
            z = z.to(world.device)
            # An image is decoded sooner than the first chunk of a clip: nothing is kept of it for a next one.
            image = z[:, :, :1] if self._latent.frames == 1 else None
            _run(part, z)
            ops = part.timed()
            _add(self._seconds[slab], _taken(part, ops, z, image, [world.wait] * rounds))
            if slab == self._latent.rows:
                world.wait()
                _add(self._alone, _taken(part, ops, z, image, [_at_once] * rounds * world.is_root))
                world.wait()
            if slab == self._slabs[-1] and world.comm.size > 1:
                self._messages.append(_message(part, z if image is None else image, world))

    def costs(self) -> dict[str, Any]:
        """`ops`: medians over the rounds and chunks, then the mean of the ranks. `alone`: those of the root alone.

        `message`: the `seconds` that a message of a halo takes each of its ranks, in its place between the ops on
        half of the rows, where it finds nothing of its own in a cache, and its `bytes`. None with one rank.
        """
        found = []
        for slab, ops in self._seconds.items():
            everyone = self._world.comm.agree(_medians(ops))
            for index, op in enumerate(self._program.ops):
                first, later = (statistics.mean(rank[index][i] for rank in everyone) for i in range(2))
                found.append({"name": op.name, "rows": slab, "first_s": first, "later_s": later})
        root = self._world.comm.agree(_medians(self._alone) if self._world.is_root else [])[0]
        alone = [
            {"name": op.name, "first_s": first, "later_s": later}
            for op, (first, later) in zip(self._program.ops, root, strict=True)
        ]
        message = None
        if self._messages:
            seconds, nbytes = (statistics.mean(values) for values in zip(*self._messages, strict=True))
            message = {"seconds": seconds, "bytes": nbytes}
        return {"ops": found, "alone": alone, "message": message}


def _at_once() -> None:
    """For a rank that waits for no other."""


def _taken(
    part: Slice, ops: list[TimedOp], z: Tensor, image: Tensor | None, waits: Sequence[Callable[[], None]]
) -> list[Taken]:
    """What ops take in decodes of `z`, one after each of `waits`; on first chunks, those of `image`, if any."""
    found: list[Taken] = []
    for clip in (z, image):
        if clip is None:
            continue
        for wait in waits:
            wait()
            _run(part, clip)
        taken = [op.taken() for op in ops]
        found = [(first, later) for (first, _), (_, later) in zip(taken, found or taken, strict=True)]
    return found


def _add(seconds: list[Taken], more: list[Taken]) -> None:
    """Add to what each op took what it took since."""
    for (first, later), (new_first, new_later) in zip(seconds, more, strict=True):
        first += new_first
        later += new_later


def _medians(ops: list[Taken]) -> list[tuple[float, float]]:
    return [(statistics.median(first), statistics.median(later)) for first, later in ops]


def _message(part: Slice, z: Tensor, world: World) -> tuple[float, float]:
    """Half of what both messages of a halo take, and their bytes.

    Medians of the rank that takes least, as it waits for nobody.
    """
    with world.comm.run():
        _run(part, z, Halos(world.comm))
        halos = Halos(world.comm)
        _run(part, z, halos)
    own = halos.seconds and (statistics.median(halos.seconds) / 2, statistics.median(halos.nbytes))
    found: tuple[float, float] = min(each for each in world.comm.agree(own) if each)
    return found


def _run(part: Slice, z: Tensor, exchange: HaloExchange | None = None) -> None:
    """Decode latents [1, C, T, h, w] and forget the picture."""
    state = part.state(z.shape[2])
    for index in range(z.shape[2]):
        for _ in part.portions([[latent_chunk(z, index)]], state, exchange):
            pass
