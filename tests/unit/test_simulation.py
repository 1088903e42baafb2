"""The simulation of decoding on many ranks: cases by hand, laws that hold for any costs, and its docs' tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vae_models import WAN22, vae_config

from cosmos3_pipeline.plan.events import Clock, Message, Process
from cosmos3_pipeline.plan.simulation import Link, Nodes, OpCosts, SimulationError, simulate
from cosmos3_pipeline.vae.line_times import ChunkCosts, LineTimes, flops_until_end
from cosmos3_pipeline.vae.ops import Attention, LatentShape, NormSilu
from cosmos3_pipeline.vae.program import Program, decoder_program, encoder_program, portions_under_way
from cosmos3_pipeline.vae.strategy import Exactness, RankShare, Strategy, StrategyPlan
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.layer_pipeline.balance import Run, speed_up
from cosmos3_plugins.layer_pipeline.costs import op_costs
from cosmos3_plugins.pipeline_of_shards import PipelineOfShards
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard
from cosmos3_plugins.tiled import Tiled

ROOT = Path(__file__).parents[2]
PORTIONED = decoder_program(vae_config(WAN22))
# In the cases by hand chunks pass whole.
DECODER = replace(PORTIONED, portions=1)
PROGRAMS = st.sampled_from([DECODER, PORTIONED])
SHAPE = LatentShape(1, 3, 12, 6)
FREE = Link(latency_s=0.0, bytes_per_s=1e30)


class Given(OpCosts):
    """So many seconds for each op on the whole picture, `fixed` of which do not shrink with the slab.

    `first`: those for the first chunk, if they are others.
    """

    def __init__(
        self,
        program: Program,
        whole: Sequence[float],
        *,
        first: Sequence[float] | None = None,
        rows: int = SHAPE.rows,
        fixed: float = 0.0,
    ) -> None:
        super().__init__(program)
        self._whole = {True: whole if first is None else first, False: whole}
        self._rows, self._fixed = rows, fixed

    def seconds(self, index: int, rows: float, first: bool) -> float:
        return self._whole[first][index] * (self._fixed + (1 - self._fixed) * rows / self._rows)


def even(seconds: float = 1.0, *, fixed: float = 0.0) -> Given:
    return Given(DECODER, [seconds] * len(DECODER), fixed=fixed)


def share(rank: int, ops: tuple[int, int], rows: tuple[int, int] = (0, 12), **others: int) -> RankShare:
    numbers = {"flops": 0, "weight_bytes": 0, "activation_bytes": 0, "sent_bytes": 0, "sent_messages": 0}
    return RankShare(rank=rank, ops=ops, rows=rows, cols=(0, 6), **{**numbers, **others})


def plan_of(*shares: RankShare, exactness: Exactness = Exactness.BITWISE) -> StrategyPlan:
    return StrategyPlan("mine", "decode", exactness, shares, "")


# Two ranks: 2 seconds for the one op of the first stage, 3 for all of the second; half a second of latency, and
# one for the activation of one latent frame, which is what crosses the cut behind the first op.
TWO_STAGES = plan_of(share(0, (1, len(DECODER))), share(1, (0, 1)))
TWO_STAGE_COSTS = Given(DECODER, [2.0] + [3.0 / (len(DECODER) - 1)] * (len(DECODER) - 1))
(CROSSING,) = {DECODER.carried_bytes(1, SHAPE) // 3}
ONE_SECOND = Link(latency_s=0.5, bytes_per_s=CROSSING)


def test_two_stages_by_hand() -> None:
    found = simulate(DECODER, SHAPE, TWO_STAGES, TWO_STAGE_COSTS, ONE_SECOND)
    # Chunk 0 is made by 2, there at 3.5, done at 6.5. Chunk 1 is made by 4 and there at 5.5, chunk 2 made by 6;
    # the root takes chunk 1 up at 6.5, expects chunk 2 from then on, and has it at 8.
    assert found.chunks == pytest.approx((6.5, 9.5, 12.5))
    assert found.busy_s == pytest.approx((9.0, 6.0))
    assert found.waiting_s == pytest.approx((3.5, 2.0))
    assert found.sent_bytes == (0, 3 * CROSSING)
    assert found.sent_messages == (0, 3)


def test_two_stages_by_hand_with_portions() -> None:
    # The first op of those that see portions is the last of the first stage, which takes 2 seconds for a chunk and
    # no time for what comes before; each of the two portions is half a second under way, and 1.5 at the root.
    stop = PORTIONED.portions_from + 1
    plan = plan_of(share(0, (stop, len(PORTIONED))), share(1, (0, stop)))
    late = len(PORTIONED) - stop
    costs = Given(PORTIONED, [0.0] * (stop - 1) + [2.0] + [3.0 / late] * late)
    found = simulate(PORTIONED, replace(SHAPE, frames=2), plan, costs, Link(latency_s=0.5, bytes_per_s=1e30))
    # The first frame is there at 2.5 and done at 5.5. The portions of the next chunk are made by 3 and 4.
    assert found.chunks == pytest.approx((5.5, 7.0, 8.5))
    assert found.busy_s == pytest.approx((6.0, 4.0))
    assert found.sent_messages == (0, 3 * len(PORTIONED.carried(stop)))


def test_two_stages_by_hand_when_nothing_overlaps() -> None:
    found = simulate(DECODER, SHAPE, TWO_STAGES, TWO_STAGE_COSTS, ONE_SECOND, overlaps=False)
    # The root expects chunk 1 only when it has done chunk 0, at 6.5, and the first stage waits for that until 8.
    assert found.chunks == pytest.approx((6.5, 11.0, 15.5))


class SlowStart(Given):
    """The second stage of TWO_STAGES takes 10 seconds for the first chunk, and 1 for the others."""

    def seconds(self, index: int, rows: float, first: bool) -> float:
        return 2.0 if index == 0 else (10.0 if first else 1.0) / (len(DECODER) - 1)


def test_at_most_two_results_are_leaving_and_four_where_cuts_move() -> None:
    # While the root is at its first chunk until 12, the first stage makes chunks 1 to 4, and may not begin another
    # before chunk 2 is on its way. So chunk 8 is made at 20, and not long before.
    shape = replace(SHAPE, frames=9)
    found = simulate(DECODER, shape, TWO_STAGES, SlowStart(DECODER, []), FREE)
    assert found.chunks == pytest.approx((12, 13, 14, 15, 16, 17, 18, 19, 21))
    # With two more the first stage has made all by then.
    moving = replace(
        TWO_STAGES, shares=tuple(replace(share, runs=(share.ops,) * 9) for share in TWO_STAGES.shares)
    )
    found = simulate(DECODER, shape, moving, SlowStart(DECODER, []), FREE)
    assert found.chunks == pytest.approx((12, 13, 14, 15, 16, 17, 18, 19, 20))
    assert [portions_under_way(chunks, moving=True) for chunks in (3, 7, 8, 48)] == [2, 2, 4, 4]


def test_what_a_message_takes_from_computing_is_busy_time() -> None:
    busy = replace(ONE_SECOND, busy_s=0.1, busy_s_per_byte=0.2 / CROSSING)
    found = simulate(DECODER, SHAPE, TWO_STAGES, TWO_STAGE_COSTS, busy)
    assert found.busy_s == pytest.approx((9.0 + 3 * 0.3, 6.0 + 3 * 0.3))


def test_ranks_of_different_nodes_have_the_link_between_nodes() -> None:
    def seconds(node_ranks: int) -> float:
        nodes = Nodes(node_ranks, ONE_SECOND)
        return simulate(DECODER, SHAPE, TWO_STAGES, TWO_STAGE_COSTS, FREE, nodes=nodes).seconds

    assert seconds(2) == pytest.approx(2 + 3 * 3)
    assert seconds(1) == pytest.approx(12.5)


NORMS = sum(isinstance(op, NormSilu) for op in DECODER.ops)


def attention_of(ranks: int, shape: LatentShape = SHAPE) -> float:
    """The attention that so many ranks do together on even slabs, in that of one. Keys are all on each."""
    (op,) = (op for op in DECODER.ops if isinstance(op, Attention))
    pixels, channels = shape.rows * shape.cols * op.source.scale**2, op.source.channels
    projected = (2 * pixels + 2 * ranks * pixels) * channels**2  # queries and outputs, keys and values
    return (projected + 2 * pixels**2 * channels) / (4 * pixels * channels**2 + 2 * pixels**2 * channels)


def test_two_slabs_by_hand() -> None:
    # Norms compute what the neighbour waits for first, so that its halo is there before they end. What nothing
    # hides: the halos of conv_in and of the three upsamplings, attention's frames, and the other half of the last
    # picture. Both compute the keys and values of attention.
    plan = SpatialShard().plan(DECODER, SHAPE, 2)
    link = Link(0.01, 1e30)
    computing = (attention_of(2) + len(DECODER) - 1) / 2
    hidden = simulate(DECODER, SHAPE, plan, even(), link)
    assert hidden.seconds == pytest.approx(3 * (computing + 5 * 0.01) + 0.01)
    waited = simulate(DECODER, SHAPE, plan, even(), link, overlaps=False)
    assert waited.seconds == pytest.approx(3 * (computing + (6 + NORMS) * 0.01))


def test_a_norm_in_two_parts_pays_its_fixed_cost_twice() -> None:
    plan = SpatialShard().plan(DECODER, SHAPE, 2)
    found = simulate(DECODER, SHAPE, plan, even(fixed=1.0), FREE)
    assert found.seconds == pytest.approx(3 * (attention_of(2) / 2 + len(DECODER) - 1 + NORMS))


def test_a_slab_that_is_all_edge_hides_nothing() -> None:
    # With slabs of one latent row nothing is left to compute at the smallest scale while that row travels.
    shape = LatentShape(1, 1, 2, 6)
    plan = SpatialShard().plan(DECODER, shape, 2)
    costs = Given(DECODER, [1.0] * len(DECODER), rows=2, fixed=1.0)
    found = simulate(DECODER, shape, plan, costs, Link(0.01, 1e30))
    smallest = sum(isinstance(op, NormSilu) and op.source.scale == 1 for op in DECODER.ops)
    computing = attention_of(2, shape) / 2 + len(DECODER) - 1 + NORMS - smallest
    assert found.seconds == pytest.approx(computing + (6 + smallest) * 0.01)


def test_a_rank_sends_one_message_at_a_time_and_takes_in_one() -> None:
    clock = Clock(3, lambda a, b: Link(0.25, 1.0))
    arrivals: list[float] = []

    def sender(rank: int, targets: list[int]) -> Process:
        yield from [clock.send(rank, target, 2) for target in targets]

    def receiver(rank: int, sources: list[int]) -> Process:
        for message in [clock.receive(source, rank) for source in sources]:
            yield message
            arrivals.append(clock.now)

    clock.run([sender(0, [1, 2]), receiver(1, [0]), receiver(2, [0])])
    assert arrivals == [2.25, 4.25]
    clock, arrivals = Clock(3, lambda a, b: Link(0.25, 1.0)), []
    clock.run([receiver(0, [1, 2]), sender(1, [0]), sender(2, [0])])
    assert arrivals == [2.25, 4.25]


def test_a_message_waits_for_both_its_ends() -> None:
    clock = Clock(2, lambda a, b: Link(1.0, 1.0))
    log: list[tuple[str, float]] = []

    def early() -> Process:
        message: Message = clock.send(0, 1, 3)
        yield message
        log.append(("left", clock.now))

    def late() -> Process:
        yield 5.0
        yield clock.receive(0, 1)
        log.append(("arrived", clock.now))

    clock.run([early(), late()])
    assert sorted(log) == [("arrived", 9.0), ("left", 9.0)]
    assert clock.waiting == [9.0, 4.0]


def test_a_message_that_nobody_sends_is_our_own_mistake() -> None:
    clock = Clock(2, lambda a, b: FREE)

    def waits() -> Process:
        yield clock.receive(1, 0)

    with pytest.raises(AssertionError, match="nobody sends"):
        clock.run([waits(), iter(())])


STRATEGIES: dict[str, Callable[[int], Strategy]] = {
    "layer_pipeline": lambda ranks: LayerPipeline(),
    "spatial_shard": lambda ranks: SpatialShard(),
    "spatial_shard, columns": lambda ranks: SpatialShard("width"),
    "spatial_shard, grid": lambda ranks: SpatialShard("grid"),
    "pipeline_of_shards": lambda ranks: PipelineOfShards(groups=2 if ranks % 2 == 0 else 1),
    "tiled": lambda ranks: Tiled(64, 64, 32, 32),
    "replicated": lambda ranks: Replicated(),
}
SECONDS = st.lists(st.floats(0.001, 1.0), min_size=len(DECODER), max_size=len(DECODER))
LINKS = st.builds(Link, latency_s=st.floats(0, 0.5), bytes_per_s=st.floats(1e3, 1e12))


@settings(deadline=None, max_examples=60)
@given(
    program=PROGRAMS,
    name=st.sampled_from(sorted(STRATEGIES)),
    ranks=st.integers(1, 6),
    frames=st.integers(1, 4),
    whole=SECONDS,
    fixed=st.floats(0, 1),
    link=LINKS,
    overlaps=st.booleans(),
)
def test_laws_of_any_decode(
    program: Program,
    name: str,
    ranks: int,
    frames: int,
    whole: list[float],
    fixed: float,
    link: Link,
    overlaps: bool,
) -> None:
    shape = replace(SHAPE, frames=frames)
    plan = STRATEGIES[name](ranks).plan(program, shape, ranks)
    costs = Given(program, whole, fixed=fixed)
    found = simulate(program, shape, plan, costs, link, overlaps=overlaps)
    in_chunks = name in ("tiled", "replicated") or ranks == 1
    assert len(found.chunks) == (frames if in_chunks else program.crossings(len(program), shape))
    assert list(found.chunks) == sorted(found.chunks)
    # What is sent is what the plan says, in bytes and in messages.
    assert found.sent_messages == tuple(share.sent_messages for share in plan.shares)
    if name != "tiled":  # whose bytes are spread over the chunks, and rounded
        assert found.sent_bytes == tuple(share.sent_bytes for share in plan.shares)
    # The root computes and waits, and nothing else.
    assert found.busy_s[0] + found.waiting_s[0] == pytest.approx(found.seconds)
    # Somebody computes or is on the way at any time; nobody does two things at once.
    on_the_way = sum(found.sent_bytes) / link.bytes_per_s + sum(found.sent_messages) * link.latency_s
    assert found.seconds <= (sum(found.busy_s) + on_the_way) * (1 + 1e-9)
    if name != "replicated":
        assert found.seconds >= max(found.busy_s) * (1 - 1e-9)
    faster = simulate(program, shape, plan, costs, FREE, overlaps=overlaps)
    assert faster.seconds <= found.seconds * (1 + 1e-9)
    assert faster.busy_s == pytest.approx(found.busy_s)


@pytest.mark.parametrize(("rows", "ranks"), [(11, 4), (5, 3), (45, 4), (45, 8)])
@pytest.mark.parametrize("groups", [1, 2])
def test_where_slabs_are_dealt_anew_what_is_sent_is_as_planned(groups: int, rows: int, ranks: int) -> None:
    shape = LatentShape(1, 3, rows, 10)
    plan = PipelineOfShards(groups).plan(PORTIONED, shape, groups * ranks)
    # A chunk is dealt whole where it is seen in portions from there on.
    assert any(deal.start == PORTIONED.portions_from for deal in plan.shares[1].deals)
    found = simulate(PORTIONED, shape, plan, Given(PORTIONED, [1.0] * len(PORTIONED), rows=rows), ONE_SECOND)
    assert found.sent_messages == tuple(share.sent_messages for share in plan.shares)
    assert found.sent_bytes == tuple(share.sent_bytes for share in plan.shares)


@settings(deadline=None, max_examples=30)
@given(
    program=PROGRAMS,
    name=st.sampled_from(sorted(STRATEGIES)),
    ranks=st.integers(2, 6),
    whole=SECONDS,
    link=LINKS,
    more=st.floats(0, 0.5),
    overlaps=st.booleans(),
)
def test_more_latency_is_never_faster(
    program: Program, name: str, ranks: int, whole: list[float], link: Link, more: float, overlaps: bool
) -> None:
    plan = STRATEGIES[name](ranks).plan(program, SHAPE, ranks)
    costs = Given(program, whole)
    seconds = [
        simulate(program, SHAPE, plan, costs, each, overlaps=overlaps).seconds
        for each in (link, replace(link, latency_s=link.latency_s + more))
    ]
    assert seconds[1] >= seconds[0] * (1 - 1e-9)


@settings(deadline=None, max_examples=30)
@given(program=PROGRAMS, whole=SECONDS, link=LINKS, frames=st.integers(1, 5))
def test_one_rank_takes_the_sum_of_its_ops(program: Program, whole: list[float], link: Link, frames: int) -> None:
    shape, costs = replace(SHAPE, frames=frames), Given(program, whole)
    for strategy in (Replicated(), LayerPipeline(), SpatialShard()):
        found = simulate(program, shape, strategy.plan(program, shape, 1), costs, link)
        assert found.seconds == pytest.approx(costs.clip_seconds(shape)) == pytest.approx(frames * sum(whole))


@dataclass
class CutAt(LayerPipeline):
    """A line of two, cut before op `cut`."""

    cut: int = 1

    def runs(self, program: Program, shape: LatentShape, ranks: int) -> tuple[Run, ...]:
        return Run((self.cut, len(program))), Run((0, self.cut))


@pytest.mark.parametrize("pixels", [8, 36, 480])
@pytest.mark.parametrize("width", [24, 64, 160, 256])
def test_a_line_of_two_is_cut_where_it_ends_earliest(width: int, pixels: int) -> None:
    program = decoder_program(vae_config(WAN22, base_dim=width, decoder_base_dim=width, num_res_blocks=2))
    shape = LatentShape(1, 32, 1, pixels)
    chosen = LayerPipeline().plan(program, shape, 2)
    expected = op_costs(program, LayerPipeline().flops_per_element, pixels)
    costs = Given(program, expected.later, first=expected.first, rows=1)
    seconds = [
        simulate(program, shape, plan, costs, FREE).seconds
        for plan in [chosen, *(CutAt(cut=cut).plan(program, shape, 2) for cut in range(1, len(program)))]
    ]
    assert seconds[0] <= 1.002 * min(seconds[1:])  # it may give up a little to send less


@settings(deadline=None, max_examples=30)
@given(program=PROGRAMS, first=SECONDS, later=SECONDS, ranks=st.integers(1, 6), frames=st.integers(1, 40))
def test_the_best_that_a_plan_promises_is_what_a_line_without_journeys_takes(
    program: Program, first: list[float], later: list[float], ranks: int, frames: int
) -> None:
    shape = replace(SHAPE, frames=frames)
    plan, costs = LayerPipeline().plan(program, shape, ranks), ChunkCosts(tuple(first), tuple(later))
    promised = LineTimes(program, costs).of_clip(frames) / speed_up(program, costs, plan.shares, frames)
    found = simulate(program, shape, plan, Given(program, later, first=first), FREE).seconds
    assert found == pytest.approx(promised)


@settings(deadline=None, max_examples=30)
@given(program=PROGRAMS, ranks=st.integers(1, 6), frames=st.integers(1, 20))
def test_the_flops_until_the_end_are_those_of_the_slowest_rank_and_what_it_waits_for(
    program: Program, ranks: int, frames: int
) -> None:
    shape = replace(SHAPE, frames=frames)
    first, later = ([float(op.flops(shape, first=first)) for op in program.ops] for first in (True, False))
    plan = LayerPipeline().plan(program, shape, ranks)
    found = simulate(program, shape, plan, Given(program, later, first=first), FREE).seconds
    assert flops_until_end(program, shape, plan.shares) == pytest.approx(found)
    # Where all ranks have the same ops, none waits for another.
    for strategy in (SpatialShard(), Replicated()):
        shares = strategy.plan(program, shape, ranks).shares
        assert flops_until_end(program, shape, shares) == pytest.approx(max(share.flops for share in shares))


@settings(deadline=None, max_examples=30)
@given(program=PROGRAMS, whole=SECONDS, link=LINKS, ranks=st.integers(1, 8))
def test_work_is_conserved(program: Program, whole: list[float], link: Link, ranks: int) -> None:
    costs = Given(program, whole)
    line = LayerPipeline().plan(program, SHAPE, ranks)
    assert sum(simulate(program, SHAPE, line, costs, link).busy_s) == pytest.approx(costs.clip_seconds(SHAPE))
    # In slabs too, but the keys and values of attention, which every rank computes for the whole frame.
    attention = sum(
        3 * seconds for seconds, op in zip(whole, program.ops, strict=True) if isinstance(op, Attention)
    )
    slabs = SpatialShard().plan(program, SHAPE, ranks)
    busy = simulate(program, SHAPE, slabs, costs, link).busy_s
    assert sum(busy) == pytest.approx(costs.clip_seconds(SHAPE) + (attention_of(ranks) - 1) * attention)


@settings(deadline=None, max_examples=30)
@given(whole=SECONDS, ranks=st.integers(1, 6), frames=st.integers(1, 6))
def test_a_line_is_not_faster_than_its_first_chunk_and_its_slowest_stage(
    whole: list[float], ranks: int, frames: int
) -> None:
    shape = replace(SHAPE, frames=frames)
    plan = LayerPipeline(moving_cuts=False).plan(DECODER, shape, ranks)
    stages = [sum(whole[slice(*share.ops)]) for share in plan.shares]
    # Without messages, and with chunks alike, a line takes exactly the first chunk and the slowest stage's others.
    found = simulate(DECODER, shape, plan, Given(DECODER, whole), FREE)
    assert found.seconds == pytest.approx(sum(stages) + (frames - 1) * max(stages))
    # In portions it takes no longer, and no stage is done faster.
    portioned = simulate(PORTIONED, shape, plan, Given(PORTIONED, whole), FREE)
    assert frames * max(stages) * (1 - 1e-9) <= portioned.seconds <= found.seconds * (1 + 1e-9)


assert len(DECODER) == 64  # the op numbers below
REFUSED = {
    "parts of the work on the whole picture": (
        plan_of(share(0, (0, 64), flops=1, sent_messages=3), share(1, (0, 64), flops=1)),
        "ranks 0 and 1 the same rows and columns of ops 0-63",
    ),
    "rows that nobody has": (plan_of(share(0, (0, 64), (0, 5)), share(1, (0, 64), (6, 12))), "to nobody"),
    "ops that nobody has": (plan_of(share(0, (9, 64)), share(1, (0, 8))), "the runs of ops 0-7, 9-63 of 64"),
    "no last op": (plan_of(share(0, (9, 60)), share(1, (0, 9))), "the runs of ops 0-8, 9-59 of 64"),
    "the root not at the end": (plan_of(share(0, (0, 9)), share(1, (9, 64))), "rank 0 the ops 0-8"),
    "tiles that are not sent with each chunk": (
        plan_of(share(0, (0, 64)), share(1, (0, 64), sent_messages=2), exactness=Exactness.APPROXIMATE),
        "rank 1 send 2 messages in 3 chunks",
    ),
}


@pytest.mark.parametrize(("plan", "what"), REFUSED.values(), ids=REFUSED)
def test_shares_that_do_not_tell_are_refused(plan: StrategyPlan, what: str) -> None:
    with pytest.raises(SimulationError) as refused:
        simulate(DECODER, SHAPE, plan, even(), FREE)
    message = str(refused.value)
    assert message.startswith("the shares of mine ") and what in message
    assert "nobody can tell which rank waits for which; measure it with job=bench" in message


def test_encoding_is_refused() -> None:
    program = encoder_program(vae_config(WAN22))
    plan = Replicated().plan(program, SHAPE, 1)
    with pytest.raises(SimulationError, match=r"a plan to encode; .*; give a plan to decode"):
        simulate(program, SHAPE, plan, Given(program, [1.0] * len(program)), FREE)


def test_the_docs_show_what_the_command_prints_without_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['simulate.py'];"
        "runpy.run_path('benchmarks/simulate.py', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() and printed.stdout.strip() in (ROOT / "docs" / "simulation.md").read_text()
