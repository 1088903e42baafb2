"""What `job=bench` measures with: the roofline, live bytes, weights read, rounds, and the seconds of ops."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_runs import toy_dimensions
from vae_models import WAN21, WAN22

from cosmos3_pipeline import compose
from cosmos3_pipeline.jobs.bench import contestants, roofline
from cosmos3_pipeline.jobs.bench import costs as bench_costs
from cosmos3_pipeline.jobs.bench import rank as bench_rank
from cosmos3_pipeline.jobs.bench import trial as bench_trial
from cosmos3_pipeline.jobs.bench.conditioning import by_diffusers, by_stage
from cosmos3_pipeline.jobs.bench.contestants import Contestant, Factory, Unavailable
from cosmos3_pipeline.jobs.bench.costs import CHUNKS, OpSeconds, TimedOp
from cosmos3_pipeline.jobs.bench.given import Given, given_for
from cosmos3_pipeline.jobs.bench.machine import pinned
from cosmos3_pipeline.jobs.bench.messages import Halos
from cosmos3_pipeline.jobs.bench.rank import Bench
from cosmos3_pipeline.jobs.bench.roofline import ConvShape, Roofline, convolutions, shapes_of, ways
from cosmos3_pipeline.jobs.bench.suite import Case
from cosmos3_pipeline.jobs.bench.trial import Trial
from cosmos3_pipeline.jobs.bench.weights import Autoencoders, CountedWeights
from cosmos3_pipeline.jobs.bench.world import World
from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes
from cosmos3_pipeline.vae import ops
from cosmos3_pipeline.vae.executor import Slice
from cosmos3_pipeline.vae.ops import LatentShape, Margins
from cosmos3_pipeline.vae.program import program_for

CPU = torch.device("cpu")
LATENT = LatentShape(1, 3, 3, 4)
TINY = {**toy_dimensions()["vae"], "base_dim": 4, "decoder_base_dim": 4}


@pytest.fixture(scope="module")
def autoencoders() -> Autoencoders:
    return Autoencoders(TINY, CPU)


@pytest.fixture
def world() -> World:
    return World.join(CPU)


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan21", "wan22"])
def test_the_roofline_does_the_arithmetic_of_the_program(config: dict[str, Any], direction: Any) -> None:
    program = program_for(direction, config)
    for op in program.ops:
        if isinstance(op, ops.Attention):
            continue  # a thousandth of the arithmetic, and no convolution
        for first in (True, False):
            found = sum(shape.flops for shape in convolutions(op, LATENT, first=first))
            assert found == op.flops(LATENT, first=first), op.name
    attention = sum(
        op.flops(LATENT, first=True) + (program.chunks(LATENT) - 1) * op.flops(LATENT, first=False)
        for op in program.ops
        if isinstance(op, ops.Attention)
    )
    whole = sum(count * shape.flops for shape, count in shapes_of(program, LATENT).items())
    assert whole == program.flops(LATENT) - attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        ConvShape((1, 3, 5, 6, 8), 4, (3, 3, 3), (1, 1)),
        ConvShape((1, 2, 5, 7, 8), 4, (1, 3, 3), stride=(1, 2, 2)),
        ConvShape((1, 3, 4, 4, 8), 16, (3, 1, 1), stride=(2, 1, 1)),
    ],
    ids=["causal", "down", "time_down"],
)
def test_every_way_is_that_convolution(
    shape: ConvShape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []

    def remembered(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(torch.rand(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(roofline.torch, "randn", remembered)
    found = ways(shape, dtype, CPU)
    x, weight, bias = (t.to(dtype).float() for t in drawn)
    expected = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, shape.stride, (0, *shape.padding))
    assert len(found) == (2 if shape.kernel[0] == 1 else 1)
    for way in found:
        got = way().float()
        got = got if got.ndim == 5 else got.unflatten(0, (1, -1)).transpose(1, 2)
        assert torch.allclose(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    outputs = expected.numel() * weight[0].numel()
    assert shape.flops == 2 * outputs


def test_the_roofline_keeps_the_best_time_of_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_for("decode", TINY)
    line = Roofline(program, LatentShape(1, 2, 1, 1), torch.float32, CPU)
    seconds = iter(range(1, 10**6))
    monkeypatch.setattr(line, "_seconds", lambda way: float(next(seconds)))
    line.measure()
    best = line.seconds
    ways_of = {shape: len(line._ways[shape]) for shape in line.counts}
    expected, at = 0.0, 1
    for shape, count in line.counts.items():
        expected += count * at  # its first run was its fastest, as this clock goes
        at += roofline.RUNS * ways_of[shape]
    assert best == expected
    line.measure()  # every run of the second round is slower
    assert line.seconds == best
    monkeypatch.setattr(line, "_seconds", lambda way: 0.5)
    line.measure()
    assert line.seconds == 0.5 * sum(line.counts.values())


def test_live_bytes_are_those_of_tensors_that_are_there_at_once() -> None:
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        a = known + 1
        assert live.now == a.nbytes
        b = a[10:].view(-1, 2)  # a view is nobody's memory
        assert live.now == a.nbytes
        del a, b
        c = known[:500] * 2
        assert (live.now, live.peak) == (c.nbytes, known.nbytes)


def test_a_view_shares_weights_but_not_settings(autoencoders: Autoencoders) -> None:
    model, view = autoencoders.model(torch.float32), autoencoders.view(torch.float32)
    view.enable_tiling()
    assert not model.use_tiling
    ours, theirs = model.state_dict(), view.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    half = autoencoders.model(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and autoencoders.model(torch.bfloat16) is half
    autoencoders.keep_only(torch.float32)
    assert autoencoders.model(torch.bfloat16) is not half
    assert autoencoders.model(torch.float32) is model


def test_weights_that_are_read_are_counted(autoencoders: Autoencoders) -> None:
    weights = CountedWeights(autoencoders.model(torch.float32))
    program = program_for("decode", TINY)
    weights.load([w.name for w in program.weights(3, 9)], dtype=torch.float32, device=CPU)
    assert weights.nbytes == 4 * program.weight_elements(3, 9) > 0


def case(call: str, *contestants: str, frames: int = 2, dtype: str = "float32") -> Case:
    size = 4 if dtype == "float32" else 2
    return Case("mine", call, LatentShape(1, frames, 2, 3, size), dtype, True, None, contestants, ())


@pytest.mark.parametrize("call", ["decode", "encode"])
def test_what_is_given_is_the_same_every_time_and_short_to_warm_up(call: str, tmp_path: Path) -> None:
    program = program_for("decode" if call == "decode" else "encode", TINY)
    long = case(call, frames=9, dtype="bfloat16")
    given, again = (given_for(long, program, tmp_path, CPU) for _ in range(2))
    assert torch.equal(given.tensor, again.tensor) and given.tensor.dtype == torch.bfloat16
    assert given.tensor.shape[2] == (9 if call == "decode" else 33)
    short = given.short().tensor
    assert short.shape[2] == (3 if call == "decode" else 9)
    assert torch.equal(short, given.tensor[:, :, : short.shape[2]])


def test_the_condition_of_both_is_the_same(autoencoders: Autoencoders, tmp_path: Path) -> None:
    model = autoencoders.model(torch.float32)
    given = given_for(case("condition", frames=3), program_for("encode", TINY), tmp_path, CPU)
    assert tuple(given.tensor.shape) == (1, 3, 9, 32, 48) and given.tensor.is_meta
    seen: list[int] = []

    class Listening(type(model)):  # type: ignore[misc]
        def encode(self, x: Tensor, return_dict: bool = True) -> Any:
            seen.append(x.shape[2])
            return super().encode(x, return_dict)

    listening = autoencoders.view(torch.float32)
    listening.__class__ = Listening
    theirs, ours = by_diffusers(listening, given), by_stage(listening, given)
    assert theirs.shape == (1, 48, 1, 2, 3) and theirs.std() > 0.01
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert seen == [9, 2]


class StubFactory(Factory):
    """Makes contestants of functions."""

    def __init__(self, runs: dict[str, Callable[[Given], Tensor | None]], autoencoders: Autoencoders) -> None:
        super().__init__(case("decode", *runs), {}, TINY, autoencoders, World.join(CPU))
        self.runs = runs

    def make(self, name: str) -> Contestant:
        if name == "distvae":
            raise Unavailable("it is not there")
        return Contestant(name, self.runs[name], everywhere=True, known=[])


def trial(autoencoders: Autoencoders, **runs: Callable[[Given], Tensor | None]) -> Trial:
    factory = StubFactory(runs, autoencoders)
    return Trial(factory.case, factory, Given(torch.zeros(1, 48, 2, 2, 3), 1, Path()))


@pytest.mark.parametrize(("timed", "chunks"), [(True, 5), (False, 3)])
def test_what_is_timed_is_warmed_up_by_all_of_it(timed: bool, chunks: int, autoencoders: Autoencoders) -> None:
    seen: list[int] = []
    factory = StubFactory({"one_rank": lambda given: seen.append(given.tensor.shape[2])}, autoencoders)
    Trial(replace(factory.case, timed=timed), factory, Given(torch.zeros(1, 48, 5, 2, 3), 1, Path()))
    assert seen == [chunks]


def test_rounds_rotate_and_the_result_is_held_against_diffusers(autoencoders: Autoencoders) -> None:
    order: list[str] = []

    def named(name: str, off: float) -> Callable[[Given], Tensor]:
        def run(given: Given) -> Tensor:
            order.append(name)
            return given.tensor + off

        return run

    made = trial(
        autoencoders, diffusers=named("a", 0), one_rank=named("b", 0.25), tiled=named("c", 0), distvae=None
    )  # type: ignore[arg-type]
    assert "".join(order) == "abc" and made.absent == 1
    steps: list[int] = []
    made.rounds(4, 0, lambda: steps.append(1))
    assert "".join(order[3:]) == "abc" + "acb" + "cab" + "cba" and len(steps) == 12
    made.once_more(lambda: None)
    report = made.report()
    assert {name: row["max_abs"] for name, row in report["contestants"].items()} == {
        **{"diffusers": 0.0, "one_rank": 0.25, "tiled": 0.0}
    }
    assert report["absent"] == {"distvae": "it is not there"}
    tensor = 48 * 2 * 2 * 3 * 4
    for row in report["contestants"].values():
        assert len(row["seconds"]) == 4 and min(row["seconds"]) > 0
        assert row["peak_bytes"] == [tensor]


@pytest.mark.parametrize(
    ("least", "seconds", "runs"), [(3, 0.0, 3), (3, 8.5, 9), (3, 500.0, 12), (1, 500.0, 4), (1, 0.0, 1)]
)
def test_short_rounds_are_more_rounds(
    least: int, seconds: float, runs: int, autoencoders: Autoencoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going by the first round, which takes a second; the progress bar has the fewest rounds."""
    clock = itertools.count()
    made = trial(autoencoders, diffusers=lambda given: given.tensor, one_rank=lambda given: given.tensor)
    monkeypatch.setattr(bench_trial, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(World, "timed", lambda world, work: (work(), 0.5, 0.5))
    steps: list[int] = []
    made.rounds(least, seconds, lambda: steps.append(1))
    assert len(steps) == 2 * least
    assert [len(row.seconds) for row in made._measured.values()] == [runs, runs]


def test_a_peer_that_cannot_is_absent_and_ours_that_cannot_ends_the_run(autoencoders: Autoencoders) -> None:
    def fails(given: Given) -> Tensor:
        raise ValueError("no such shape")

    assert trial(autoencoders, diffusers_tiled=fails).report()["absent"] == {
        "diffusers_tiled": "ValueError: no such shape"
    }
    with pytest.raises(ValueError, match="no such shape"):
        trial(autoencoders, one_rank=fails)


def test_without_instructions_for_bfloat16_a_peer_that_takes_minutes_is_left_out(
    autoencoders: Autoencoders, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (contestants, roofline):
        monkeypatch.setattr(module, "arithmetic_dtype", lambda dtype, device: torch.float32)
    half = case("decode", "diffusers", dtype="bfloat16")
    factory = Factory(half, {}, TINY, autoencoders, world)
    assert factory.make("diffusers").name == "diffusers"  # it is small
    monkeypatch.setattr(contestants, "MOST_PLAIN_SECONDS", 0)
    with pytest.raises(Unavailable, match="no instructions for bfloat16"):
        factory.make("diffusers")
    assert Factory(case("decode"), {}, TINY, autoencoders, world).make("diffusers").name == "diffusers"
    line = factory.make("roofline")
    assert line.roofline is not None
    line.roofline.measure()
    assert line.roofline.note.endswith("in float32 as this processor has no bfloat16")


def test_the_seconds_of_every_op_on_all_rows_and_on_half(autoencoders: Autoencoders, world: World) -> None:
    with torch.no_grad():
        seconds = OpSeconds(TINY, autoencoders, world, LatentShape(1, 1, 3, 2))
        seconds.take(1)
        seconds.take(1)
        costs = seconds.costs()
    found = costs["ops"]
    names = [op.name for op in program_for("decode", TINY).ops]
    assert CHUNKS > 2
    assert [(op["name"], op["rows"]) for op in found] == [(name, rows) for rows in (3, 2) for name in names]
    assert all(op["first_s"] > 0 and op["later_s"] > 0 for op in found)
    assert costs["message"] is None  # one rank has nobody to send to


@pytest.mark.parametrize(("frames", "clips"), [(1, [CHUNKS, CHUNKS, 1, 1]), (3, [CHUNKS, CHUNKS])])
def test_the_first_chunk_of_a_case_of_images_is_an_image(
    frames: int, clips: list[int], autoencoders: Autoencoders, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def run(part: Slice, z: Tensor) -> None:
        """As if an op took one second a frame on the first chunk, and two on each later one."""
        decoded.append(z.shape[2])
        for op in part._ops:
            if isinstance(op, TimedOp):
                op.first.append(z.shape[2])
                op._later.extend([2 / op._portions] * op._portions * (z.shape[2] - 1))

    monkeypatch.setattr(bench_costs, "_run", run)
    seconds = OpSeconds(TINY, autoencoders, world, LatentShape(1, frames, 2, 2))
    seconds.take(2)
    assert decoded == [CHUNKS, *clips, *clips, CHUNKS, *clips]  # all rows, the root alone, and half of the rows
    costs = seconds.costs()
    for op in (*costs["ops"], *costs["alone"]):
        assert (op["first_s"], op["later_s"]) == (clips[-1], 2), op["name"]


class Posted:
    """A `Comm` of rank 2k or 2k + 1 whose neighbour's halo is all sevens."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.sent: list[tuple[Tensor, int]] = []

    def exchange(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> Posted:
        self.sent += [(tensor.clone(), peer) for tensor, peer in sends]
        for tensor, _ in receives:
            tensor.fill_(7.0)
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_halos_whose_messages_are_timed_are_those_of_two_slabs(rank: int) -> None:
    comm, margins = Posted(rank), Margins(top=1, bottom=2)
    halos = Halos(comm)  # type: ignore[arg-type]
    padded = torch.arange(7.0).view(1, 1, 7, 1, 1).clone()  # of which 1 to 4 are the slab's own
    assert halos.coming(margins) == (Margins(top=1) if rank else Margins(bottom=2))
    halos.start(padded, margins)()
    ((sent, peer),) = comm.sent
    # The upper slab has two rows below it, which the lower one gives; the lower has one above it.
    assert peer == 1 - rank and sent.flatten().tolist() == ([1.0, 2.0] if rank else [4.0])
    assert padded.flatten().tolist() == ([7.0, 1, 2, 3, 4, 5, 6] if rank else [0.0, 1, 2, 3, 4, 7, 7])
    assert len(halos.seconds) == 1 and halos.seconds[0] > 0
    assert halos.nbytes == ([4] if rank else [8])


def test_of_a_halo_each_message_takes_half_and_the_rank_that_waits_counts_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ran(Halos):
        def start(self, padded: Tensor, margins: Margins) -> Callable[[], None]:
            self.seconds.append(6.0 if ran else 100.0)  # not what the first run takes, which is a warm-up
            self.nbytes.append(80)
            return lambda: None

    class Three:
        rank, size = 0, 3

        def run(self) -> Any:
            return nullcontext()

        def agree(self, value: Any) -> list[Any]:
            return [value, (9.0, 80.0), []]  # the last has no neighbour

    def run(part: Any, z: Any, halos: Halos) -> None:
        halos.start(z, Margins(1, 1))
        ran.append(halos)

    ran: list[Halos] = []
    monkeypatch.setattr(bench_costs, "Halos", Ran)
    monkeypatch.setattr(bench_costs, "_run", run)
    world = SimpleNamespace(comm=Three())
    assert bench_costs._message(None, torch.zeros(1), world) == (3.0, 80)  # type: ignore[arg-type]
    assert len(ran) == 2


def test_the_last_of_three_ranks_has_no_neighbour() -> None:
    comm = Posted(2)
    comm.size = 3
    halos = Halos(comm)  # type: ignore[arg-type]
    halos.start(torch.zeros(1, 1, 5, 1, 1), Margins(1, 1, 0, 0))()
    assert not halos.coming(Margins(1, 1, 0, 0)) and not comm.sent and not halos.seconds


def test_nothing_of_a_case_is_held_while_its_ops_are_timed(
    autoencoders: Autoencoders, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At full width what the contestants hold is gigabytes, and timing the ops takes as much again."""
    held: list[weakref.ref[Any]] = []

    class Watched(Factory):
        def make(self, name: str) -> Contestant:
            contestant = super().make(name)
            held.extend(weakref.ref(one) for one in (self, contestant, contestant.weights))
            return contestant

    asked = []

    def timing(self: OpSeconds, rounds: int) -> None:
        assert all(one() is None for one in held)
        asked.append((rounds, len(held)))
        take(self, rounds)

    take = OpSeconds.take

    monkeypatch.setattr(bench_rank, "Factory", Watched)
    monkeypatch.setattr(OpSeconds, "take", timing)
    plain = {"bench": {"rounds": 3, "seconds": 0, "costs": True}, "vae": {"decode": {"_target_": "another"}}}
    bench = Bench(plain, TINY, world, autoencoders, lambda steps=1: None, tmp_path)
    with torch.no_grad():
        bench.run(case("decode", "one_rank", "layer_pipeline"))
    assert asked == [(2, 0), (2, 6)]
    assert {op["rows"] for op in bench.costs["mine"]["ops"]} == {2, 1}


def test_what_was_measured_is_kept_when_a_later_case_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ("bench.rows=2", "bench.cols=2", "bench.rounds=1", "bench.seconds=0", "bench.costs=false")
    config = compose(["job=bench", "bench.cases=[image_decode,image_encode]", *size])
    run = Bench.run

    def failing(self: Bench, one: Case) -> dict[str, Any]:
        if one.name == "image_encode":
            raise RuntimeError("no more memory")
        return run(self, one)

    monkeypatch.setattr(Bench, "run", failing)
    with pytest.raises(RuntimeError, match="no more memory"):
        bench_rank.bench_rank(config, TINY, str(tmp_path))
    left = json.loads((tmp_path / "bench.json").read_text())
    assert list(left["cases"]) == ["image_decode"] and left["not_run"] == ["image_encode"]
    assert {row["case"]: row["why"] for row in left["targets"]}["image_encode"] == "image_encode has not run"
    assert min(left["cases"]["image_decode"]["contestants"]["one_rank"]["seconds"]) > 0
    assert "Not run: image_encode." in (tmp_path / "bench.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_a_rank_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {4, 5, 6, 7}, raising=False)
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: asked.append(sorted(cores)), raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pinned(2) as cores:
        assert cores == [6, 7]
    assert asked == [[6, 7], [4, 5, 6, 7]]
    asked.clear()
    with pinned(3) as cores:  # two ranks of three threads do not fit on four cores
        assert cores == []
    assert asked in ([], [[4, 5, 6, 7]])  # whatever it was, it is again
