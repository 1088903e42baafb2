"""Strategies that are wrong on purpose, each in one way: the plugin kit must find every one of them.

Each begins as the layer pipeline, which passes, so that what the kit finds is the one thing changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from cosmos3_pipeline.plugin_api import (
    Assignment,
    Block,
    Exactness,
    LatentShape,
    Program,
    StrategyError,
    StrategyPlan,
)
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.replicated import Replicated


class Wrapped:
    """A runner that does as `inner` does; what is broken is overridden."""

    def __init__(self, inner: Any, comm: Any) -> None:
        self.inner = inner
        self.comm = comm

    def stream(self, z: Any, *, pixels: str) -> Iterator[Any]:
        yield from self.inner.stream(z, pixels=pixels)

    def encode(self, x: Any) -> Any:
        return self.inner.encode(x)


@dataclass
class Broken(LayerPipeline):
    wrapper: ClassVar[type[Wrapped]] = Wrapped

    def runner(self, vae: Any, comm: Any, direction: Any) -> Any:
        return self.wrapper(super().runner(vae, comm, direction), comm)


class OneBitOff(Broken):
    """Bitwise, it says; the last digits differ."""

    class wrapper(Wrapped):
        def stream(self, z: Any, *, pixels: str) -> Iterator[Any]:
            for chunk in self.inner.stream(z, pixels=pixels):
                yield chunk * (1 + 2e-7) if pixels == "float" else chunk

        def encode(self, x: Any) -> Any:
            return self.inner.encode(x) * (1 + 2e-7)


class RanksDisagree(Broken):
    """The moments are right on the root only."""

    class wrapper(Wrapped):
        def encode(self, x: Any) -> Any:
            moments = self.inner.encode(x)
            return moments if self.comm.is_root else moments.flip(-1)


class AllAtOnce(Broken):
    """Gathers the whole clip before it yields."""

    class wrapper(Wrapped):
        def stream(self, z: Any, *, pixels: str) -> Iterator[Any]:
            import torch

            chunks = list(self.inner.stream(z, pixels=pixels))
            if chunks:
                yield torch.cat(chunks, dim=1 if pixels == "uint8" else 2)


class OutOfOrder(Broken):
    """The third chunk before the second, in the stream."""

    class wrapper(Wrapped):
        def stream(self, z: Any, *, pixels: str) -> Iterator[Any]:
            chunks = list(self.inner.stream(z, pixels=pixels))
            if pixels == "uint8" and len(chunks) > 2:
                chunks[1], chunks[2] = chunks[2], chunks[1]
            yield from chunks


class RemembersTheLastClip(Broken):
    """State that is kept in the runner: the second clip is not right."""

    class wrapper(Wrapped):
        last: Any = None

        def stream(self, z: Any, *, pixels: str) -> Iterator[Any]:
            mixed = z if self.last is None or self.last.shape != z.shape else (z + 0.1 * self.last)
            self.last = z
            yield from self.inner.stream(mixed, pixels=pixels)


class SendsMoreThanPlanned(Broken):
    """The plan leaves out the messages of the last rank."""

    def plan(self, program: Any, shape: Any, ranks: int) -> Any:
        plan = super().plan(program, shape, ranks)
        last = replace(plan.shares[-1], sent_bytes=0, sent_messages=0)
        return replace(plan, shares=(*plan.shares[:-1], last))


class HoldsMoreThanPlanned(Broken):
    """Every rank reads all weights, whatever the plan says."""

    def runner(self, vae: Any, comm: Any, direction: Any) -> Any:
        self.all_ops = vae.bind(direction, range(len(vae.program(direction))))
        return super().runner(vae, comm, direction)


class ForgetsThePast(Broken):
    """Decodes a long clip in two parts, the second after eight frames of the first: too few to remember."""

    class wrapper(Wrapped):
        def stream(self, z: Any, *, pixels: str) -> Iterator[Any]:
            half, context = z.shape[2] // 2, 8
            if half < 2 * context:
                yield from self.inner.stream(z, pixels=pixels)
                return
            yield from self.inner.stream(z[:, :, :half], pixels=pixels)
            frames, dim = 1 + 4 * (context - 1), 1 if pixels == "uint8" else 2
            for chunk in self.inner.stream(z[:, :, half - context :], pixels=pixels):
                if frames < chunk.shape[dim]:
                    yield chunk.narrow(dim, max(0, frames), chunk.shape[dim] - max(0, frames))
                frames -= chunk.shape[dim]


class DropsContext(Broken):
    """Every rank begins its chunks after two to warm up, which is too few for a long clip."""

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        chunks, ops = program.chunks(shape), (0, len(program))
        if chunks < ranks:
            raise StrategyError(f"{ranks} ranks", f"there are {chunks} chunks", "use fewer ranks")
        edges = [chunks * rank // ranks for rank in range(ranks + 1)]
        return Assignment.of(
            ranks,
            [
                Block(ops, (max(0, start - 2), stop), rank, warm_up=min(2, start))
                for rank, (start, stop) in enumerate(pairwise(edges))
            ],
        )


class PromisesTooMuch(DropsContext):
    """Declares what it is, and plans more than that."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        return replace(super().plan(program, shape, ranks), exactness=Exactness.BITWISE)


