"""What a parallel-VAE strategy is: the contract that built-in and third-party plugins implement. Imports no torch.

A strategy is a dataclass of its own settings, all with defaults, so that YAML can build it:

    @dataclass
    class Mine(Strategy):
        name = "mine"
        exactness = Exactness.BITWISE
        setting: int = 1

        def plan(self, program, shape, ranks): ...        # torch-free arithmetic; refuses what it cannot do
        def runner(self, vae, comm, direction): ...       # binds weights; imports torch here, not at the top

`plan` describes what each rank will own, compute, hold and send, and raises StrategyError for what the strategy
cannot honour. It is asked before a weight is read, and before the first call with each shape of latent, so
`runner` may rely on it.

`runner` is called on every rank of the group, once per direction, and returns what does the work for any clip:

- decode: `stream(z, pixels=...)`, a generator. Every rank of the group iterates it to its end. It yields the
  picture in order, some frames at a time, on the root (rank 0 of the group) only, unless the strategy's
  `everywhere` is True and each rank makes the whole picture by itself. Only what the root yields may travel to it.
- encode: `encode(x)`, the moments [B, 2 * z_dim, T, h, w] on every rank.

Runners send through `comm` only (its ledger is what plans are held against) and do not catch its errors.
Every rank gets the same, already checked input. Work per clip lives in locals, so that a runner can be used again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Direction, Program

if TYPE_CHECKING:
    from torch import Tensor

    from cosmos3_pipeline.distributed.comm import Comm
    from cosmos3_pipeline.vae.weights import BoundVae

__all__ = [
    "Deal",
    "Direction",
    "Exactness",
    "LatentShape",
    "Pixels",
    "Program",
    "RankShare",
    "Runner",
    "Strategy",
    "StrategyError",
    "StrategyPlan",
]

# "float": [B, 3, frames, H, W] in the VAE's dtype in [-1, 1]; "uint8": [B, frames, H, W, 3] in 0..255.
Pixels = Literal["float", "uint8"]


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


class StrategyError(ValueError):
    """A strategy cannot honour its settings on this program, shape and number of ranks.

    The message says what is wrong with the values, why it cannot work, and what would.
    """


@dataclass(frozen=True)
class Deal:
    """From op `start` on, a rank owns other rows and columns [start, stop) of the picture.

    They are counted in parts of a latent row, `unit` of which make one. All ranks with the same ops deal before
    the same op, at which no shortcut is open, and list what is dealt in the whole program, also beyond their ops.
    """

    start: int
    unit: int
    rows: tuple[int, int]
    cols: tuple[int, int]


@dataclass(frozen=True)
class RankShare:
    """What one rank of the group does with one clip.

    ops: its run [start, stop) of the program, with all whose weights it holds.
    rows, cols: the latent rows and columns [start, stop) that it owns.
    flops: as `Op.flops`, over the clip. weight_bytes: of its ops. activation_bytes: peak beyond the weights.
    sent_bytes, sent_messages: payload that it hands to others, as the ledger counts; for decode that of
    `decode_stream` (`decode` adds one broadcast of the float picture by the root unless `everywhere`).
    deals: where ops run on other rows and columns than those of the latent that it owns, in the order of the ops.
    runs: the ops [start, stop) that it runs on each chunk of the clip, if not always all; else empty.
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
    deals: tuple[Deal, ...] = ()
    runs: tuple[tuple[int, int], ...] = ()

    def on(self, chunk: int) -> tuple[int, int]:
        """The ops [start, stop) that it runs on `chunk`."""
        return self.runs[chunk] if self.runs else self.ops


@dataclass(frozen=True)
class StrategyPlan:
    """The shares of all ranks, in rank order. `note` is one line for a human, such as balance and speed-up."""

    strategy: str
    direction: Direction
    exactness: Exactness
    shares: tuple[RankShare, ...]
    note: str


class Runner(Protocol):
    """Does one direction of one strategy on this rank. A runner has the method of its direction only."""

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Decode latents [B, z_dim, T, h, w] to picture chunks in order, as the module's docstring says."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Encode a picture [B, 3, F, H, W] in [-1, 1] to moments [B, 2 * z_dim, T, h, w], on every rank."""
        ...


class Strategy(ABC):
    """A schedule of a program over ranks. Concrete strategies are dataclasses of their settings.

    name: the key in YAML. exactness: what it promises, proved by the conformance kit. directions: what it can do.
    everywhere: each rank decodes the whole picture by itself, so nothing needs to be sent for all to have it.
    picks: it does no work itself but picks another strategy for each clip.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    directions: ClassVar[frozenset[str]] = frozenset(("decode", "encode"))
    everywhere: ClassVar[bool] = False
    picks: ClassVar[bool] = False

    @abstractmethod
    def plan(self, program: Program, shape: LatentShape, ranks: int) -> StrategyPlan:
        """What each of `ranks` ranks does for a clip of `shape`. Raises StrategyError. Imports no torch."""

    @property
    def depends_on_clip(self) -> bool:
        """Whether which weights a rank holds depends on the clip, as long as it is not `settled`."""
        return self.picks

    def settled(self, program: Program, shape: LatentShape, ranks: int) -> Strategy:
        """What does a clip of `shape`: itself, unless it `depends_on_clip`.

        Raises StrategyError as `plan` does.
        """
        return self

    @abstractmethod
    def runner(self, vae: BoundVae, comm: Comm, direction: Direction) -> Runner:
        """This rank's part of `direction`, holding only the weights that it needs."""
