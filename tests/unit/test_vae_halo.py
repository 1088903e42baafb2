"""Halo rows leave as soon as they are right: before the rest of the slab is computed, and never too early."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vae_models import WAN21, WAN22, vae_config

from cosmos3_pipeline.vae import blocking, bound_ops, convolution, ops
from cosmos3_pipeline.vae.bound_ops import Flow, NormSilu
from cosmos3_pipeline.vae.frames import Frames, HaloExchange
from cosmos3_pipeline.vae.ops import NO_ROOM, Margins, Room
from cosmos3_pipeline.vae.program import decoder_program


class Watching:
    """An exchange that keeps what was there when it was started, and fills the margins when it is waited for."""

    rows = cols = True

    def __init__(self, margins: Margins) -> None:
        self.margins = margins

    def coming(self, op: int) -> Margins:
        return self.margins

    def start(self, op: int, frames: Frames) -> Callable[[], None]:
        self.seen, self.waited = frames.chunk.clone(), False
        return self.finish

    def finish(self) -> None:
        self.waited = True

    def gather(self, op: int, part: Tensor) -> Tensor:
        raise AssertionError("a norm gathers nothing")


class Wanting(bound_ops.BoundOp[ops.Op]):
    """An op that wants `room` around its input."""

    def __init__(self, room: Room) -> None:
        self._room, self.number, self.op = room, 1, CONV

    def room(self, shape: Sequence[int], like: Tensor, *, first: bool, exchange: HaloExchange | None) -> Room:
        return self._room

    def run(self, flow: Flow) -> None:
        raise AssertionError("not to be run")


CONV = next(op for op in decoder_program(vae_config(WAN22)).ops if isinstance(op, ops.Conv) and op.cached_frames)
OP = next(op for op in decoder_program(vae_config(WAN22)).ops if isinstance(op, ops.NormSilu))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


SIDES = st.sampled_from([(0, 0), (1, 1), (0, 1), (1, 0), (2, 1)])


@pytest.mark.parametrize("at_once", [0, bound_ops.NORM_BLOCKS_AT_ONCE], ids=["edges first", "at once"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(1, 5), width=st.integers(1, 5), rows=SIDES, cols=SIDES, front=st.integers(0, 2))
def test_what_neighbours_read_is_there_when_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
    height: int,
    width: int,
    rows: tuple[int, int],
    cols: tuple[int, int],
    front: int,
) -> None:
    monkeypatch.setattr(bound_ops, "NORM_BLOCKS_AT_ONCE", at_once)
    height, width = max(height, *rows), max(width, *cols)
    channels = OP.source.channels
    gamma = torch.rand(channels) + 0.5
    x = torch.randn(1, 2, height, width, channels)
    bound = NormSilu(0, OP, {OP.weights[0].name: gamma})

    def run(room: Room, exchange: Watching | None) -> Frames:
        flow = Flow(Frames(x.clone()), [], {}, first=True, exchange=exchange, following=Wanting(room))
        bound.run(flow)
        return flow.at

    margins, exchange = Margins(*rows, *cols), Watching(Margins(*rows, *cols))
    whole = run(NO_ROOM, None)
    made = run(Room(front, margins), exchange)
    assert torch.equal(made.inner, whole.inner)
    if not margins:
        assert made.arrival is None or not made.arrival.margins
        return
    assert made.arrival is not None and made.arrival.margins == margins and not exchange.waited
    inner = height - sum(rows) > 0 and width - sum(cols) > 0
    assert torch.equal(Frames(exchange.seen, Room(0, margins)).inner, whole.inner) == (at_once > 0 or not inner)
    # The neighbour above reads as many of the first rows as it has margin below itself, and so on around.
    seen = Frames(exchange.seen, Room(0, margins)).inner
    for part in (
        (slice(0, margins.bottom), slice(None)),
        (slice(height - margins.top, None), slice(None)),
        (slice(None), slice(0, margins.right)),
        (slice(None), slice(width - margins.left, None)),
    ):
        assert torch.equal(seen[:, :, part[0], part[1]], whole.inner[:, :, part[0], part[1]])


@pytest.mark.parametrize(
    ("sides", "before"),
    [
        ((False, True, False, False), 2),  # below: even rows look up
        ((True, False, False, False), 2),
        ((True, True, False, False), 0),
        ((False, True, True, False), 1),
        ((True, True, True, True), 0),
    ],
)
def test_an_upsampling_makes_what_looks_the_other_way_before_it_waits(
    monkeypatch: pytest.MonkeyPatch, sides: tuple[bool, bool, bool, bool], before: int
) -> None:
    op = next(op for op in decoder_program(vae_config(WAN21)).ops if isinstance(op, ops.SpatialUp))
    bound = bound_ops.SpatialUp(0, op, {w.name: torch.randn(w.shape) for w in op.weights})
    exchange, made = Watching(op.margins.on(*sides)), list[bool]()
    make = bound_ops.SpatialUp._make
    monkeypatch.setattr(
        bound_ops.SpatialUp,
        "_make",
        lambda self, *args, **kwargs: (made.append(exchange.waited), make(self, *args, **kwargs)),
    )
    x = torch.randn(1, 1, 4, 3, op.source.channels)
    bound.run(Flow(Frames(x), [], {}, first=True, exchange=exchange))
    assert made == [False] * before + [True] * (4 - before)


def test_a_convolution_makes_the_bands_inside_before_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    op = next(
        op for op in decoder_program(vae_config(WAN22)).ops if isinstance(op, ops.Conv) and op.cached_frames == 2
    )
    for name, value in (("_PAIR_FLOPS", 0), ("_PAIR_PIXELS", 0), ("_BAND_ELEMENTS", 1)):
        monkeypatch.setattr(blocking, name, value)
    bound = bound_ops.Conv(0, op, {w.name: torch.randn(w.shape) for w in op.weights})
    exchange, made = Watching(op.margins.on(True, True, False, False)), list[bool]()
    exchange.cols = False
    make = convolution._Pairs.make
    monkeypatch.setattr(
        convolution._Pairs, "make", lambda self, band: (made.append(exchange.waited), make(self, band))
    )
    x = torch.randn(1, 2, 5, 3, op.source.channels)
    kept = {op.name: torch.randn(1, 2, 7, 3, op.source.channels)}
    flow = Flow(Frames(x), [], kept, first=False, exchange=exchange)
    bound.run(flow)
    assert made == [False] * 3 + [True] * 2  # bands of one row: the first and the last read neighbours' rows