class KeepsMoreAlive(Broken):
    """Holds a few megabytes that no plan tells of, while it decodes."""

    class wrapper(Wrapped):
        def stream(self, z: Any, *, pixels: str) -> Iterator[Any]:
            held = z.new_zeros(1 << 20) + 1
            yield from self.inner.stream(z, pixels=pixels)
            del held


class ExtraBroadcast(Broken):
    """A collective that only the plan of the root knows about; every rank calls it with a shape of its own."""

    class wrapper(Wrapped):
        def encode(self, x: Any) -> Any:
            moments = self.inner.encode(x)
            self.comm.all_gather(moments.new_zeros(4).view((4, 1) if self.comm.is_root else (1, 4)))
            return moments


class RefusesInItsOwnWords(Broken):
    """More ranks than two are refused, but not with StrategyError."""

    def plan(self, program: Any, shape: Any, ranks: int) -> Any:
        if ranks > 2:
            raise ValueError("too many")
        return super().plan(program, shape, ranks)


class RefusesWithoutHelp(Broken):
    """A StrategyError that does not say what would work."""

    def plan(self, program: Any, shape: Any, ranks: int) -> Any:
        from cosmos3_pipeline.vae.strategy import StrategyError

        if ranks > 2:
            raise StrategyError("too many ranks", "", "")
        return super().plan(program, shape, ranks)


class IdleRanks(Replicated):
    """Ranks beyond the second do nothing, instead of a refusal."""

    def plan(self, program: Any, shape: Any, ranks: int) -> Any:
        plan = super().plan(program, shape, ranks)
        return replace(plan, shares=tuple(replace(s, flops=s.flops if s.rank < 2 else 0) for s in plan.shares))


class PlansWithTorch(Broken):
    def plan(self, program: Any, shape: Any, ranks: int) -> Any:
        import torch

        assert torch.__version__
        return super().plan(program, shape, ranks)


class HidesItsFailure(Broken):
    """Catches whatever goes wrong in encode, and returns nothing in its place."""

    class wrapper(Wrapped):
        def encode(self, x: Any) -> Any:
            import torch

            try:
                return self.inner.encode(x)
            except Exception:
                return torch.zeros(1, 12, 5, 5, 4)


class WaitsForNobody(Broken):
    """A rank waits for a message that is never sent."""

    class wrapper(Wrapped):
        def stream(self, z: Any, *, pixels: str) -> Iterator[Any]:
            if not self.comm.is_root:
                self.comm.exchange(receives=[(z.new_empty(1), 0)]).wait()
            yield from self.inner.stream(z, pixels=pixels)
