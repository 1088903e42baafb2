"""The roofline of benchmarks/ times the convolutions that a program has, and no others."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from vae_models import WAN21, WAN22

from cosmos3_pipeline.vae.ops import Attention, LatentShape
from cosmos3_pipeline.vae.program import program_for

ROOFLINE = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "roofline.py"))


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan21", "wan22"])
def test_its_arithmetic_is_that_of_the_program(config: dict[str, Any], direction: Any) -> None:
    program, latent = program_for(direction, config), LatentShape(1, 3, 3, 4)
    found = sum(count * shape.flops for shape, count in ROOFLINE["shapes_of"](program, latent).items())
    needed = [
        (op, op.flops(latent, first=True) + (program.chunks(latent) - 1) * op.flops(latent, first=False))
        for op in program.ops
    ]
    assert found == sum(flops for op, flops in needed if not isinstance(op, Attention)) > 0


def test_it_keeps_the_best_time_of_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_for("decode", {**WAN22, "base_dim": 4, "decoder_base_dim": 4})
    line = ROOFLINE["Roofline"](program, LatentShape(1, 2, 1, 1), torch.float32, torch.device("cpu"))
    for seconds, best in ((2.0, 2.0), (0.5, 0.5), (3.0, 0.5)):
        monkeypatch.setattr(line, "_seconds", lambda way, seconds=seconds: seconds)
        line.measure()
        assert line.seconds == best * sum(line.counts.values())
