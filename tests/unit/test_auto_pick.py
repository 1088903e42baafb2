"""`auto` picks what its cost model finds fastest among what is exact enough, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vae_models import WAN22, vae_config

from cosmos3_pipeline import compose
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.planning.search import search
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program, decoder_program, encoder_program
from cosmos3_pipeline.vae.strategy import Exactness, StrategyError
from cosmos3_plugins.auto import Auto

DECODER, ENCODER = decoder_program(vae_config(WAN22)), encoder_program(vae_config(WAN22))
LONG, IMAGE = LatentShape(1, 33, 22, 40), LatentShape(1, 1, 22, 40)
FAST = Auto(link_gb_per_s=1e6, latency_us=0.0, memory_gb_per_s=1e6)


def picked(auto: Auto, program: Program, shape: LatentShape, ranks: int) -> str:
    return auto.plan(program, shape, ranks).note.split(",")[0].removeprefix("picked ")


def test_a_long_clip_flows_through_layers_and_an_image_is_cut() -> None:
    assert picked(FAST, DECODER, LONG, 2) == "layer_pipeline"
    assert picked(replace(FAST, require="rounding"), DECODER, IMAGE, 4) == "spatial_shard (axis=grid)"
    # A line of layers has nothing to overlap in one image.
    assert picked(FAST, DECODER, IMAGE, 4) == "replicated"
    for program in (DECODER, ENCODER):
        assert picked(Auto(require="approximate", link_gb_per_s=1e-6), program, LONG, 2) == "replicated"


@pytest.mark.parametrize("require", list(Exactness))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_it_keeps_to_what_is_required_and_says_why(require: Exactness, ranks: int) -> None:
    plan = replace(FAST, require=require.value).plan(DECODER, LONG, ranks)
    assert plan.exactness.satisfies(require)
    assert ": about " in plan.note and "s with " in plan.note and "tiled" not in plan.note


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=nano", "topology=h200_x4"],
        ["model=nano", "topology=h100_x8_nodes", "task.num_frames=29"],
        ["topology=cpu_x4", "topology.threads_per_rank=2"],
    ],
    ids=lambda overrides: overrides[1],
)
def test_it_the_plan_and_the_search_agree(overrides: list[str]) -> None:
    """They have one clock and the same figures: `auto` picks the fastest that `plan.search` finds."""
    cfg = compose([*overrides, "vae.parallel_decode=true", "vae/decode=auto", "vae.required_exactness=rounding"])
    plan, found = make_plan(cfg), search(cfg)
    assert not any("vae/decode=auto" in candidate.overrides for candidate in found)
    fastest = min(candidate.plan.seconds["decode"] for candidate in found if candidate.plan)
    assert plan.strategies["decode"] == "auto"
    assert plan.seconds["decode"] == pytest.approx(fastest)
    assert f": about {fastest:.3g} s" in plan.strategy_notes["decode"]


def test_an_exactness_that_there_is_not() -> None:
    with pytest.raises(StrategyError, match=r"auto\.require=perfect"):
        Auto(require="perfect").plan(DECODER, LONG, 2)
