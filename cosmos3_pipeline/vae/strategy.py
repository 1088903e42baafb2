"""The contract of a strategy of the VAE, which built-in and third-party plugins implement. Imports no torch.

A strategy is a dataclass of its own settings, all with defaults, so that YAML can build it. It says which rank
runs what, and nothing else:

    @dataclass
    class Mine(Strategy):
        name = "mine"
        exactness = Exactness.BITWISE
        setting: int = 1

        def assign(self, program, shape, ranks):
            return Assignment.of(ranks, [Block(ops=(0, len(program)), chunks=(0, program.chunks(shape)), rank=0)])

The library checks the blocks, derives the messages between the ranks, predicts bytes, messages, memory and time
from them, and runs the assignment.

A strategy that computes another picture than the VAE, such as `tiled`, has work that no blocks describe. It is an
`OwnRunner`, which declares its plan and does its work itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Protocol

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.vae.assignment import Assignment
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Direction, Program

if TYPE_CHECKING:
    from torch import Tensor

    from cosmos3_pipeline.distributed.comm import Comm
    from cosmos3_pipeline.vae.pixels import Pixels
    from cosmos3_pipeline.vae.weights import BoundVae


class Exactness(StrEnum):
    """How a strategy's output relates to that of one rank, strongest first.

    bitwise: equal in every bit. rounding: the same up to the order of sums (at least 100 dB in float32).
    approximate: another picture, close to the eye.
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
    """A strategy declares to be more exact than its blocks are."""


@dataclass(frozen=True)
class RankShare:
    """The work of one rank of the group for one clip.

    ops: [start, stop) from the first op that it runs to the last.
    rows, cols: the latent rows and columns [start, stop) of its tiles.
    flops: as `Op.flops`, over the clip.
    weight_bytes: weights of all ops that it runs on some chunk.
    activation_bytes: peak beyond the weights.
    sent_bytes, sent_messages: the payload that it sends, as the ledger counts it. A decode counts `decode_stream`;
    `decode` adds one broadcast of the float picture by the root, unless every rank makes the picture.
    runs: the ops [start, stop) of each chunk, if they are not always the same.
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


@dataclass(frozen=True)
class StrategyPlan:
    """The plan of one clip: the shares of all ranks, in rank order.

    exactness: of this clip's result.
    note: one line for a human.
    assignment: which rank runs what; None for an `OwnRunner`.
    until_end: FLOPs on the critical path, which decide when the clip ends if messages take no time. They are the
    FLOPs of the slowest rank and of the work that it waits for.
    """

    strategy: str
    direction: Direction
    exactness: Exactness
    shares: tuple[RankShare, ...]
    note: str
    assignment: Assignment | None
    until_end: float


class Runner(Protocol):
    """Does one direction of one strategy on this rank. A runner has the method of its direction only.

    Every rank of the group gets the same, already checked input. Work per clip lives in locals, so that a runner
    can be used again.
    """

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Decode latents [B, z_dim, T, h, w] to the picture in order, some frames at a time, on the root.

        Every rank iterates it to its end. Other ranks yield nothing, unless each makes the whole picture.
        """
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Encode a picture [B, 3, F, H, W] in [-1, 1] to moments [B, 2 * z_dim, T, h, w], on every rank."""
        ...


class Strategy(ABC):
    """Decides which rank runs what. Concrete strategies are dataclasses of their settings.

    name: the key in YAML.
    exactness: the least that it promises with any settings; a plan has the exactness of one clip.
    directions: decode, encode or both.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    directions: ClassVar[frozenset[str]] = frozenset(("decode", "encode"))

    @abstractmethod
    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        """Which of `ranks` ranks runs what of a clip of `shape`. Raises StrategyError. Imports no torch."""

    def variants(self, ranks: int) -> Iterable[Strategy]:
        """Itself with each of the settings that are worth trying when the fastest on `ranks` is looked for."""
        return [self]

    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """The work, memory and messages of each rank. Raises StrategyError."""
        from cosmos3_pipeline.vae.planning import plan_of

        return plan_of(self, program, shape, self.assign(program, shape, ranks))

    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """This rank's part of `direction`. Binds weights when there is a clip."""
        from cosmos3_pipeline.vae.runner import AssignedRunner

        return AssignedRunner(vae, comm, direction, self)


class OwnRunner(Strategy):
    """A strategy whose work cannot be described by blocks: it declares its plan and has its own runner.

    The runner sends through `comm` only, because the ledger of `comm` is compared with the plan. It does not
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
        """The work of each rank. It is called before a weight is read, and `runner` may rely on it.

        Raises StrategyError if it cannot honour the clip. Imports no torch.
        """

    @abstractmethod
    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """This rank's part of `direction`, holding only the weights that it needs."""


@dataclass(frozen=True)
class Planned(Strategy):
    """An assignment that has been made already, for clips of one shape: what a plan's ranks are given.

    A shorter clip of the same size is done by those who do its chunks in the longer one, so that no rank needs
    other weights for it.
    """

    made: Assignment
    shape: LatentShape
    by: str

    name: ClassVar[str] = "planned"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        # In another dtype, or on another device, the same ranks do the same.
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
