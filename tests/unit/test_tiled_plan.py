"""The arithmetic of `tiled`: where tiles lie, who gets which, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vae_models import WAN22, vae_config

from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import decoder_program, encoder_program
from cosmos3_pipeline.vae.strategy import StrategyError
from cosmos3_plugins.tiled import Tiled
from cosmos3_plugins.tiled.tiles import Axis, Tiling

DECODER, ENCODER = decoder_program(vae_config(WAN22)), encoder_program(vae_config(WAN22))


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 15), cols=st.integers(1, 15), tile=st.integers(1, 8), gap=st.integers(0, 7), data=st.data()
)
def test_tiles_cover_the_latent_and_each_is_dealt_once(
    rows: int, cols: int, tile: int, gap: int, data: st.DataObject
) -> None:
    stride = max(1, tile - gap)
    tiling = Tiling.of(Axis(rows, tile, stride), Axis(cols, tile, stride))
    covered = {
        (r, c) for i in range(len(tiling)) for r in range(*tiling.spans(i)[0]) for c in range(*tiling.spans(i)[1])
    }
    assert covered == {(r, c) for r in range(rows) for c in range(cols)}
    ranks = data.draw(st.integers(1, len(tiling)))
    dealt = tiling.dealt(ranks)
    assert sorted(i for tiles in dealt for i in tiles) == list(range(len(tiling)))
    assert all(dealt)


def test_tiles_of_720p_are_those_of_diffusers() -> None:
    shape = LatentShape(1, 2, 45, 80)
    tiling = Tiled().tiling(DECODER, shape)
    assert tiling.rows.spans == ((0, 16), (12, 28), (24, 40), (36, 45))
    assert [start for start, _ in tiling.cols.spans] == list(range(0, 80, 12))
    # diffusers counts an encoder's tile in patches of two pixels, so the tile is twice as large.
    assert Tiled().tiling(ENCODER, shape).rows.spans == ((0, 32), (24, 45))
    # But it tiles a picture of more than 256 pixels.
    assert len(Tiled().tiling(ENCODER, LatentShape(1, 1, 16, 16))) == 1
    assert Tiled().tiling(ENCODER, LatentShape(1, 1, 17, 25)).cols.spans == ((0, 25), (24, 25))


def test_shares_are_even_and_add_up() -> None:
    shares = Tiled().plan(DECODER, LatentShape(1, 2, 45, 80), 4).shares
    flops = [share.flops for share in shares]
    assert max(flops) / min(flops) < 1.15
    assert sum(flops) > DECODER.flops(LatentShape(1, 2, 45, 80))
    assert shares[0].sent_bytes == shares[0].sent_messages == 0


@pytest.mark.parametrize(
    ("sizes", "ranks", "says"),
    [
        ({}, 3, "1 x 2 = 2 tiles of 16 x 16 and each rank needs one; use no more than 2"),
        ({"tile_sample_min_height": 250}, 1, "tile_sample_min_height=250; one latent row or column is 16"),
        ({"tile_sample_stride_width": 0}, 1, "give 16"),
        (
            {"tile_sample_stride_width": 320},
            1,
            "between two tiles 64 would be missing; give a stride of 256 or less",
        ),
    ],
)
def test_what_cannot_be_tiled_is_refused_with_the_numbers(sizes: dict[str, int], ranks: int, says: str) -> None:
    with pytest.raises(StrategyError) as refusal:
        Tiled(**sizes).plan(DECODER, LatentShape(1, 2, 9, 17), ranks)
    problem = refusal.value.problem
    assert says in f"{problem.what}; {problem.why}; {problem.works}"
