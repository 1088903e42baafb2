"""Lines that are divided by what ops took on a machine instead of by the model of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vae_models import WAN22, vae_config

from cosmos3_pipeline.vae.costs import op_costs
from cosmos3_pipeline.vae.measured import op_seconds
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program, decoder_program, encoder_program
from cosmos3_pipeline.vae.strategy import StrategyError
from cosmos3_plugins.layer_pipeline import LayerPipeline

CONFIG = vae_config(WAN22, num_res_blocks=2, decoder_base_dim=64)
PROGRAM = decoder_program(CONFIG)
# A machine on which the first half of the ops is three times as slow beside the others as the model has it.
SLOW = 3.0


def report_of(program: Program, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """As bench.json has it, by the name of the case latent rows and columns."""
    cases = {}
    for name, (rows, cols) in sizes.items():
        first, later = (
            [max(cost, 1.0) * (SLOW if 2 * n < len(program) else 1) / 1e11 for n, cost in enumerate(each)]
            for each in op_costs(program, rows * cols)
        )
        ops = [
            {"name": op.name, "first_s": a, "later_s": b}
            for op, a, b in zip(program.ops, first, later, strict=True)
        ]
        cases[name] = {"latent_rows": rows, "latent_cols": cols, "alone": ops}
    return {"vae": CONFIG, "costs": {"cases": cases}}


@pytest.fixture
def report(tmp_path: Path) -> str:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report_of(PROGRAM, {"small": (3, 2), "large": (20, 10)})))
    return str(path)


@pytest.mark.parametrize("pixels", [6, 200, 4, 20, 100, 1024])
def test_what_was_measured_is_used_and_the_rest_is_as_the_model_has_it_from_there(
    report: str, pixels: int
) -> None:
    found = op_seconds(report).costs(PROGRAM, pixels, 4)
    modelled = op_costs(PROGRAM, pixels)
    for seconds, model in zip(found, modelled, strict=True):
        for number, (here, there) in enumerate(zip(seconds, model, strict=True)):
            assert here == pytest.approx(max(there, 1.0) * (SLOW if 2 * number < len(PROGRAM) else 1) / 1e11)


def test_the_nearest_measurement_counts(tmp_path: Path) -> None:
    written = report_of(PROGRAM, {"small": (3, 2), "large": (20, 10)})
    for op in written["costs"]["cases"]["large"]["alone"]:
        op["later_s"] *= 10
    (tmp_path / "bench.json").write_text(json.dumps(written))
    known = op_seconds(str(tmp_path / "bench.json"))
    near, far = (sum(known.costs(PROGRAM, pixels, 4).later) for pixels in (30, 40))
    assert far > 10 * near


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_line_is_divided_by_what_was_measured(report: str, ranks: int) -> None:
    shape = LatentShape(1, 24, 10, 20)
    measured, modelled = (LayerPipeline(op_seconds=path).plan(PROGRAM, shape, ranks) for path in (report, ""))
    assert "by measured seconds of ops" in measured.note and "measured" not in modelled.note
    # The first ops, which the last rank runs, are slower there.
    assert measured.shares[-1].ops[1] < modelled.shares[-1].ops[1]


def without_costs(written: dict[str, Any]) -> None:
    written["costs"]["cases"] = {}


def without_an_op(written: dict[str, Any]) -> None:
    written["costs"]["cases"]["small"]["alone"].pop(0)


def without_time(written: dict[str, Any]) -> None:
    written["costs"]["cases"]["small"]["alone"][3]["later_s"] = float("nan")


def without_a_vae(written: dict[str, Any]) -> None:
    del written["vae"]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (without_costs, "no case measured them"),
        (without_an_op, "its ops are not those of its VAE"),
        (without_time, "no number of seconds"),
        (without_a_vae, "KeyError: 'vae'"),
    ],
)
def test_a_report_without_them_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], why: str
) -> None:
    written = report_of(PROGRAM, {"small": (3, 2)})
    spoil(written)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(written))
    with pytest.raises(StrategyError, match=why) as error:
        LayerPipeline(op_seconds=str(path)).plan(PROGRAM, LatentShape(1, 3, 3, 2), 2)
    assert "run benchmarks/vae.py on this machine" in str(error.value)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    shape = LatentShape(1, 3, 3, 2)
    (tmp_path / "no.json").write_bytes(b"\xff{")
    (tmp_path / "list.json").write_text("[1]")
    for name, why in (
        ("no.json", "has no seconds of ops"),
        ("list.json", "TypeError"),
        ("none.json", "No such file"),
    ):
        with pytest.raises(StrategyError, match=why):
            LayerPipeline(op_seconds=str(tmp_path / name)).plan(PROGRAM, shape, 2)


def test_what_was_not_measured_is_refused(report: str) -> None:
    strategy = LayerPipeline(op_seconds=report)
    with pytest.raises(StrategyError, match="for encode"):
        strategy.plan(encoder_program(CONFIG), LatentShape(1, 3, 3, 2), 2)
    with pytest.raises(StrategyError, match="elements of 2 bytes"):
        strategy.plan(PROGRAM, LatentShape(1, 3, 3, 2, 2), 2)
    other = decoder_program(vae_config(WAN22, num_res_blocks=2, decoder_base_dim=32))
    with pytest.raises(StrategyError, match=r"(?s)weights.*this one has .* with this VAE's width"):
        strategy.plan(other, LatentShape(1, 3, 3, 2), 2)
