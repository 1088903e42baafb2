"""Any assignment is right: random blocks on several ranks give the result of one, in the bytes of the account."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import World, run_on_threads
from torch import Tensor
from vae_models import WAN21, WAN22, make_vae, vae_config

from cosmos3_pipeline.vae.account import Runs, Walk, account
from cosmos3_pipeline.vae.assignment import EVERY, Assignment, AssignmentError, Block, Rect
from cosmos3_pipeline.vae.execute import Execution
from cosmos3_pipeline.vae.lowering import Lowered, lower
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.pixels import Pixels, latent_chunk, picture_chunk, to_uint8
from cosmos3_pipeline.vae.planning import exactness_of, reach
from cosmos3_pipeline.vae.program import Direction, Program, program_for
from cosmos3_pipeline.vae.strategy import Exactness, Strategy, StrategyError
from cosmos3_pipeline.vae.weights import BoundVae, ModuleWeights
from cosmos3_plugins.pipeline_of_shards import PipelineOfShards

LAYOUTS = {
    "wan22": vae_config(WAN22, base_dim=4, decoder_base_dim=4),
    "wan21": vae_config(WAN21, base_dim=4),
    # Small enough that a clip is longer than its ops remember.
    "two levels": vae_config(WAN21, base_dim=4, dim_mult=[1, 1], temperal_downsample=[True]),
}
DTYPES = {4: torch.float32, 8: torch.float64}
# How far float64 sums in another order may be apart.
ROUNDING = 1e-11


class CountedWeights(ModuleWeights):
    """Those of a model; keeps the bytes that were read last."""

    def load(self, names: Iterable[str], **how: Any) -> dict[str, Tensor]:
        tensors = super().load(names, **how)
        self.bytes_read = sum(tensor.nbytes for tensor in tensors.values())
        return tensors


@cache
def model_of(name: str, element_bytes: int) -> Any:
    return make_vae(LAYOUTS[name], dtype=DTYPES[element_bytes])


@cache
def program_of(name: str, direction: Direction) -> Program:
    return program_for(direction, LAYOUTS[name])


@dataclass(frozen=True)
class Clip:
    """A random clip for the VAE `name`: latents of `shape`, or the picture that is encoded to such."""

    name: str
    direction: Direction
    shape: LatentShape

    @property
    def program(self) -> Program:
        return program_of(self.name, self.direction)

    @property
    def model(self) -> Any:
        return model_of(self.name, self.shape.element_bytes)

    @property
    def tensor(self) -> Tensor:
        generator = torch.Generator().manual_seed(hash(self.shape) % 1000)
        program, shape, dtype = self.program, self.shape, DTYPES[self.shape.element_bytes]
        if self.direction == "decode":
            size = (shape.batch, program.z_dim, shape.frames, shape.rows, shape.cols)
            return torch.randn(size, generator=generator, dtype=dtype)
        frames = program.picture_frames(shape.frames)
        size = (shape.batch, 3, frames, shape.rows * program.spatial, shape.cols * program.spatial)
        return torch.rand(size, generator=generator, dtype=dtype) * 2 - 1

    def bound(self, weights: ModuleWeights) -> BoundVae:
        dtype = DTYPES[self.shape.element_bytes]
        return BoundVae(self.model.config, weights, dtype=dtype, device=torch.device("cpu"))

    def execute(self, lowered: Lowered, pixels: Pixels = "float") -> tuple[list[Tensor], list[int], World]:
        """The root's results, the bytes of weights that each rank read, and the messages."""
        given, model = self.tensor, self.model  # made before there are threads
        cut = latent_chunk if self.direction == "decode" else picture_chunk

        def work(comm: Any) -> tuple[list[Tensor], int]:
            weights = CountedWeights(model)
            ops = self.bound(weights).bind(self.direction, lowered.ops(comm.rank))
            execution = Execution(lowered, comm.rank, ops, comm, partial(cut, given), pixels=pixels)
            results = list(execution.results())
            assert not execution._flows and not execution._arriving and not execution._portions
            assert not any(execution._caches.values()), "frames are kept for a chunk that does not come"
            if self.direction == "encode" and not lowered.everywhere:
                # As `AssignedRunner` does: every rank gets the moments.
                shape = (self.shape.batch, self.shape.frames, self.shape.rows, self.shape.cols)
                blank = given.new_empty(*shape, 2 * self.program.z_dim)
                comm.broadcast(torch.cat(results, dim=1) if results else blank)
            return results, weights.bytes_read

        by_rank, world = run_on_threads(lowered.ranks, work)
        return by_rank[0][0], [read for _, read in by_rank], world

    def by_one_rank(self) -> Tensor:
        return self.joined(self.execute(lower(self.program, self.shape, whole(self.program, self.shape)))[0])

    def joined(self, results: list[Tensor], pixels: Pixels = "float") -> Tensor:
        return torch.cat(results, dim=2 if self.direction == "decode" and pixels == "float" else 1)

    def by_diffusers(self) -> Tensor:
        if self.direction == "decode":
            return self.model.decode(self.tensor).sample
        return self.model.encode(self.tensor).latent_dist.parameters.permute(0, 2, 3, 4, 1)


