"""`pipeline_of_shards` in real ranks: diffusers' picture up to rounding, with the planned bytes and memory."""

from __future__ import annotations

import pytest
from ranks import run_on_ranks
from test_spatial_shard import FULL, check_against_diffusers, peak_bytes
from vae_models import WAN22, vae_config

from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import Program, decoder_program, encoder_program
from cosmos3_pipeline.vae.strategy import StrategyError
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.layer_pipeline.costs import LARGE_PIXELS
from cosmos3_plugins.pipeline_of_shards import PipelineOfShards
from cosmos3_plugins.spatial_shard import SpatialShard
from cosmos3_plugins.spatial_shard.slabs import Grid, deals

DECODER, ENCODER = decoder_program(vae_config(WAN22)), encoder_program(vae_config(WAN22))


@pytest.mark.parametrize(
    ("groups", "ranks", "names"),
    [(2, 4, FULL), (1, 3, ["wan22"]), (3, 3, ["wan21"]), (2, 6, ["wan22", "wan21 batch"]), (3, 6, ["wan22"])],
)
def test_it_is_diffusers_picture_and_the_plan(groups: int, ranks: int, names: list[str]) -> None:
    check_against_diffusers(PipelineOfShards(groups), ranks, names)


class CutWhereDealt(PipelineOfShards):
    """Two groups, of which one hands over what the other deals anew at once."""

    def runs(self, program: Program, element_bytes: int) -> tuple[tuple[int, int], ...]:
        cut = deals(program, Grid.of(5, 4, 2, 1), 0)[-1].start
        return (cut, len(program)), (0, cut)


def test_slabs_are_dealt_anew_on_their_way_to_the_next_group() -> None:
    check_against_diffusers(CutWhereDealt(), 4, ["wan22"])


def test_planned_activations_are_within_15_percent() -> None:
    for seen in run_on_ranks(peak_bytes, 4, PipelineOfShards(), 11, 6, 4):
        for planned, peak in seen:
            assert abs(planned / peak - 1) <= 0.15, (planned, peak)


def test_one_group_is_spatial_shard_and_one_rank_a_group_is_layer_pipeline() -> None:
    shape = LatentShape(1, 5, 7, 6)
    for program in (DECODER, ENCODER):
        assert PipelineOfShards(1).plan(program, shape, 3).shares == SpatialShard().plan(program, shape, 3).shares
        line = LayerPipeline(pixels=LARGE_PIXELS, moving_cuts=False)
        assert PipelineOfShards(4).plan(program, shape, 4).shares == line.plan(program, shape, 4).shares


@pytest.mark.parametrize(
    ("groups", "ranks", "says"),
    [
        (2, 3, "use groups=1, or a number of ranks that divides by 2"),
        (0, 4, "use groups=1"),
        (2, 8, "on a latent of 3 rows; the 4 ranks of a group need a row each; use 6 ranks or fewer"),
        (400, 400, "ops and each group needs one"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(groups: int, ranks: int, says: str) -> None:
    with pytest.raises(StrategyError) as refusal:
        PipelineOfShards(groups).plan(DECODER, LatentShape(1, 2, 3, 5), ranks)
    assert says in str(refusal.value)
    assert str(refusal.value).count("; ") == 2
