"""`job=bench` before and after the work: cases, refusals, verdicts, tables. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.jobs.bench import check_bench
from cosmos3_pipeline.jobs.bench.judge import judge
from cosmos3_pipeline.jobs.bench.simulated import simulated
from cosmos3_pipeline.jobs.bench.suite import Case, Target, cases_of, vae_dimensions
from cosmos3_pipeline.jobs.bench.tables import case_table, markdown
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import program_for
from cosmos3_plugins.layer_pipeline import LayerPipeline


def bench(*overrides: str) -> dict[str, Any]:
    return plain(compose(["job=bench", *overrides]).bench)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_bench(compose(overrides))
    return str(caught.value)


@pytest.mark.parametrize(("topology", "width"), [("cpu_x1", "small"), ("cpu_x2", "full"), ("cpu_x2", "model")])
def test_every_case_can_be_done(topology: str, width: str) -> None:
    check_bench(compose(["job=bench", f"topology={topology}", f"bench.width={width}"]))


def test_other_jobs_carry_no_cases() -> None:
    assert compose(["job=verify"]).bench.suite == []
    check_bench(compose(["job=generate"]))


def test_what_a_user_sets_replaces_what_the_cases_say() -> None:
    asked = ("bench.cases=[decode,spatial_shard]", "bench.rows=7", "bench.frames=2", "bench.dtype=bfloat16")
    decode, shard = cases_of(bench(*asked, "bench.strategies=[tiled]"))
    assert decode.shape == LatentShape(1, 2, 7, 20, 2) == shard.shape
    assert decode.dtype == "bfloat16"
    assert shard.contestants == ("diffusers", "one_rank", "one_rank_each", "spatial_shard", "tiled")


def test_widths() -> None:
    def width(*overrides: str) -> tuple[int, int]:
        dimensions = vae_dimensions(compose(["job=bench", *overrides]))
        return dimensions["base_dim"], dimensions["decoder_base_dim"]

    assert width() == (16, 24)
    assert width("bench.width=full") == (160, 256)
    assert width("bench.width=model", "model.vae.base_dim=32", "model.vae.decoder_base_dim=40") == (32, 40)
    small, full = cases_of(bench())[0].shape, cases_of(bench("bench.width=full"))[0].shape
    assert (small.rows, small.cols) == (23, 20) != (full.rows, full.cols)


ONE_CASE = "{name: mine, call: decode, frames: 1, small: [3, 4], full: [3, 4], contestants: [diffusers, one_rank]"


def one_case(changes: str) -> str:
    """A suite of one case; what comes later in a flow mapping must be another key, so `changes` adds keys."""
    return f"bench.suite=[{ONE_CASE}{changes}}}]"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["bench.cases=[decode]"], "bench.cases=['decode'] with job=generate"),
        (["job=verify", "topology=cpu_x2", "bench.rounds=7"], "only job=bench reads it"),
        (["job=bench", "bench.cases=[decod]"], "did you mean decode?"),
        (["job=bench", "bench.cases=[]"], "job=bench without a case"),
        (["job=bench", "bench.strategies=[layer_pipelin]"], "did you mean layer_pipeline?"),
        (["job=bench", "bench.cases=[memory_64]"], "bench.cases=[memory_64, memory_3]"),
        (["job=bench", "topology.ranks_per_node=6", "bench.rows=5"], "use 5 ranks or fewer"),
        (
            ["job=bench", "topology.ranks_per_node=500", "bench.width=full", "bench.cases=[decode]"],
            "this machine has",
        ),
        (
            ["job=bench", "topology=cpu_x2", "topology.dp=2", "topology.cfg=1", "task.prompt_file=p"],
            "topology.dp=1",
        ),
        (
            ["job=bench", one_case(", targets: [{measure: sped, of: one_rank, at_least: 1}]")],
            "did you mean speed?",
        ),
        (["job=bench", one_case(", targets: [{measure: speed, of: one_rank, at_least: 1}]")], "over: diffusers"),
        (["job=bench", one_case(", targets: [{measure: own_weights, of: one_rank}]")], "nothing could miss it"),
        (
            ["job=bench", one_case(", targets: [{measure: speed, of: one_rank, over: distvae, at_least: 1}]")],
            "contestants: [diffusers, one_rank, distvae]",
        ),
    ],
    ids=lambda value: " ".join(value)[:70] if isinstance(value, list) else "",
)
def test_refusals(overrides: list[str], says: str) -> None:
    text = refusal(*overrides)
    assert says in text and "why:" in text and "works:" in text


def case(name: str, *targets: Target, ranks: int | None = None) -> Case:
    return Case(name, "decode", LatentShape(1, 3, 11, 10), "float32", True, ranks, (), targets)


def target(measure: str, over: str | None = None, **bounds: Any) -> Target:
    return Target(measure, "ours", over, **{"over_case": None, "at_least": None, "at_most": None, **bounds})


def report(ranks: int = 2, **contestants: dict[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = {"ranks": 1, "note": "", "seconds": [], "peak_bytes": [1], "max_abs": None}
    for row in contestants.values():  # a core of its own, unless the test says otherwise
        row.setdefault("clock_seconds", row.get("seconds", []))
        row.setdefault("processor_seconds", row["clock_seconds"])
    keys = (
        "planned_peak_bytes",
        "weight_bytes",
        "planned_weight_bytes",
        "sent_bytes",
        "sent_messages",
        "rms_float32",
    )
    rows = {name: {**empty, **dict.fromkeys(keys), **row} for name, row in contestants.items()}
    return {"title": "a case", "ranks": ranks, "contestants": rows, "absent": {}}


def test_a_speed_is_the_median_of_the_ratios_of_each_round() -> None:
    # The median of the ratios 1, 3, 4 is not the ratio of the medians, 2 / 1.
    measured = {"one": report(ours={"seconds": [2.0, 1.0, 0.5]}, theirs={"seconds": [2.0, 3.0, 2.0]})}
    (verdict,) = judge([case("one", target("speed", "theirs", at_least=3.0))], measured)
    assert (verdict.value, verdict.low, verdict.high, verdict.met) == (3.0, 1.0, 4.0, True)
    (verdict,) = judge([case("one", target("speed", "theirs", at_least=3.01))], measured)
    assert verdict.met is False


def test_memory_is_that_of_the_rank_with_the_most() -> None:
    measured = {
        "short": report(ours={"peak_bytes": [60, 40]}, theirs={"peak_bytes": [100]}),
        "long": report(ours={"peak_bytes": [66]}),
    }
    cases = [
        case("short", target("memory", "theirs", at_most=0.6)),
        case("long", target("memory", "ours", over_case="short", at_most=1.05)),
    ]
    assert [(v.value, v.met) for v in judge(cases, measured)] == [(0.6, True), (1.1, False)]


def test_a_plan_is_judged_by_the_rank_that_is_furthest_from_it() -> None:
    ours = {"peak_bytes": [104, 80], "planned_peak_bytes": [100, 100]}
    (verdict,) = judge(
        [case("one", target("planned_memory", at_least=0.85, at_most=1.15))], {"one": report(ours=ours)}
    )
    assert (verdict.value, verdict.met) == (0.8, False)


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    measured = {"one": report(ours={"seconds": [1.0]})}
    measured["one"]["absent"] = {"theirs": "it refuses odd rows"}
    cases = [case("one", target("speed", "theirs", at_least=1), target("distance", "ours", at_most=1), ranks=2)]
    absent, untold = judge(cases, measured)
    assert (absent.met, absent.why) == (None, "theirs: it refuses odd rows")
    assert untold.met is None and "distance" in untold.why
    (later,) = judge([case("two", target("speed", "theirs", at_least=1))], measured)
    assert (later.met, later.why) == (None, "two has not run")
    (relative,) = judge([case("one", target("memory", "ours", over_case="two", at_most=1))], measured)
    assert (relative.met, relative.why) == (None, "two has not run")
    elsewhere = judge([case("one", target("memory", "ours", at_most=2), ranks=4)], measured)[0]
    assert (elsewhere.met, elsewhere.why) == (None, "for 4 ranks, there were 2")


def test_the_tables_show_what_was_measured_and_why_something_was_not() -> None:
    ours = {"seconds": [1.0, 2.0, 1.5], "peak_bytes": [2_000_000, 3_000_000], "ranks": 2, "max_abs": 2.5e-6}
    shared = {"seconds": [2.0, 2.0, 3.0], "processor_seconds": [2.0, 1.0, 3.0]}
    one = report(ours=ours, diffusers={"seconds": [4.0, 4.0, 3.0]}, one_rank=shared)
    one["absent"] = {"distvae": "No module named 'distvae'"}
    verdicts = judge([case("one", target("speed", "diffusers", at_least=1.9))], {"one": one})
    machine = {
        **{"device": "cpu", "processor": "a processor", "reads_memory": [True, True]},
        **{"cores": 2, "threads_per_rank": 1, "instructions": "AVX2", "load_before": 0.5, "pinned_to": [[0], [1]]},
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1", "distvae": None, "matplotlib": None},
    }
    whole = {
        **{"width": "small", "vae": {"base_dim": 16, "decoder_base_dim": 24}, "ranks": 2},
        **{
            "machine": machine,
            "targets": [v.as_dict() for v in verdicts],
            "cases": {"one": one},
            "not_run": [],
            "costs": None,
            "simulated": None,
        },
    }
    text = markdown(whole)
    row = (
        "| ours | 2 | 1.500 (1.000 to 2.000) | 2.00 (2.00 to 4.00) | 2.00 (1.00 to 2.00) | 2 MB, 3 MB | 2.5e-06 |"
    )
    assert row in text
    assert "| one | ours: at least 1.9 times as fast as diffusers | 2.00 | 2.00 to 4.00 | yes |" in text
    assert "these had only a part of theirs: one_rank 50%\n" in text
    assert "- distvae was not run: No module named 'distvae'" in text
    assert (
        "of 3 interleaved rounds after one warm-up (fewer than 5: provisional); 2 ranks" in text
        and "of roofline" not in text
    )
    assert "There are no plots: matplotlib is not installed." in text
    assert "large messages read out of the sender's memory, on a processor" in text
    apart = markdown({**whole, "machine": {**machine, "reads_memory": [True, False]}})
    assert "1 thread per rank on cores of its own, some or all large messages sent through gloo" in apart
    for other in ({"ranks": 1}, {"machine": {**machine, "device": "NVIDIA H200"}}):
        assert "large messages" not in markdown({**whole, **other})
    assert "Not finished" not in text
    assert markdown({**whole, "not_run": ["two", "three"]}).startswith("**Not finished.** Not run: two, three.")


def test_ranks_that_do_not_talk_are_the_limit_that_the_table_names() -> None:
    each = {"ranks": 2, "seconds": [2.0, 2.5, 2.0]}
    one = report(one_rank={"seconds": [1.8, 2.0, 1.9]}, one_rank_each=each)
    (note,) = [line for line in case_table(one).notes if line.startswith("one_rank_each")]
    assert "2 ranks that do not talk do 1.80 times the work of one" in note
    assert not [line for line in case_table(report(one_rank=each)).notes if "do not talk" in line]


def test_the_measured_runs_are_simulated_and_so_are_more_ranks(tmp_path: Path) -> None:
    config = plain(compose(["job=bench"]))
    asked = ("bench.cases=[layer_pipeline]", "bench.strategies=[spatial_shard]", "bench.rows=12", "bench.cols=10")
    (one,) = cases_of(bench(*asked))
    dimensions = vae_dimensions(compose(["job=bench"]))
    names = [op.name for op in program_for("decode", dimensions).ops]
    ops = [
        {"name": name, "rows": rows, "first_s": rows / 12, "later_s": rows / 6}
        for rows in (12, 6)
        for name in names
    ]
    rows = {
        "one_rank": {"ranks": 1, "seconds": [len(names) * (1 + 15 * 2.0)]},
        "layer_pipeline": {"ranks": 2, "seconds": [1.0]},
    }
    measured = {
        "vae": dimensions,
        "cases": {one.name: report(**rows)},
        "costs": {
            "cases": {one.name: {"ops": ops, "message": None}},
            "link": {"latency_s": 1e-6, "bytes_per_s": 1e12},
        },
    }
    found = simulated([one], config, measured)
    assert found is not None
    alone, pipeline = found["runs"]
    assert alone["simulated_s"] == pytest.approx(alone["measured_s"]) and abs(alone["difference"]) < 1e-9
    assert pipeline["difference"] == pytest.approx(pipeline["simulated_s"] - 1)
    speed_ups = {row["strategy"]: row["speed_up"] for row in found["speed_ups"]}
    assert speed_ups["layer_pipeline"]["1"] == pytest.approx(1) == speed_ups["spatial_shard"]["1"]
    assert 1 < speed_ups["layer_pipeline"]["2"] < 2
    assert speed_ups["spatial_shard"]["8"] > 1 and speed_ups["spatial_shard"]["16"] is None  # of 12 rows
    link = measured["costs"]["link"]
    link["busy_s_per_byte"] = 1e-12
    measured["costs"]["cases"][one.name]["message"] = {"seconds": 1.1, "bytes": 1e11}  # of which 0.1 s for bytes
    slower = simulated([one], config, measured)
    assert slower is not None and slower["runs"][0]["simulated_s"] == alone["simulated_s"]
    line = LayerPipeline().plan(program_for("decode", dimensions), one.shape, 2)
    messages = line.shares[1].sent_messages
    assert slower["runs"][1]["simulated_s"] - pipeline["simulated_s"] == pytest.approx(messages, rel=0.1)
    # As it was divided: by seconds of which the last op has most, its rank has little else.
    program = program_for("decode", dimensions)
    last = program.ops[-1].name
    taken = [{"name": op.name, "first_s": 1.0, "later_s": 99.0 if op.name == last else 1.0} for op in program.ops]
    case = {"latent_rows": one.shape.rows, "latent_cols": one.shape.cols, "alone": taken}
    path = tmp_path / "op_seconds_of_it.json"
    path.write_text(json.dumps({"vae": dimensions, "costs": {"cases": {one.name: case}}}))
    divided, other = (simulated([one], config, measured, {name: str(path)}) for name in (one.name, "another"))
    assert divided is not None and other == slower
    assert divided["runs"][1]["simulated_s"] > 1.2 * slower["runs"][1]["simulated_s"]
    measured["costs"]["link"] = None
    assert simulated([one], config, measured) is None