def whole(program: Program, shape: LatentShape) -> Assignment:
    return Assignment.of(1, [Block((0, len(program)), (0, program.chunks(shape)), 0)])


@st.composite
def cut_up(draw: Any, box: list[tuple[int, int]], ranks: int, unit: int, *, cuts: int) -> list[Block]:
    """`box`, which is ops x chunks x rows x columns, in at most 2^`cuts` blocks."""
    axes = [axis for axis, (start, stop) in enumerate(box) if stop - start > 1]
    if not cuts or not axes or draw(st.integers(0, 9)) == 9:
        ops, chunks, rows, cols = box
        # One time in eight each rank does it for itself.
        rank = EVERY if draw(st.integers(0, 7)) == 7 else draw(st.integers(0, ranks - 1))
        warm_up = 0
        if chunks[0] and draw(st.integers(0, 9)) == 9:  # from the clip's start on, so it remembers all
            chunks, warm_up = (0, chunks[1]), chunks[0]
        return [Block(ops, chunks, rank, Rect(*rows, *cols), unit, warm_up)]
    axis = draw(st.sampled_from(axes))
    start, stop = box[axis]
    at = draw(st.integers(start + 1, stop - 1))
    halves = [[*box[:axis], part, *box[axis + 1 :]] for part in ((start, at), (at, stop))]
    return [block for half in halves for block in draw(cut_up(half, ranks, unit, cuts=cuts - 1))]


def finer_from(program: Program) -> int:
    """The first op after which every latent row is an even number of rows, also in tensors that shortcuts keep."""
    return 1 + max(
        number
        for number, op in enumerate(program.ops)
        for scale in (op.source.scale, *(spec.scale for spec in program.carried(number + 1)))
        if scale % 2
    )


@st.composite
def assigned(draw: Any, *, slabs: bool) -> tuple[Clip, Assignment]:
    """A clip, and blocks that tile it."""
    clip = Clip(
        draw(st.sampled_from(["wan22", "wan21"])),
        draw(st.sampled_from(["decode", "encode"])),
        LatentShape(1, *(draw(st.integers(1, 4)) for _ in range(3)), element_bytes=8 if slabs else 4),
    )
    program, shape, ranks = clip.program, clip.shape, draw(st.integers(1, 4))
    rows, cols = ((0, shape.rows), (0, shape.cols)) if slabs else ((0, 1), (0, 1))
    end, chunks = len(program), (0, program.chunks(shape))
    at = finer_from(program) if slabs and clip.direction == "decode" and draw(st.booleans()) else end
    blocks = draw(cut_up([(0, at), chunks, rows, cols], ranks, 1, cuts=draw(st.integers(1, 6))))
    if at < end:
        finer = [(at, end), chunks, (0, 2 * shape.rows), (0, 2 * shape.cols)]
        blocks += draw(cut_up(finer, ranks, 2, cuts=draw(st.integers(1, 4))))
    if not slabs:
        blocks = [replace(block, slab=None) for block in blocks]
    assignment = Assignment.of(ranks, draw(st.permutations(blocks)))
    try:
        lower(program, shape, assignment)
    except AssignmentError:  # a rank would warm up on what it does anyway
        cold = [replace(b, chunks=(b.chunks[0] + b.warm_up, b.chunks[1]), warm_up=0) for b in assignment.blocks]
        assignment = Assignment.of(ranks, cold)
    return clip, assignment


def check(clip: Clip, assignment: Assignment, pixels: Pixels, *, atol: float) -> None:
    lowered = lower(clip.program, clip.shape, assignment)
    results, read, world = clip.execute(lowered, pixels)
    expected, made = clip.by_one_rank(), clip.joined(results, pixels)
    assert (expected - clip.by_diffusers()).abs().max() <= 1e-5
    if pixels == "uint8":
        # Half a level may round either way.
        assert (made.int() - to_uint8(expected).int()).abs().max() <= bool(atol)
    else:
        assert made.shape == expected.shape and (made - expected).abs().max() <= atol
    tallies = account(lowered)
    assert read == [tally.weight_bytes for tally in tallies]
    assert [messages for _, messages in world.sent] == [tally.sent_messages for tally in tallies]
    if pixels == "uint8" or clip.direction == "encode":
        assert [nbytes for nbytes, _ in world.sent] == [tally.sent_bytes for tally in tallies]


