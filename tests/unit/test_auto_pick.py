"""`auto` picks what its cost model finds fastest among what is exact enough, and says why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
from vae_models import WAN22, vae_config

from cosmos3_pipeline import compose
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.planning.search import search
from cosmos3_pipeline.vae.assignment import Assignment, Block
from cosmos3_pipeline.vae.costs import RooflineCosts
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program, decoder_program, encoder_program
from cosmos3_pipeline.vae.search import search as search_vae
from cosmos3_pipeline.vae.strategy import Exactness, Strategy, StrategyError
from cosmos3_plugins.auto import Auto
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard

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
        ["topology=cpu_x4", "topology.threads_per_rank=2"],
        pytest.param(["model=nano", "topology=h100_x8_nodes", "task.num_frames=29"], marks=pytest.mark.thorough),
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


class Faulty(Strategy):
    name = "faulty"
    exactness = Exactness.BITWISE

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        return 1 // 0  # type: ignore[return-value]


class FaultyVariants(Faulty):
    def variants(self, ranks: int) -> Iterable[Strategy]:
        raise KeyError(ranks)


class Boasts(SpatialShard):
    name, exactness = "boasts", Exactness.BITWISE

    def variants(self, ranks: int) -> Iterable[SpatialShard]:
        return [self]


class Hurries(LayerPipeline):
    name = "hurries"

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        return replace(super().assign(program, shape, ranks), speed_up=1000.0)


class Forgets(Strategy):
    """Drops the context before each rank's chunks."""

    name = "forgets"
    exactness = Exactness.APPROXIMATE

    def assign(self, program: Program, shape: LatentShape, ranks: int) -> Assignment:
        ops, chunks = (0, len(program)), program.chunks(shape)
        edges = [chunks * rank // ranks for rank in range(ranks + 1)]
        return Assignment.of(
            ranks, [Block(ops, run, rank, warm_up=int(rank > 0)) for rank, run in enumerate(pairwise(edges))]
        )


@pytest.mark.parametrize("bad", [Faulty, FaultyVariants, Boasts, Hurries, Forgets])
def test_a_bad_plugin_ends_no_search_and_leads_none(bad: type[Strategy]) -> None:
    good = [Replicated, LayerPipeline]
    rates = {"costs": RooflineCosts(DECODER, LONG, 1e11, 1e12), "links": None, "required": Exactness.APPROXIMATE}
    found = search_vae([bad, *good], DECODER, LONG, 2, **rates)
    assert [one.strategy.name for one in found] == ["layer_pipeline", "replicated"]
    if bad is not Forgets:
        with pytest.raises(StrategyError, match=f"{bad.name} (failed: ZeroDivisionError|declares|says)"):
            bad().plan(DECODER, LONG, 2)
