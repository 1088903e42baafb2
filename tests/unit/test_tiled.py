"""Tiles give the picture of diffusers' tiling, on one rank and dealt to several."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from thread_ranks import run_on_threads
from torch import Tensor

from cosmos3_pipeline.plugin_kit.cases import WAN21, WAN22, Case
from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_pipeline.vae.weights import BoundVae, ModuleWeights
from cosmos3_plugins.tiled import Tiled

pytestmark = pytest.mark.long

# For decode in pixels; for encode in what diffusers counts there, patches.
SIZES = {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
SIZES |= {"tile_sample_stride_height": 32, "tile_sample_stride_width": 48}
CASES = {
    "Wan2.2": Case("Wan2.2", WAN22, "float32", batch=1, frames=3, rows=7, cols=9),
    "Wan2.1": Case("Wan2.1", WAN21, "float32", batch=2, frames=2, rows=11, cols=13),
}


@cache
def made(name: str) -> tuple[AutoencoderKLWan, Tensor, Tensor]:
    case = CASES[name]
    return case.autoencoder(), case.latents(seed=1), case.picture(seed=2)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_they_are_those_of_diffusers(name: str) -> None:
    model, z, x = made(name)
    vae = ParallelVAE(model, encode=Tiled(**SIZES), decode=Tiled(**SIZES))
    found, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
    model.enable_tiling(**SIZES)
    try:
        expected, wanted = model.decode(z).sample, model.encode(x).latent_dist.parameters
    finally:
        model.disable_tiling()
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(moments, wanted, atol=2e-5, rtol=0)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ranks", [2, 3])
@torch.no_grad()
def test_ranks_change_nothing(ranks: int) -> None:
    model, z, x = made("Wan2.2")
    strategy = Tiled(**SIZES)

    def work(comm: Any) -> tuple[list[Tensor], Tensor]:
        vae = BoundVae(model.config, ModuleWeights(model), dtype=torch.float32, device=torch.device("cpu"))
        frames = list(strategy.runner(vae, comm, "decode").stream(z, pixels="float"))
        return frames, strategy.runner(vae, comm, "encode").encode(x)

    ((alone, moments),) = run_on_threads(1, work)[0]
    dealt = run_on_threads(ranks, work)[0]
    assert torch.equal(torch.cat(dealt[0][0], dim=2), torch.cat(alone, dim=2))
    assert all(frames == [] for frames, _ in dealt[1:])
    assert all(torch.equal(found, moments) for _, found in dealt)