PIXELS = st.sampled_from(["float", "uint8"])


@pytest.mark.long
@settings(max_examples=15)
@given(assigned(slabs=False), PIXELS)
def test_ops_and_chunks_may_be_anybodys(given: tuple[Clip, Assignment], pixels: Pixels) -> None:
    clip, assignment = given
    check(clip, assignment, "float" if clip.direction == "encode" else pixels, atol=0)


@pytest.mark.long
@settings(max_examples=20)
@given(assigned(slabs=True), PIXELS)
def test_so_may_be_rows_and_columns(given: tuple[Clip, Assignment], pixels: Pixels) -> None:
    clip, assignment = given
    check(clip, assignment, "float" if clip.direction == "encode" else pixels, atol=ROUNDING)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_slab_with_neighbours_on_every_side_sends_opposite_edges_together(direction: Direction) -> None:
    """The middle one of nine slabs of several sizes."""
    clip = Clip("wan22", direction, LatentShape(1, 3, 4, 5, 8))
    slabs = [Rect(*rows, *cols) for rows in ((0, 1), (1, 3), (3, 4)) for cols in ((0, 2), (2, 4), (4, 5))]
    every = (0, len(clip.program)), (0, clip.program.chunks(clip.shape))
    check(
        clip,
        Assignment.of(9, [Block(*every, rank, slab) for rank, slab in enumerate(slabs)]),
        "float",
        atol=ROUNDING,
    )


def kept_at_the_end(clip: Clip, assignment: Assignment) -> int:
    """Elements of temporal caches that are still alive after the last action of some rank."""
    lowered = lower(clip.program, clip.shape, assignment)
    walks = [Walk(lowered, rank, Runs(lowered)) for rank in range(lowered.ranks)]
    for walk in walks:
        walk.tally()
    return max(walk.kept_now for walk in walks)


@settings(max_examples=25)
@given(assigned(slabs=True))
def test_no_temporal_cache_outlives_its_last_use(given: tuple[Clip, Assignment]) -> None:
    assert kept_at_the_end(*given) == 0


def test_a_temporal_cache_is_forgotten_although_another_of_its_rank_is_sent() -> None:
    """Rank 0 saw what op 17 read below, but not above: of two caches of rank 1 it needs one."""
    clip, above, below = Clip("wan22", "encode", LatentShape(1, 2, 2, 1)), Rect(0, 1, 0, 1), Rect(1, 2, 0, 1)
    end = len(clip.program)
    blocks = [
        Block((0, 17), (0, 1), 0, below),
        Block((17, end), (0, 1), 1, below),
        Block((0, end), (0, 1), 1, above),
        Block((0, end), (1, 2), 0, below),
        Block((0, end), (1, 2), 0, above),
    ]
    assert kept_at_the_end(clip, Assignment.of(2, blocks)) == 0


def warmed(clip: Clip, warm_up: int) -> Assignment:
    """Rank 1 does the later chunks, without a message from rank 0, after `warm_up` chunks for practice."""
    ops, chunks = (0, len(clip.program)), clip.program.chunks(clip.shape)
    last = Block(ops, (chunks - 2 - warm_up, chunks), 1, warm_up=warm_up)
    return Assignment.of(2, [Block(ops, (0, chunks - 2), 0), last])


@dataclass
class Warmed(Strategy):
    """`warmed`, which it declares to be bitwise."""

    clip: Clip
    warm_up: int
    name = "warmed"
    exactness = Exactness.BITWISE

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        return warmed(self.clip, self.warm_up)


@pytest.mark.long
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_a_rank_that_warms_up_for_as_long_as_the_ops_remember_needs_nobody(direction: Direction) -> None:
    program = program_of("two levels", direction)
    needed = reach(program)
    frames = 1 + (needed + 3) * program.latents_per_chunk
    clip = Clip("two levels", direction, LatentShape(1, frames, 2, 1))
    check(clip, warmed(clip, needed), "float", atol=0)
    plan = Warmed(clip, needed).plan(program, clip.shape, 2)
    assert plan.exactness == Exactness.BITWISE
    assert plan.shares[0].sent_messages == (direction == "encode")  # the moments, to all

    short = warmed(clip, 1)
    lowered = lower(program, clip.shape, short)
    assert exactness_of(lowered) == Exactness.APPROXIMATE
    assert not torch.equal(clip.joined(clip.execute(lowered)[0]), clip.by_one_rank())
    with pytest.raises(StrategyError, match="declares bitwise and its blocks are approximate"):
        Warmed(clip, 1).plan(program, clip.shape, 2)


