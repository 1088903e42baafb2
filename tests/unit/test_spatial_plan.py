"""The arithmetic of `spatial_shard`: cuts, refusals, and what a plan counts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vae_models import WAN21, WAN22, vae_config

from cosmos3_pipeline.vae.ops import Attention, LatentShape, Margins
from cosmos3_pipeline.vae.program import Program, decoder_program, encoder_program
from cosmos3_pipeline.vae.strategy import StrategyError
from cosmos3_plugins.spatial_shard import SpatialShard
from cosmos3_plugins.spatial_shard.slabs import Grid, Slab, inner_edge, moved, run_of

DECODER = decoder_program(vae_config(WAN22))


@given(rows=st.integers(1, 60), cols=st.integers(1, 60), down=st.integers(1, 9), across=st.integers(1, 9))
def test_slabs_cover_the_latent_once_and_evenly(rows: int, cols: int, down: int, across: int) -> None:
    down, across = min(down, rows), min(across, cols)
    grid = Grid.of(rows, cols, down, across)
    slabs = [grid.slab(i) for i in range(len(grid))]
    covered = [(r, c) for s in slabs for r in range(*s.rows) for c in range(*s.cols)]
    assert sorted(covered) == [(r, c) for r in range(rows) for c in range(cols)]
    heights = {s.height for s in slabs}
    assert max(heights) - min(heights) <= 1 and min(heights) >= 1
    assert slabs[0].height == min(heights)  # the root, which also writes the picture, has the smallest


PROGRAMS = [make(vae_config(base)) for make in (decoder_program, encoder_program) for base in (WAN22, WAN21)]


@settings(deadline=None)  # the first example of each program finds its stretches
@given(
    program=st.sampled_from(PROGRAMS),
    rows=st.integers(1, 60),
    cols=st.integers(1, 60),
    down=st.integers(1, 9),
    across=st.integers(1, 9),
)
def test_slabs_are_dealt_anew_only_where_that_is_better_and_no_row_is_parted(
    program: Program, rows: int, cols: int, down: int, across: int
) -> None:
    latent = Grid.of(rows, cols, min(down, rows), min(across, cols))
    run = run_of(program, latent)
    assert [one.start for one in run.stretches] == [0, *(one.stop for one in run.stretches[:-1])]
    assert run.stretches[-1].stop == len(program)
    # What enters a decoder and leaves an encoder is the latent, whose rows are whole.
    assert (run.entering if program.direction == "decode" else run.leaving) == latent
    finest = run.leaving if program.direction == "decode" else run.entering
    least = min(op.source.scale for op in program.ops[-2:]) if program.direction == "decode" else program.spatial
    assert finest.largest == min(one.grid.largest for one in run.stretches) <= latent.largest
    assert finest.largest >= rows * cols / len(latent) and finest.unit <= least
    sizes = {one.grid: one.grid.largest for one in run.stretches}
    assert len(set(sizes.values())) == len(sizes), "dealt anew, and the largest slab is as large as before"
    for one in run.stretches:
        assert one.grid.extent(1) == (rows, cols)
        for op in program.ops[one.start : one.stop]:
            for scale in (op.source.scale, op.target.scale):
                assert scale % one.grid.unit == 0, "a slab would begin within a row"


@given(
    rows=st.integers(4, 30),
    cols=st.integers(4, 30),
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    data=st.data(),
)
def test_what_leaves_a_slab_when_it_is_dealt_anew_is_what_comes_to_the_others(
    rows: int, cols: int, down: int, across: int, data: st.DataObject
) -> None:
    before = Grid.of(rows, cols, down, across)
    after = Grid.of(rows, cols, down, across, unit=data.draw(st.sampled_from([2, 4, 8])))
    if data.draw(st.booleans()):
        before, after = after, before
    scale = 8
    whole = {(r, c) for r in range(rows * scale) for c in range(cols * scale)}
    had: set[tuple[int, int]] = set()
    for index in range(len(after)):
        old, new = (set(_pixels(grid.slab(index).at(scale))) for grid in (before, after))
        come = [set(_pixels(part)) for _, part in moved(after, before, index, scale)]
        gone = [set(_pixels(part)) for _, part in moved(before, after, index, scale)]
        assert old - set().union(*gone) == old & new
        assert (old & new) | set().union(*come) == new
        for (other, part), pixels in zip(moved(after, before, index, scale), come, strict=True):
            assert (index, part) in moved(before, after, other, scale) and not pixels & old
        had |= new
    assert had == whole


def _pixels(slab: Slab) -> Iterator[tuple[int, int]]:
    return product(range(*slab.rows), range(*slab.cols))


@pytest.mark.parametrize(
    ("rows", "ranks", "expected"),
    [
        (12, 2, []),
        (11, 2, [(2, (11, 22))]),
        (45, 4, [(2, (22, 45)), (4, (45, 90))]),  # 11.25 latent rows each, which are 45 quarters
        (45, 8, [(4, (22, 45)), (8, (45, 90))]),  # as halves the largest would be 12 of them, which are 6 rows
    ],
)
def test_rows_that_do_not_divide_become_parts_of_rows(rows: int, ranks: int, expected: list[Any]) -> None:
    plan = SpatialShard().plan(DECODER, LatentShape(1, 3, rows, 80), ranks)
    assert [(deal.unit, deal.rows) for deal in plan.shares[1].deals] == expected
    assert ("dealt anew" in plan.note) == bool(expected)


@given(down=st.integers(1, 5), across=st.integers(1, 5), data=st.data())
def test_what_a_slab_sends_is_what_its_neighbour_takes(down: int, across: int, data: st.DataObject) -> None:
    grid = Grid.of(11, 13, down, across)
    index = data.draw(st.integers(0, len(grid) - 1))
    margins = data.draw(st.sampled_from([Margins(1, 1, 1, 1), Margins(0, 1, 0, 1), Margins(2, 1, 1, 2)]))
    for step_down, step_right, other in grid.neighbours(index):
        assert (-step_down, -step_right, index) in list(grid.neighbours(other))
        rows = inner_edge(0, 7, margins.top, margins.bottom, step_down)
        # The neighbour below reads `top` rows above itself, the one above reads `bottom` rows.
        assert rows[1] - rows[0] == {-1: margins.bottom, 0: 7, 1: margins.top}[step_down]


@pytest.mark.parametrize(
    ("axis", "rows", "cols", "ranks", "expected"),
    [
        ("height", 45, 80, 4, (4, 1)),
        ("width", 45, 80, 4, (1, 4)),
        ("grid", 45, 80, 4, (1, 4)),  # 45 x 20 = 900 latents; 4 x 1 has 12 x 80, 2 x 2 has 23 x 40
        ("grid", 44, 44, 4, (2, 2)),  # all have 484 latents; 2 x 2 has the shortest cuts
        ("grid", 3, 5, 15, (3, 5)),
        ("grid", 2, 7, 7, (1, 7)),
    ],
)
def test_the_grid_has_the_smallest_largest_slab(
    axis: Any, rows: int, cols: int, ranks: int, expected: tuple[int, int]
) -> None:
    grid = SpatialShard(axis).grid(rows, cols, ranks)
    assert (len(grid.rows), len(grid.cols)) == expected


@pytest.mark.parametrize(
    ("axis", "ranks", "says"),
    [
        ("height", 4, "each rank needs one row and there are 3; use 3 ranks or fewer, or axis=width"),
        ("width", 6, "each rank needs one column and there are 5; use 5 ranks or fewer"),
        ("grid", 7, "no two numbers whose product is 7 fit into 3 x 5"),
        ("grid", 16, "use 15 ranks"),
        ("diagonal", 2, "give height, width or grid"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_numbers(axis: Any, ranks: int, says: str) -> None:
    with pytest.raises(StrategyError) as refusal:
        SpatialShard(axis).plan(DECODER, LatentShape(1, 2, 3, 5), ranks)
    assert says in str(refusal.value)
    assert str(refusal.value).count("; ") == 2


def test_halos_of_720p_over_two_ranks_are_one_row_per_convolution_and_frame() -> None:
    """By hand: frames cached from the chunk before are not sent again, so no message is longer than its chunk."""
    shape = LatentShape(1, 3, 45, 80)
    shares = SpatialShard().plan(DECODER, shape, 2).shares
    rows = messages = 0
    for number, op in enumerate(DECODER.ops):
        elements = 80 * op.source.scale * op.source.channels
        if op.margins:
            rows += elements * (1 + 2 * op.source.frames)  # one frame, then two chunks
            messages += 1 + 2 * (2 if number >= DECODER.portions_from else 1)
        if isinstance(op, Attention):
            rows += 22 * elements * 3
            messages += 3
    assert (shares[0].sent_bytes, shares[0].sent_messages) == (4 * rows, messages)
    assert [share.rows for share in shares] == [(0, 22), (22, 45)]
    # The other rank sends a row more of each attention frame, half a latent row of the larger picture (each rank
    # then has 22.5), and its half of the result.
    attention = next(op for op in DECODER.ops if isinstance(op, Attention))
    (deal,) = shares[1].deals
    assert (deal.unit, deal.rows, deal.cols) == (2, (45, 90), (0, 160))
    at = DECODER.ops[deal.start].source
    half_row = 160 * at.channels * (1 + 2 * at.frames)
    picture = 9 * 360 * (80 * 16) * 3
    assert shares[1].sent_bytes == 4 * rows + 4 * (3 * 80 * attention.source.channels + half_row) + picture
    assert shares[1].sent_messages == messages + 3 + 1 + 2 * 2


@pytest.mark.parametrize("base", [WAN22, WAN21], ids=["wan22", "wan21"])
@pytest.mark.parametrize("make_program", [decoder_program, encoder_program])
def test_shares_add_up(base: dict[str, Any], make_program: Any) -> None:
    program = make_program(vae_config(base))
    shape = LatentShape(2, 3, 7, 9)
    keys_and_values = sum(
        4 * op.source.elements(shape, first=first) * op.source.channels * chunks
        for op in program.ops
        if isinstance(op, Attention)
        for first, chunks in ((True, 1), (False, program.chunks(shape) - 1))
    )
    for axis, ranks in (("height", 1), ("height", 3), ("width", 4), ("grid", 6)):
        shares = SpatialShard(axis).plan(program, shape, ranks).shares
        # Of attention every rank makes the keys and values of whole frames.
        assert sum(s.flops for s in shares) == program.flops(shape) + (ranks - 1) * keys_and_values
        assert {s.weight_bytes for s in shares} == {4 * program.weight_elements()}
    assert SpatialShard().plan(program, shape, 1).shares[0].sent_bytes == 0
