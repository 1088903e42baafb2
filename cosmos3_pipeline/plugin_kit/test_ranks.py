"""Tests of a strategy on real ranks: compared with `replicated` and with its own plan."""

from __future__ import annotations

import pytest

from cosmos3_pipeline.plugin_kit.cases import CASES, CLIP, DIRECTIONS, Case, honours, refuses
from cosmos3_pipeline.plugin_kit.faults import Outcome, break_one_rank, leave_early, refuse
from cosmos3_pipeline.plugin_kit.observe import Call, Observed, Seen
from cosmos3_pipeline.plugin_kit.ranks import run_on_ranks
from cosmos3_pipeline.plugin_kit.subject import Subject
from cosmos3_pipeline.plugin_kit.test_plan import assert_three_parts
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Exactness, Strategy

# Peak of live bytes relative to the plan: upper and lower limit.
MOST_ALIVE, LEAST_ALIVE = 1.1, 0.75
# Small tensors are not planned; they may take this many bytes.
SMALL_BYTES = 8 << 10


def calls_of(observed: Observed, case: Case, ranks: int, *names: str) -> list[list[Call]]:
    """For each of the calls `names` that exist, the observations of every rank. Fails if any call raised."""
    seen = seen_by(observed, case, ranks)
    for rank, one in enumerate(seen):
        for name, call in one.calls.items():
            assert call.error is None, f"{name} on rank {rank} of {ranks} raised:\n{call.error}"
    tried = [name for name in names if name in seen[0].calls]
    if not tried:
        pytest.skip("the strategy does not declare it, or the clip is not for it")
    return [[rank.calls[name] for rank in seen] for name in tried]


def seen_by(observed: Observed, case: Case, ranks: int) -> list[Seen]:
    seen = observed(case, ranks)
    if seen is None:
        pytest.skip(f"the strategy refuses {case.name} on {ranks} ranks")
    return seen


@pytest.mark.parametrize("name", ["decode", "encode"])
def test_the_result_is_as_exact_as_declared(
    name: Direction, case: Case, ranks: int, strategy: Strategy, observed: Observed
) -> None:
    for calls in calls_of(observed, case, ranks, *((name, "again") if name == "decode" else (name,))):
        # The plan of a clip may promise more than the class does.
        promised = strategy.plan(case.program(name), case.shape, ranks).exactness
        for rank, call in enumerate(calls):
            assert call.reached is not None and call.reached.satisfies(promised), (
                f"rank {rank} of {ranks}: declared {promised}, reached {call.reached or 'nothing'}: "
                f"{call.psnr:.1f} dB, at most {call.max_abs:.3g} off, shape {call.shapes}"
            )
        assert len({call.digest for call in calls}) == 1, "the ranks have different results"


def test_the_stream_has_the_decoded_frames_in_order_on_the_root_alone(
    case: Case, ranks: int, strategy: Strategy, observed: Observed
) -> None:
    ((root, *others),) = calls_of(observed, case, ranks, "stream")
    for rank, call in enumerate(others, 1):
        assert call.shapes == [], f"rank {rank} yields frames too"
    program = case.program("decode")
    size = (case.rows * program.spatial, case.cols * program.spatial, 3)
    assert {shape[1:] for shape in root.shapes} == {size}
    frames = [shape[0] for shape in root.shapes]
    assert sum(frames) == program.picture_frames(case.frames)
    if case.chunks() > 2:
        assert max(frames) < sum(frames), "the clip comes in one piece: memory grows with its length"
    most = 0 if strategy.exactness == Exactness.BITWISE else 1
    assert root.psnr and root.max_abs <= most, f"frames differ from decode()'s by up to {root.max_abs} levels"


@pytest.mark.parametrize("name", ["stream", "encode"])
def test_it_sends_what_it_planned(name: str, case: Case, ranks: int, observed: Observed) -> None:
    (calls,) = calls_of(observed, case, ranks, name)
    counted = {rank: call.counted for rank, call in enumerate(calls)}
    assert counted == {rank: call.planned for rank, call in enumerate(calls)}, "(bytes, messages) sent and planned"


@pytest.mark.parametrize("name", ["decode", "encode"])
def test_every_message_is_received(name: str, case: Case, several: int, observed: Observed) -> None:
    for calls in calls_of(observed, case, several, *((name, "stream") if name == "decode" else (name,))):
        wire = {kind: [call.wire.get(kind, (0, 0)) for call in calls] for kind in ("send", "recv")}
        sent, received = (tuple(map(sum, zip(*counts, strict=True))) for counts in wire.values())
        assert sent == received, "(bytes, messages) sent and received between all ranks"