@pytest.mark.parametrize("name", ["wan22", "two levels"])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_slabs_may_warm_up_while_another_rank_has_the_whole_picture(name: str, direction: Direction) -> None:
    """They read each other's margins then, which nobody but the other rank has."""
    program, shape = program_of(name, direction), LatentShape(1, 3, 4, 4, element_bytes=8)
    ops, last = (0, len(program)), program.chunks(shape) - 1
    blocks = [Block(ops, (0, last), 0)]
    for rank, slab in enumerate((Rect(0, 2, 0, 4), Rect(2, 4, 0, 4))):
        blocks.append(Block(ops, (0, last + 1), rank, slab, warm_up=last))
    check(Clip(name, direction, shape), Assignment.of(2, blocks), "float", atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "direction", "sizes"), [("wan22", "decode", "2 + 3"), ("wan21", "encode", "4 + 1")]
)
def test_groups_of_another_size_send_each_other_what_they_need(
    name: str, direction: Direction, sizes: str
) -> None:
    clip = Clip(name, direction, LatentShape(1, 5, 6, 4, element_bytes=8))
    assignment = PipelineOfShards(2).assign(clip.program, clip.shape, 5)
    assert f"{sizes} bands" in assignment.note
    check(clip, assignment, "float", atol=ROUNDING)


END = len(program_of("wan22", "decode"))
SHAPE = LatentShape(1, 3, 4, 4)


def block(ops: tuple[int, int] = (0, END), chunks: tuple[int, int] = (0, 3), rank: int = 0, **more: Any) -> Block:
    return Block(ops, chunks, rank, **more)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ([block(chunks=(0, 2))], f"no rank computes ops 0 to {END - 1} of chunk 2 on 16 of 16 latent pixels"),
        ([block(chunks=(0, 2)), block((0, 9), (2, 3))], f"nearest is {block((0, 9), (2, 3))}"),
        ([], "nearest is no block"),
        ([block(slab=Rect(0, 4, 0, 3))], "of chunk 0 on 4 of 16 latent pixels"),
        ([block(), block((5, 9), rank=1)], "rank=1, slab=None, unit=1, warm_up=0) overlaps Block("),
        ([block(), block()], "overlaps"),
        ([block((0, END + 1))], f"has ops [0, {END + 1})"),
        ([block(chunks=(2, 2))], "has chunks [2, 2)"),
        ([block(rank=2)], "is for rank 2"),
        ([block(slab=Rect(0, 5, 0, 4))], "has a slab outside the picture"),
        ([block(slab=Rect(0, 3, 0, 8), unit=2)], "cuts within a row of op 0 (post_quant_conv)"),
        ([block(warm_up=3)], "warms up on 3 chunks"),
        ([block(slab=(0, 4, 0, 4))], "is not well-formed"),
        ([block(slab=[0, 4, 0, 4])], "is not well-formed"),
        ([block(slab=Rect(0, 4, 0, 4), unit=0)], "is not well-formed"),
        ([block(rank=0.5)], "is not well-formed"),
        ([block((0, 5, END))], "is not well-formed"),
        ([block(chunks=[0, 3])], "is not well-formed"),
        ([block(END)], "is not well-formed"),
        ([block(chunks=(0, 2)), block(warm_up=2)], "warms up in ops"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_no_assignment_is_refused_with_the_block(blocks: list[Block], says: str) -> None:
    with pytest.raises(AssignmentError, match=re.escape(says)) as refusal:
        lower(program_of("wan22", "decode"), SHAPE, Assignment.of(2, blocks))
    what, why, works = (getattr(refusal.value.problem, part) for part in ("what", "why", "works"))
    assert works and (not blocks or "Block(" in what + why)


@settings(max_examples=20)
@given(assigned(slabs=True), st.randoms())
def test_a_block_too_few_or_too_many_is_refused(given: tuple[Clip, Assignment], chance: Any) -> None:
    clip, assignment = given
    blocks = list(assignment.blocks)
    one = chance.choice(blocks)
    blocks.remove(one)
    if chance.random() < 0.5:
        blocks += [one, one]
    with pytest.raises(AssignmentError):
        lower(clip.program, clip.shape, Assignment.of(assignment.ranks, blocks))
