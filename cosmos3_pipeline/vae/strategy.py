"""The contract of a VAE strategy, for built-in and third-party plugins. Imports no torch.

A strategy is a dataclass of its settings, which all have defaults, so that YAML can build it. It only says which
rank runs which ops on which chunks and slabs:

    @dataclass
    class Mine(Strategy):
        name = "mine"
        exactness = Exactness.BITWISE
        setting: int = 1

        def assign(self, program, shape, ranks):
            return Assignment.of(ranks, [Block(ops=(0, len(program)), chunks=(0, program.chunks(shape)), rank=0)])

The library checks the blocks, derives the messages between the ranks, predicts bytes, messages, memory and time
from them, and runs the assignment.

Blocks cannot describe a strategy that computes another picture than the VAE, such as `tiled`. Such a strategy is
an `OwnRunner`, which declares its plan and has its own runner.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Protocol

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.vae.assignment import Assignment
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Direction, Program

if TYPE_CHECKING:
    from torch import Tensor

    from cosmos3_pipeline.distributed.comm import Comm
    from cosmos3_pipeline.vae.lowering import Repeated
    from cosmos3_pipeline.vae.pixels import Pixels
    from cosmos3_pipeline.vae.weights import BoundVae


class Exactness(StrEnum):
    """How a strategy's output relates to that of one rank, strongest first.

    bitwise: equal in every bit.
    rounding: equal up to the order of sums (at least 100 dB in float32).
    approximate: another picture, which looks similar.
    """

    BITWISE = "bitwise"
    ROUNDING = "rounding"
    APPROXIMATE = "approximate"

    def satisfies(self, required: Exactness) -> bool:
        """Whether it is at least as strong as `required`."""
        order = list(Exactness)
        return order.index(self) <= order.index(required)


class StrategyError(Refusal):
    """A strategy cannot honour its settings on this program, shape and number of ranks."""


class DeclarationError(StrategyError):
    """A strategy declares more exactness than its blocks have."""


@dataclass(frozen=True)
class RankShare:
    """The work of one rank of the group for one clip.

    ops: [start, stop) from the first op that it runs to the last.
    rows, cols: the latent rows and columns [start, stop) of its tiles.
    flops: as `Op.flops` and `Op.dropped_flops`, over the clip.
    weight_bytes: weights of all ops that it runs on at least one chunk, as it reads them.
    activation_bytes: peak memory without the weights.
    sent_bytes, sent_messages: the payload that it sends, as the ledger counts it. A decode counts `decode_stream`;
    `decode` adds one broadcast of the float picture by the root, unless every rank computes the picture.
    runs: the ops [start, stop) on each chunk; empty if they are the same on all chunks.
    folded_bytes: what the weights take beyond `weight_bytes` as the executor holds them (`Op.folded_elements`).
    """

    rank: int
    ops: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]
    flops: int
    weight_bytes: int
    activation_bytes: int
    sent_bytes: int
    sent_messages: int
    runs: tuple[tuple[int, int], ...] = ()
    folded_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """The weights in the form in which the rank holds them."""
        return self.weight_bytes + self.folded_bytes


@dataclass(frozen=True)
class StrategyPlan:
    """The plan of one clip: the shares of all ranks, in rank order.

    exactness: the exactness of this clip's result.
    note: one line for a human.
    assignment: the assignment; None for an `OwnRunner`.
    until_end: FLOPs on the critical path, which are those of the slowest rank and of the work for which it waits.
    They decide when the clip ends if messages take no time.
    clip: the lowered assignment, for the clock; None for an `OwnRunner`, or if nobody needs it any more.
    """

    strategy: str
    direction: Direction
    exactness: Exactness
    shares: tuple[RankShare, ...]
    note: str
    assignment: Assignment | None
    until_end: float
    clip: Repeated | None = field(default=None, repr=False, compare=False)


class Runner(Protocol):
    """Runs one direction of one strategy on this rank. A runner has only the method of its direction.

    Every rank of the group gets the same, already checked input. State per clip must be in local variables,
    because a runner is used for several clips.
    """

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Decode latents [B, z_dim, T, h, w] to the picture in order, some frames at a time, on the root.

        Every rank iterates it to its end. Other ranks yield nothing, unless each computes the whole picture.
        """
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Encode a picture [B, 3, F, H, W] in [-1, 1] to moments [B, 2 * z_dim, T, h, w], on every rank."""
        ...


class Strategy(ABC):
    """Decides which rank runs which blocks. Concrete strategies are dataclasses of their settings.

    name: the key in YAML.
    exactness: the least exactness with any settings; a plan has the exactness of one clip.
    directions: decode, encode or both.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    directions: ClassVar[frozenset[str]] = frozenset(("decode", "encode"))

    @abstractmethod
    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """The assignment of a clip of `shape` to `ranks` ranks. Raises StrategyError. Imports no torch."""

    def variants(self, ranks: int) -> Iterable[Strategy]:
        """This strategy with each of the settings that a search for the fastest on `ranks` ranks should try."""
        return [self]

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """The work, memory and messages of each rank. Raises StrategyError."""
        from cosmos3_pipeline.vae.planning import assigned, plan_of

        return plan_of(self, program, shape, assigned(self, program, shape, ranks), ranks)

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """The runner of `direction` on this rank. It binds weights when it gets the first clip."""
        from cosmos3_pipeline.vae.runner import AssignedRunner

        return AssignedRunner(vae, comm, direction, self)


class OwnRunner(Strategy):
    """A strategy whose work cannot be described by blocks: it declares its plan and has its own runner.

    The runner must send only through `comm`, because the ledger of `comm` is compared with the plan. It must not
    catch the errors of `comm`.
    """

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        raise StrategyError(
            f"{self.name} has no assignment",
            "its work is not that of the VAE's ops on their picture",
            "ask for its plan",
        )

    @abstractmethod
    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """The work of each rank. It is called before a weight is read, and before `runner`.

        Raises StrategyError if the strategy cannot honour the clip. Imports no torch.
        """

    @abstractmethod
    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """The runner of `direction` on this rank. It must hold only the weights that it needs."""


@dataclass(frozen=True)
class Planned(Strategy):
    """An assignment that a plan has made already, for clips of one shape.

    A shorter clip of the same size uses the assignment of the first chunks of the longer clip, so that no rank
    needs other weights.
    """

    made: Assignment
    shape: LatentShape
    by: str

    name: ClassVar[str] = "planned"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        # The assignment is valid for every dtype and device.
        mine = self.shape
        alike = replace(
            shape, element_bytes=mine.element_bytes, on_host=mine.on_host, picture_bytes=mine.picture_bytes
        )
        longer = replace(alike, frames=max(shape.frames, mine.frames))
        if shape.frames < mine.frames and longer == mine and ranks == self.made.ranks:
            return self.made.first_chunks(program.chunks(shape))
        if alike != self.shape or ranks != self.made.ranks:
            raise StrategyError(
                f"a clip of {shape} on {ranks} ranks",
                f"{self.by} was planned for {self.shape} on {self.made.ranks}",
                "plan it anew",
            )
        return self.made
