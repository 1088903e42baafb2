"""The strategies' assignments. Each strategy keeps to its plan. Ranks are threads."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from cosmos3_wavefront import Wavefront
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import run_on_threads
from torch import Tensor, nn
from vae_models import WAN22, make_vae, vae_config

from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes
from cosmos3_pipeline.vae.account import account
from cosmos3_pipeline.vae.assignment import Assignment, Block
from cosmos3_pipeline.vae.costs import ChunkCosts
from cosmos3_pipeline.vae.line_cuts import line_cuts
from cosmos3_pipeline.vae.lowering import lower
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Direction, decoder_program, encoder_program
from cosmos3_pipeline.vae.strategy import Exactness, Strategy, StrategyError
from cosmos3_pipeline.vae.weights import BoundVae, ModuleWeights
from cosmos3_plugins.auto import Auto
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.pipeline_of_shards import PipelineOfShards
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard
from cosmos3_plugins.tiled import Tiled

CONFIG = vae_config(WAN22, base_dim=24, decoder_base_dim=24)
DECODER, ENCODER = decoder_program(vae_config(WAN22)), encoder_program(vae_config(WAN22))
FULL_CONFIG = vae_config(WAN22, base_dim=160, decoder_base_dim=256, z_dim=48, num_res_blocks=2)
FULL = decoder_program(FULL_CONFIG)
FULL_ENCODER = encoder_program(FULL_CONFIG)


@pytest.mark.sampled(4)
@pytest.mark.long
@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        (Replicated(), 1),
        (LayerPipeline(), 3),
        (SpatialShard("grid"), 4),
        (PipelineOfShards(), 4),
        (Wavefront(), 3),
        (Tiled(48, 32, 32, 16), 3),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_is_alive_is_what_was_planned(strategy: Strategy, ranks: int, direction: Direction) -> None:
    shape, model = LatentShape(1, 6, 5, 6), make_vae(CONFIG)
    generator = torch.Generator().manual_seed(0)
    vae = BoundVae(model.config, ModuleWeights(model), dtype=torch.float32, device=torch.device("cpu"))
    size = (1, CONFIG["z_dim"], 6, 5, 6) if direction == "decode" else (1, 3, 21, 80, 96)
    clip = torch.rand(size, generator=generator)
    known = [*model.state_dict().values(), clip]

    def work(comm: Any) -> int:
        runner = strategy.runner(vae, comm, direction)
        for _ in range(2):  # the first time reorders weights, which are not activations
            with LiveBytes(known) as live:
                if direction == "encode":
                    runner.encode(clip)
                else:
                    for frames in runner.stream(clip, pixels="uint8"):
                        del frames
        return live.peak

    planned = strategy.plan(vae.program(direction), shape, ranks).shares
    alive = run_on_threads(ranks, work)[0]
    ratios = [peak / share.activation_bytes for share, peak in zip(planned, alive, strict=True)]
    assert all(0.8 <= ratio <= 1.15 for ratio in ratios), ratios


def test_memory_does_not_grow_with_the_clip() -> None:
    for strategy, ranks in ((Replicated(), 1), (SpatialShard(), 2), (LayerPipeline(moving_cuts=False), 3)):
        plans = [strategy.plan(DECODER, LatentShape(1, frames, 6, 5), ranks).shares for frames in (9, 64)]
        assert [a.activation_bytes for a in plans[0]] == [b.activation_bytes for b in plans[1]]


def refusal(strategy: Strategy, shape: LatentShape, ranks: int) -> str:
    with pytest.raises(StrategyError) as refused:
        strategy.plan(DECODER, shape, ranks)
    assert refused.value.problem.why and refused.value.problem.works
    return str(refused.value)


@pytest.mark.parametrize(
    ("strategy", "ranks", "says"),
    [
        (LayerPipeline(), len(DECODER) + 1, f"use {len(DECODER)} ranks or fewer"),
        (SpatialShard("height"), 4, "use 3 ranks or fewer"),
        (SpatialShard("width"), 6, "use 5 ranks or fewer"),
        (SpatialShard("grid"), 16, "use 15 ranks or fewer"),
        (SpatialShard("diagonal"), 2, "give height, width or grid"),  # type: ignore[arg-type]
        (PipelineOfShards(4), 3, "use 1 to 3 groups"),
        (PipelineOfShards(0), 4, "use 1 to 4 groups"),
        (PipelineOfShards(2), 8, "ranks"),
        (Wavefront(), 3, "use 2 turns"),
        (Wavefront(0), 2, "give 1 or more"),
    ],
)
def test_what_it_cannot_do_is_refused_with_what_works(strategy: Strategy, ranks: int, says: str) -> None:
    assert says.replace("2 turns", "2 ranks") in refusal(strategy, LatentShape(1, 2, 3, 5), ranks)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, "returned None"),
        ([Block((0, 1), (0, 1), 0)], "returned [Block("),
        (Assignment.of(1, [Block((0, len(DECODER)), (0, 2), 0)]), "an assignment for 1 ranks"),
        (Assignment.of(0, []), "an assignment for 0 ranks"),
        (Assignment.of(2, [(0, 1)]), "returned (0, 1) among its blocks"),  # type: ignore[list-item]
    ],
)
def test_a_plugin_that_returns_something_else_is_named(returned: Any, says: str) -> None:
    class Careless(Replicated):
        def assign(self, *asked: Any) -> Any:
            return returned

    assert says in refusal(Careless(), LatentShape(1, 2, 3, 5), 2)


@pytest.mark.parametrize(
    ("axis", "rows", "cols", "ranks", "note"),
    [
        ("height", 45, 80, 4, "4 x 1"),
        ("width", 45, 80, 4, "1 x 4"),
        ("grid", 45, 80, 4, "1 x 4"),  # 45 x 20 = 900 latents; 4 x 1 has 12 x 80, 2 x 2 has 23 x 40
        ("grid", 44, 44, 4, "2 x 2"),  # all have 484 latents; 2 x 2 has the shortest cuts
        ("grid", 3, 5, 15, "3 x 5"),
        ("grid", 2, 7, 7, "1 x 7"),
    ],
)
def test_the_grid_has_the_smallest_largest_slab(axis: Any, rows: int, cols: int, ranks: int, note: str) -> None:
    assert SpatialShard(axis).assign(DECODER, LatentShape(1, 2, rows, cols), ranks).note.startswith(note)


@pytest.mark.parametrize(
    ("rows", "ranks", "units"), [(12, 2, [1]), (11, 2, [1, 2]), (45, 4, [1, 2, 4]), (45, 8, [1, 4, 8])]
)
def test_rows_that_do_not_divide_become_parts_of_rows(rows: int, ranks: int, units: list[int]) -> None:
    blocks = SpatialShard().assign(DECODER, LatentShape(1, 3, rows, 80), ranks).blocks
    assert sorted({block.unit for block in blocks}) == units


def test_one_group_is_spatial_shard() -> None:
    shape = LatentShape(1, 5, 32, 32)
    for program in (DECODER, ENCODER):
        assert PipelineOfShards(1).plan(program, shape, 3).shares == SpatialShard().plan(program, shape, 3).shares


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(("ranks", "groups"), [(8, 2), (8, 3), (7, 3), (37, 5)])
def test_groups_use_every_rank_once_and_the_slowest_is_no_slower_than_with_equal_groups(
    ranks: int, groups: int, on_host: bool
) -> None:
    shape = LatentShape(1, 9, 45, 80, element_bytes=2, on_host=on_host)
    for program in (DECODER, ENCODER):
        plan = PipelineOfShards(groups).plan(program, shape, ranks)
        assert [share.rank for share in plan.shares] == list(range(ranks))
        assert len({share.ops for share in plan.shares}) == groups
        assert plan.shares[0].ops[1] == len(program), "the root has the last ops"


@pytest.mark.parametrize(
    ("ranks", "groups", "rows"), [(72, 20, 45), (72, 30, 45), (93, 2, 47), (7, 3, 3), (9, 3, 3), (10, 3, 3)]
)
def test_groups_are_refused_only_where_ranks_have_no_row(ranks: int, groups: int, rows: int) -> None:
    shape = LatentShape(1, 3, rows, 8, on_host=False)
    if ranks > groups * rows:
        assert f"use {groups * rows} ranks or fewer" in refusal(PipelineOfShards(groups), shape, ranks)
    else:
        assert PipelineOfShards(groups).assign(FULL, shape, ranks).ranks == ranks


def test_where_the_picture_is_small_a_group_has_few_ranks() -> None:
    shape = LatentShape(1, 9, 45, 80, element_bytes=2, on_host=False)
    ops = [share.ops for share in PipelineOfShards(2).plan(FULL_ENCODER, shape, 8).shares]
    first, last = (sum(run[0] == start for run in ops) for start in (0, max(run[0] for run in ops)))
    assert (first, last) == (6, 2)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_layer_pipeline_is_balanced_and_moving_cuts_make_it_faster(ranks: int) -> None:
    shape = LatentShape(1, 32, 16, 16)
    moving, fixed = (LayerPipeline(moving_cuts=moves).plan(FULL, shape, ranks) for moves in (True, False))
    assert sum(share.flops for share in fixed.shares) == FULL.flops(shape) == sum(s.flops for s in moving.shares)
    assert max(share.flops for share in fixed.shares) <= 1.35 * FULL.flops(shape) / ranks
    assert FULL.flops(shape) / moving.until_end > 0.7 * ranks
    assert "with moving cuts" in moving.note and "at best" in moving.note


@settings(max_examples=15)
@given(ranks=st.integers(2, 4), chunks=st.integers(8, 20), seed=st.integers(0, 2**16))
def test_moving_cuts_are_an_assignment_for_any_costs(ranks: int, chunks: int, seed: int) -> None:
    rng = random.Random(seed)
    later = [rng.uniform(0.3, 1.7) * op.flops(LatentShape(1, 2, 8, 8), first=False) for op in DECODER.ops]
    costs = ChunkCosts(tuple(seconds / 4 for seconds in later), tuple(later))
    cuts = line_cuts(DECODER, costs, ranks, chunks)
    edges = [(0,) * chunks, *cuts.paths, (len(DECODER),) * chunks]
    for before, after in pairwise(edges):
        assert all(a < b for a, b in zip(before, after, strict=True)), "a rank without work on a chunk"
        # Its frames of the chunk before must have reached the rank that runs the op next.
        assert all(a <= b for a, b in zip(before[1:], after, strict=False))
    assert all(DECODER.may_be_cut(cut) for path in cuts.paths for cut in path) or not cuts.move
    fixed = line_cuts(DECODER, costs, ranks, chunks, moving=False)
    assert not fixed.move
    assert cuts.speed_up > fixed.speed_up if cuts.move else cuts == fixed


def test_two_slabs_at_720p_send_one_column_of_what_each_convolution_reads() -> None:
    sizes, edge = [LatentShape(1, frames, 45, 80) for frames in (5, 4)], 0
    with torch.device("meta"):
        model = AutoencoderKLWan(**FULL_CONFIG)

    def count(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        nonlocal edge
        shape = given[0].shape
        if isinstance(module, nn.Conv3d):
            edge += 4 * shape[1] * shape[2] * shape[3]
        else:  # reads the picture that was doubled before it, whose rows are sent before that
            edge += 4 * shape[0] * shape[1] * shape[2] // 2

    for module in model.decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.kernel_size[-1] == 3:
            module.register_forward_hook(count)
    sent, edges = [], []
    for shape in sizes:
        edge = 0
        model.decode(torch.empty(1, 48, shape.frames, 45, 80, device="meta"))
        edges.append(edge)
        assignment = SpatialShard("width").assign(FULL, shape, 2)
        sent.append([tally.sent_bytes for tally in account(lower(FULL, shape, assignment))])
    one_chunk = [longer - shorter for longer, shorter in zip(*sent, strict=True)]
    half_for_attention, half_of_four_frames = 4 * 1024 * 45 * 40, 4 * 3 * 720 * 640
    assert one_chunk[0] == edges[0] - edges[1] + half_for_attention
    assert one_chunk[1] == one_chunk[0] + half_of_four_frames


def test_a_plan_says_how_exact_the_clip_will_be() -> None:
    shape = LatentShape(1, 3, 4, 4)
    assert LayerPipeline().plan(DECODER, shape, 2).exactness == Exactness.BITWISE
    assert SpatialShard().plan(DECODER, shape, 2).exactness == Exactness.ROUNDING
    assert SpatialShard().plan(DECODER, shape, 1).exactness == Exactness.BITWISE


def test_auto_leaves_out_what_does_not_fit() -> None:
    """If the fastest does not fit, auto takes the next that fits. If none fits, it takes the smallest."""
    program, shape = decoder_program(vae_config(WAN22)), LatentShape(1, 6, 24, 40, 2)

    def peak(strategy: Strategy) -> int:
        shares = strategy.plan(program, shape, 4).shares
        return max(share.weight_bytes + share.activation_bytes for share in shares)

    fastest = peak(Auto(require="rounding"))
    smaller = peak(Auto(require="rounding", memory_gb=(fastest - 1) / 1e9))
    assert smaller < fastest
    assert peak(Auto(require="rounding", memory_gb=1e-6)) <= smaller
