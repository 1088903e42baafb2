"""`auto` picks what its cost model finds fastest among what is exact enough, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vae_models import WAN22, vae_config

from cosmos3_pipeline import compose
from cosmos3_pipeline.plan.plan import make_plan
from cosmos3_pipeline.plan.search import search
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import decoder_program, encoder_program
from cosmos3_pipeline.vae.strategy import Exactness, StrategyError
from cosmos3_plugins.auto import Auto
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard

DECODER, ENCODER = decoder_program(vae_config(WAN22)), encoder_program(vae_config(WAN22))
LONG, IMAGE = LatentShape(1, 33, 22, 40), LatentShape(1, 1, 22, 40)
FAST = Auto(link_gb_per_s=1e6, latency_us=0.0, memory_gb_per_s=1e6)


def test_a_long_clip_flows_through_layers_and_an_image_is_cut() -> None:
    assert isinstance(FAST.settled(DECODER, LONG, 2), LayerPipeline)
    # A run lets every weight go that its ranks do not need, so what was picked must not depend on another clip.
    assert not FAST.settled(DECODER, LONG, 2).depends_on_clip
    free = replace(FAST, require="rounding")
    assert isinstance(free.settled(DECODER, IMAGE, 4), SpatialShard)
    # A line of layers has nothing to overlap in one image, so bitwise leaves one rank as the best.
    assert isinstance(FAST.settled(DECODER, IMAGE, 4), Replicated)


def test_a_link_that_is_too_slow_leaves_one_rank() -> None:
    slow = Auto(require="approximate", link_gb_per_s=1e-6)
    for program in (DECODER, ENCODER):
        assert isinstance(slow.settled(program, LONG, 2), Replicated)


@pytest.mark.parametrize("require", list(Exactness))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_it_keeps_to_what_is_required_and_says_why(require: Exactness, ranks: int) -> None:
    auto = replace(FAST, require=require.value)
    plan = auto.plan(DECODER, LONG, ranks)
    picked = auto.settled(DECODER, LONG, ranks)
    assert plan.shares == picked.plan(DECODER, LONG, ranks).shares
    assert plan.exactness == picked.exactness and plan.exactness.satisfies(require)
    assert plan.strategy == f"auto: {picked.name}"
    assert plan.note.startswith(f"picked {picked.name}, {picked.exactness}: about ")
    assert "s with " in plan.note
    assert ("tiled" in plan.note) == (require == Exactness.APPROXIMATE)


def test_it_estimates_as_the_plan_does() -> None:
    """With the figures of the topology the pick is the fastest of `plan.search` with the same layout."""
    cfg = compose(["model=nano", "topology=h200_x4", "vae/decode=auto", "vae.required_exactness=rounding"])
    plan = make_plan(cfg)
    layout = {f"topology.cfg={cfg.topology.cfg}", f"topology.ulysses={cfg.topology.ulysses}"}
    assert not any("vae/decode=auto" in c.overrides for c in search(cfg))
    same = [c for c in search(cfg) if c.plan is not None and layout <= set(c.overrides)]
    fastest = min(same, key=lambda c: c.plan.seconds["decode"] if c.plan else 0.0)
    assert fastest.plan is not None
    assert plan.strategies["decode"] == f"auto: {fastest.plan.strategies['decode']}"
    assert plan.seconds["decode"] == pytest.approx(fastest.plan.seconds["decode"])


def test_an_exactness_that_there_is_not() -> None:
    with pytest.raises(StrategyError, match=r"auto\.require=perfect; it is no exactness; use one of bitwise, r"):
        Auto(require="perfect").plan(DECODER, LONG, 2)
