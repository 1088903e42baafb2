"""`tiled` in real ranks: what diffusers gives with `enable_tiling()`, with the planned bytes and memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_spatial_shard import CASES, both_ways, expected_of, inputs_of, peak_bytes, squared_error
from vae_models import make_vae

from cosmos3_plugins.tiled import Tiled

# Tiles of 2 or 3 latent rows and columns: shorter last ones, and last ones that lie inside the overlap.
SIZES = {
    "tile_sample_min_height": 48,
    "tile_sample_min_width": 32,
    "tile_sample_stride_height": 32,
    "tile_sample_stride_width": 16,
}
HALF = {key: size // 2 for key, size in SIZES.items()}


@cache
def tiled_by_diffusers(name: str, half: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Picture and moments in float32, and in the case's dtype."""
    model, z, x, _ = inputs_of(name)
    exact = make_vae(CASES[name][0], seed=list(CASES).index(name))
    found: dict[str, list[torch.Tensor]] = {"picture": [], "moments": []}
    for vae in (exact, model):
        vae.enable_tiling(**HALF if half else SIZES)
        found["picture"].append(vae.decode(z.to(vae.dtype)).sample)
        found["moments"].append(vae.encode(x.to(vae.dtype)).latent_dist.parameters)
        vae.disable_tiling()
    return {kind: (a, b) for kind, (a, b) in found.items()}


@pytest.mark.parametrize(
    ("ranks", "names", "half"),
    [
        (1, ["wan22"], False),
        (2, ["wan22", "wan22 bf16", "wan21"], False),
        (2, ["wan21 batch", "wan21 bf16"], True),
        (3, ["wan21"], False),
        (4, ["wan22"], False),
    ],
)
def test_it_is_diffusers_tiled_picture_and_the_plan(ranks: int, names: list[str], half: bool) -> None:
    by_rank = run_on_ranks(both_ways, ranks, Tiled(**HALF if half else SIZES), names, timeout=90)
    for number, name in enumerate(names):
        tiled = tiled_by_diffusers(name, half)
        for kind, (exact, theirs) in tiled.items():
            ours = torch.from_numpy(by_rank[0][number][kind])
            if theirs.dtype == torch.bfloat16:
                assert squared_error(ours, exact) <= squared_error(theirs, exact), (name, kind)
            else:
                assert (ours - exact).abs().max() <= 1e-5, (name, kind)
            for other in by_rank[1:]:
                assert (other[number][kind] == by_rank[0][number][kind]).all()
        # Tiles show: this is not the untiled picture, so equality with diffusers means something.
        assert (tiled["picture"][0] - expected_of(name, "decode")[0]).abs().max() > 0.01


def test_a_clip_smaller_than_a_tile_is_not_tiled() -> None:
    ((ours,),) = run_on_ranks(both_ways, 1, Tiled(), ["wan22"])
    assert abs(ours["picture"] - expected_of("wan22", "decode")[0].numpy()).max() <= 1e-5


def test_planned_activations_are_within_15_percent() -> None:
    strategy: Any = Tiled(48, 32, 32, 16)
    for seen in run_on_ranks(peak_bytes, 3, strategy, 11, 6, 3):
        for planned, peak in seen:
            assert abs(planned / peak - 1) <= 0.15, (planned, peak)