@pytest.mark.parametrize("name", ["decode", "encode"])
def test_collectives_are_called_alike_on_every_rank(
    name: str, case: Case, several: int, observed: Observed
) -> None:
    for calls in calls_of(observed, case, several, *((name, "stream") if name == "decode" else (name,))):
        for rank, call in enumerate(calls[1:], 1):
            assert call.collectives == calls[0].collectives, f"rank {rank} and rank 0 call other collectives"


def test_it_reads_the_weights_that_it_planned(case: Case, ranks: int, observed: Observed) -> None:
    for rank, seen in enumerate(seen_by(observed, case, ranks)):
        for direction, (taken, planned) in seen.weights.items():
            assert taken == planned, f"{direction} on rank {rank}: bytes of weights taken and planned"


@pytest.mark.parametrize("name", ["alive in decode", "alive in encode"])
def test_it_holds_as_much_as_it_planned(name: str, ranks: int, observed: Observed) -> None:
    (calls,) = calls_of(observed, CLIP, ranks, name)
    for rank, call in enumerate(calls):
        alive, planned = call.counted[0], call.planned[0]
        assert alive <= MOST_ALIVE * planned + SMALL_BYTES, f"rank {rank}: {alive} bytes alive, {planned} planned"
        assert alive >= LEAST_ALIVE * planned - SMALL_BYTES, f"rank {rank}: {alive} bytes alive, {planned} planned"


def largest(strategy: Strategy, most: int) -> int:
    """The largest number of ranks, up to three, on which the strategy accepts the kit's clip."""
    found = [ranks for ranks in range(2, min(most, 3) + 1) if honours(strategy, CLIP, ranks)]
    if not found:
        pytest.skip("the strategy takes the clip on one rank only")
    return found[-1]


def assert_over(outcomes: list[Outcome], broken: int) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank == broken:
            assert outcome.error == "InjectedFault", f"rank {rank} hides its own error: {outcome}"
        else:
            assert outcome.error == "PeerFailed", f"rank {rank} went on without rank {broken}: {outcome}"


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("broken", [0, -1], ids=["the root", "the last rank"])
def test_a_rank_that_raises_stops_all_and_the_next_call_is_right(
    direction: Direction, broken: int, subject: Subject, strategy: Strategy, request: pytest.FixtureRequest
) -> None:
    if direction not in strategy.directions:
        pytest.skip(f"the strategy does not {direction}")
    ranks = largest(strategy, request.config.getoption("--max-ranks"))
    broken %= ranks
    outcomes = run_on_ranks(break_one_rank, ranks, subject, CLIP, direction, broken)
    assert outcomes[broken].injected, f"rank {broken} runs no slice of the program"
    assert_over(outcomes, broken)
    assert all(outcome.recovered for outcome in outcomes), "the call after the failed one is wrong"


def test_a_stream_that_is_closed_early_ends_on_every_rank(
    subject: Subject, strategy: Strategy, request: pytest.FixtureRequest
) -> None:
    if "decode" not in strategy.directions:
        pytest.skip("the strategy does not decode")
    ranks = largest(strategy, request.config.getoption("--max-ranks"))
    results = run_on_ranks(leave_early, ranks, subject, CLIP)
    assert [seen for seen, _ in results] == [1] + [0] * (ranks - 1)
    for rank, (_, outcome) in enumerate(results):
        assert outcome.error == "", f"rank {rank}: {outcome}"
        assert outcome.recovered, "the decode after it is wrong"


def test_what_the_plan_refuses_is_refused_on_every_rank_before_weights_are_read(
    subject: Subject, strategy: Strategy, request: pytest.FixtureRequest
) -> None:
    refused = [
        (case, ranks, direction)
        for case in CASES
        for ranks in range(2, request.config.getoption("--max-ranks") + 1)
        for direction in DIRECTIONS
        if direction in strategy.directions
        and case.dtype == "float32"
        and refuses(strategy, case, ranks, direction)
    ]
    if not refused:
        pytest.skip("the strategy refuses none of the kit's clips")
    case, ranks, direction = refused[0]
    for outcome in run_on_ranks(refuse, ranks, subject, case, direction):
        assert outcome.error == "StrategyError", outcome
        assert outcome.problem is not None
        assert_three_parts(outcome.problem)
