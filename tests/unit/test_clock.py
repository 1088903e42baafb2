"""The clock: cases that can be reckoned by hand, laws that hold for any costs, and clips whose chunks repeat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vae_models import WAN22, vae_config

from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.planning.hardware import vae_rates
from cosmos3_pipeline.planning.vae import shape_of
from cosmos3_pipeline.vae.account import account
from cosmos3_pipeline.vae.assignment import EVERY, Assignment, Block, Rect
from cosmos3_pipeline.vae.clock import FlopCosts, Link, flops_until_end, timeline
from cosmos3_pipeline.vae.costs import RooflineCosts
from cosmos3_pipeline.vae.lowering import Lowered, lower, lower_repeated
from cosmos3_pipeline.vae.ops import WHOLE, LatentShape, NormSilu, Sides
from cosmos3_pipeline.vae.plugins import discover
from cosmos3_pipeline.vae.program import Direction, Program, decoder_program, encoder_program, program_for
from cosmos3_pipeline.vae.search import search
from cosmos3_pipeline.vae.strategy import Exactness, Strategy
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.pipeline_of_shards import PipelineOfShards
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard

PORTIONED = decoder_program(vae_config(WAN22))
DECODER = replace(PORTIONED, portions=1)  # in the cases by hand chunks pass whole
ENCODER = encoder_program(vae_config(WAN22))
END = len(DECODER)
SHAPE = LatentShape(1, 3, 12, 6)
FREE = Link(latency_s=0.0, bytes_per_s=float("inf"))


class Given:
    """So many seconds for each op on the whole picture; `first`: those for the first chunk, if they are others."""

    def __init__(self, later: Sequence[float], first: Sequence[float] | None = None) -> None:
        self._whole = {True: later if first is None else first, False: later}

    def seconds(self, op: int, rows: float, sides: Sides = WHOLE, *, first: bool) -> float:
        return self._whole[first][op] * rows / SHAPE.rows


def line(program: Program, cut: int, frames: int = 3) -> Lowered:
    """Rank 1 runs the ops before `cut`, and the root the others."""
    shape = replace(SHAPE, frames=frames)
    blocks = [Block(ops, (0, program.chunks(shape)), rank) for ops, rank in (((0, cut), 1), ((cut, END), 0))]
    return lower(program, shape, Assignment.of(2, blocks))


# Two ranks: 2 seconds for the one op of the first stage, 3 for all of the second.
TWO_STAGES = line(DECODER, 1)
TWO_STAGE_COSTS = Given([2.0] + [3.0 / (END - 1)] * (END - 1))
CROSSING = account(TWO_STAGES)[1].sent_bytes // 3  # bytes of one chunk that cross the cut behind the first op
ONE_SECOND = Link(latency_s=0.5, bytes_per_s=CROSSING)


def test_two_stages_by_hand() -> None:
    found = timeline(TWO_STAGES, TWO_STAGE_COSTS, lambda a, b: ONE_SECOND)
    # Chunk 0 leaves the first stage at 2, arrives at the root at 3.5 and is finished at 6.5. Chunk 1 leaves at 4
    # and arrives at 5.5. Chunk 2 leaves at 6. The root starts chunk 1 at 6.5, and from then on it can receive
    # chunk 2, which arrives at 8.
    assert found.results == pytest.approx((6.5, 9.5, 12.5))
    assert found.seconds == pytest.approx(12.5)
    assert found.busy_s == pytest.approx((9.0, 6.0))


def test_without_links_messages_take_no_time() -> None:
    assert timeline(TWO_STAGES, TWO_STAGE_COSTS).results == pytest.approx((5.0, 8.0, 11.0))
    assert timeline(TWO_STAGES, TWO_STAGE_COSTS, lambda a, b: FREE).seconds == pytest.approx(11.0)


def test_two_stages_by_hand_with_portions() -> None:
    # The last op of the first stage is the first that sees portions. It takes 2 seconds for a chunk, and the ops
    # before it take no time. Each of the two portions travels for 0.5 s and takes 1.5 s at the root.
    stop = PORTIONED.portions_from + 1
    costs = Given([0.0] * (stop - 1) + [2.0] + [3.0 / (END - stop)] * (END - stop))
    link = Link(latency_s=0.5, bytes_per_s=float("inf"))
    found = timeline(line(PORTIONED, stop, frames=2), costs, lambda a, b: link)
    # The first frame arrives at 2.5 and is finished at 5.5. The portions of the next chunk leave at 3 and 4.
    assert found.results == pytest.approx((5.5, 7.0, 8.5))
    assert found.busy_s == pytest.approx((6.0, 4.0))


def test_what_a_message_takes_from_computing_is_busy_time() -> None:
    busy = replace(ONE_SECOND, busy_s=0.1, busy_s_per_byte=0.2 / CROSSING)
    found = timeline(TWO_STAGES, TWO_STAGE_COSTS, lambda a, b: busy)
    assert found.busy_s == pytest.approx((9.0 + 3 * 0.3, 6.0 + 3 * 0.3))


def test_links_are_those_of_the_ranks() -> None:
    there = timeline(TWO_STAGES, TWO_STAGE_COSTS, lambda a, b: ONE_SECOND if (a, b) == (1, 0) else FREE)
    back = timeline(TWO_STAGES, TWO_STAGE_COSTS, lambda a, b: ONE_SECOND if (a, b) == (0, 1) else FREE)
    assert (there.seconds, back.seconds) == pytest.approx((12.5, 11.0))


def test_at_most_two_groups_of_messages_are_leaving() -> None:
    # While the root is at its first chunk until 12, the first stage makes chunks 1 to 4, and may not begin another
    # before chunk 2 is on its way. So chunk 8 is made at 20, and not long before.
    others = END - 1
    slow = Given([2.0] + [1.0 / others] * others, first=[2.0] + [10.0 / others] * others)
    found = timeline(line(DECODER, 1, frames=9), slow, lambda a, b: FREE)
    assert found.results == pytest.approx((12, 13, 14, 15, 16, 17, 18, 19, 21))


def test_two_slabs_by_hand() -> None:
    # Norms compute what the neighbour waits for first, so that its halo is there before they end. What nothing
    # hides: the halos of conv_in and of the three upsamplings, attention's frames, and the other half of the last
    # picture.
    half = SHAPE.rows // 2
    slabs = [Rect(0, half, 0, SHAPE.cols), Rect(half, SHAPE.rows, 0, SHAPE.cols)]
    blocks = [Block((0, END), (0, 3), rank, slab) for rank, slab in enumerate(slabs)]
    lowered = lower(DECODER, SHAPE, Assignment.of(2, blocks))
    costs = Given([1.0] * END)
    assert timeline(lowered, costs).seconds == pytest.approx(3 * END / 2)
    found = timeline(lowered, costs, lambda a, b: Link(0.01, float("inf")))
    assert found.seconds == pytest.approx(3 * (END / 2 + 5 * 0.01) + 0.01)
    assert found.busy_s == pytest.approx((3 * END / 2, 3 * END / 2))
    # Half a second is more than what is left of a norm while its edges travel.
    late = timeline(lowered, costs, lambda a, b: Link(0.5, float("inf")))
    assert (
        late.seconds > 3 * (END / 2 + 5 * 0.5) + 0.5 + sum(isinstance(op, NormSilu) for op in DECODER.ops) * 0.01
    )


def test_every_rank_for_itself_sends_nothing() -> None:
    lowered = lower(DECODER, SHAPE, Assignment.of(4, [Block((0, END), (0, 3), EVERY)]))
    found = timeline(lowered, Given([1.0] * END), lambda a, b: Link(9.0, 1.0))
    assert found.seconds == pytest.approx(3 * END)
    assert found.busy_s == pytest.approx((3 * END,) * 4)
    # Its FLOPs count once, whatever the number of ranks.
    assert flops_until_end(lower_repeated(DECODER, SHAPE, lowered.assignment)) == DECODER.flops(SHAPE)


def test_a_trace_opens_as_json() -> None:
    found = timeline(TWO_STAGES, TWO_STAGE_COSTS, lambda a, b: ONE_SECOND, events=True)
    trace = json.loads(json.dumps(found.trace()))["traceEvents"]
    of_root = [event for event in trace if event["tid"] == 0]
    # The root passes a chunk in two runs of ops, because chunks could be divided between them.
    assert [event["ts"] for event in of_root[::2]] == pytest.approx([3.5e6, 6.5e6, 9.5e6])
    assert sum(event["dur"] for event in of_root) == pytest.approx(9e6)
    assert {event["tid"] for event in trace} == {0, 1} and all(event["ph"] == "X" for event in trace)
    assert trace[0]["name"] == "chunk 0: ops 0-0"
    assert timeline(TWO_STAGES, TWO_STAGE_COSTS).events == ()


# ------------------------------------------------------------------------------------- laws
STRATEGIES: dict[str, Strategy] = {
    "replicated": Replicated(),
    "layer_pipeline": LayerPipeline(),
    "layer_pipeline, fixed cuts": LayerPipeline(moving_cuts=False),
    "spatial_shard": SpatialShard(),
    "spatial_shard, columns": SpatialShard("width"),
    "spatial_shard, grid": SpatialShard("grid"),
    "pipeline_of_shards": PipelineOfShards(groups=2),
}
SECONDS = st.lists(st.floats(0.001, 1.0), min_size=END, max_size=END)
LINKS = st.builds(Link, latency_s=st.floats(0, 0.5), bytes_per_s=st.floats(1e3, 1e12))


@pytest.mark.long
@settings(deadline=None, max_examples=40)
@given(
    program=st.sampled_from([DECODER, PORTIONED]),
    name=st.sampled_from(sorted(STRATEGIES)),
    ranks=st.sampled_from([2, 4, 6]),
    frames=st.integers(1, 4),
    seconds=SECONDS,
    link=LINKS,
)
def test_laws_of_any_decode(
    program: Program, name: str, ranks: int, frames: int, seconds: list[float], link: Link
) -> None:
    shape, costs = replace(SHAPE, frames=frames), Given(seconds)
    lowered = lower(program, shape, STRATEGIES[name].assign(program, shape, ranks))
    found = timeline(lowered, costs, lambda a, b: link)
    assert list(found.results) == sorted(found.results)
    # Nobody does two things at once; somebody computes, or a message is under way, at any time.
    assert found.seconds >= max(found.busy_s) * (1 - 1e-9)
    tallies = account(lowered)
    messages = sum(t.sent_bytes / link.bytes_per_s + t.sent_messages * link.latency_s for t in tallies)
    assert found.seconds <= (sum(found.busy_s) + messages) * (1 + 1e-9)
    # Work is neither lost nor done twice, but by ranks of which each does all.
    copies = ranks if lowered.everywhere else 1
    assert sum(found.busy_s) == pytest.approx(copies * frames * sum(seconds))


@pytest.mark.parametrize("program", [DECODER, PORTIONED, ENCODER], ids=["whole", "portions", "encoder"])
def test_one_rank_takes_the_sum_of_its_ops(program: Program) -> None:
    for strategy in (Replicated(), LayerPipeline(), SpatialShard()):
        shape = replace(SHAPE, frames=9)
        lowered = lower(program, shape, strategy.assign(program, shape, 1))
        later, first = [0.1 + 0.01 * op for op in range(len(program))], [0.5] * len(program)
        found = timeline(lowered, Given(later, first), lambda a, b: ONE_SECOND)
        assert found.seconds == pytest.approx(sum(first) + (program.chunks(shape) - 1) * sum(later))
        assert found.busy_s == pytest.approx((found.seconds,))


@pytest.mark.parametrize("program", [PORTIONED, ENCODER], ids=["decode", "encode"])
@pytest.mark.parametrize(("rows", "cols"), [(12, 6), (11, 10), (45, 80)], ids=str)
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_chunks_that_repeat_are_counted(name: str, rows: int, cols: int, program: Program) -> None:
    """The time of chunks that repeat is the same as if every chunk of the clip were lowered."""
    shape = LatentShape(1, 1 + 19 * program.latents_per_chunk, rows, cols)
    assignment = STRATEGIES[name].assign(program, shape, 4)
    clip, whole = lower_repeated(program, shape, assignment), lower(program, shape, assignment)
    costs, link = RooflineCosts(program, shape, 1e11, 1e10), Link(1e-4, 2e9)
    counted = clip.total(lambda lowered: timeline(lowered, costs, lambda a, b: link).seconds)
    assert counted == pytest.approx(timeline(whole, costs, lambda a, b: link).seconds, rel=1e-6)
    assert clip.total(lambda lowered: timeline(lowered, FlopCosts(lowered)).seconds) == pytest.approx(
        timeline(whole, FlopCosts(whole)).seconds, rel=1e-6
    )


def seconds_on(program: Program, ranks: int, exactness: Exactness) -> float:
    """Seconds of the fastest assignment for 189 frames of 1280 x 720. The costs are those of topology=h200_x4."""
    config = composition_of(["model=nano", "topology=h200_x4"]).typed()
    shape, rates = shape_of(config, "decode"), vae_rates(config)
    rates = replace(rates, latency_s=rates.launch_s, ranks_per_node=ranks)
    costs = rates.costs(program, shape)
    classes = discover().strategies.values()
    best, *_ = search(classes, program, shape, ranks, costs=costs, links=rates.link, required=exactness)
    assert best.exactness.satisfies(exactness)
    return best.seconds


@pytest.fixture(scope="module")
def wan22() -> dict[Direction, Program]:
    config = plain(composition_of(["model=nano"]).typed().model.vae)
    return {direction: program_for(direction, config) for direction in ("decode", "encode")}


def test_four_accelerators_share_the_decoder_of_a_full_clip_bit_for_bit(wan22: dict[Direction, Program]) -> None:
    alone, four = (seconds_on(wan22["decode"], ranks, Exactness.BITWISE) for ranks in (1, 4))
    assert alone / four >= 3.8


def test_two_ranks_that_take_chunks_in_turn_work_at_once() -> None:
    """The caches of a chunk are sent before the next rank asks for them: a rank that waited would be no help."""
    shape = LatentShape(1, 1 + 19 * ENCODER.latents_per_chunk, 12, 12)
    chunks, ops = ENCODER.chunks(shape), (0, len(ENCODER))
    costs = RooflineCosts(ENCODER, shape, 1e11, 1e10)

    def seconds(ranks: int) -> float:
        blocks = [Block(ops, (chunk, chunk + 1), chunk % ranks) for chunk in range(chunks)]
        lowered = lower(ENCODER, shape, Assignment.of(ranks, blocks))
        return timeline(lowered, costs, lambda source, target: Link(1e-5, 1e10)).seconds

    assert seconds(1) / seconds(2) > 1.7


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("direction", "ranks", "faster"),
    [
        ("decode", 8, 7.4),
        ("decode", 16, 13),
        ("decode", 72, 30),
        ("encode", 8, 7.4),
        ("encode", 16, 13),
        ("encode", 72, 30),
    ],
)
def test_a_rack_shares_a_full_clip(
    direction: Direction, ranks: int, faster: float, wan22: dict[Direction, Program]
) -> None:
    """Every kernel that is launched costs 12 us, and so does every message."""
    program = wan22[direction]
    assert seconds_on(program, 1, Exactness.ROUNDING) / seconds_on(program, ranks, Exactness.ROUNDING) >= faster
