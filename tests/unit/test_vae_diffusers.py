"""One rank against `AutoencoderKLWan`: every layout of the VAE, both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from test_program import attention_in_encoder
from vae_models import CONFIGS, make_vae, picture_of

from cosmos3_pipeline.jobs.verify.distance import PICTURE_RANGE, ROUNDING_DB
from cosmos3_pipeline.stages.likeness import psnr_db
from cosmos3_pipeline.vae import ParallelVAE, blocking
from cosmos3_pipeline.vae.of_diffusers import OfDiffusers
from cosmos3_pipeline.vae.pixels import to_uint8
from cosmos3_plugins.replicated import Replicated

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("seed", "frames", "rows", "cols", "batch"), [(0, 4, 5, 3, 1), (1, 1, 2, 7, 2)])
def test_decode_is_that_of_diffusers(name: str, seed: int, frames: int, rows: int, cols: int, batch: int) -> None:
    vae = make_vae(CONFIGS[name], seed=seed)
    torch.manual_seed(seed)
    z = torch.randn(batch, vae.config.z_dim, frames, rows, cols)
    expected = vae.decode(z).sample
    ours = ParallelVAE(vae, Replicated(), Replicated()).decode(z).sample
    assert expected.std() > 0.15
    assert (expected.abs() >= 1).float().mean() < 0.1
    assert (ours - expected).abs().max() <= 1e-5
    assert psnr_db(PICTURE_RANGE, (ours - expected).double().square().mean().item()) >= ROUNDING_DB


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("seed", "frames"), [(0, 9), (1, 1)])
def test_encode_is_that_of_diffusers(name: str, seed: int, frames: int) -> None:
    vae = make_vae(CONFIGS[name], seed=seed)
    x = picture_of(vae, frames=frames, batch=2, seed=seed)
    with attention_in_encoder():
        expected = vae.encode(x).latent_dist
    ours = ParallelVAE(vae, Replicated(), Replicated()).encode(x).latent_dist
    assert expected.mean.std() > 0.1
    assert (ours.mode() - expected.mode()).abs().max() <= 1e-5
    assert (ours.logvar - expected.logvar).abs().max() <= 1e-5


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["wan22", "wan21"])
def test_bfloat16_is_no_further_from_float32_than_diffusers(name: str) -> None:
    """Over several models and inputs: which of two roundings is nearer in one of them is chance."""
    ours, theirs = {"decode": 0.0, "encode": 0.0}, {"decode": 0.0, "encode": 0.0}
    for seed in range(4):
        exact = make_vae(CONFIGS[name], seed=seed)
        torch.manual_seed(seed)
        z, x = torch.randn(2, exact.config.z_dim, 4, 5, 3), picture_of(exact, seed=seed)
        picture, moments = exact.decode(z).sample, exact.encode(x).latent_dist.parameters
        vae = make_vae(CONFIGS[name], seed=seed, dtype=torch.bfloat16)
        parallel = ParallelVAE(vae, Replicated(), Replicated())
        for model, total in ((parallel, ours), (vae, theirs)):
            total["decode"] += float((model.decode(z.bfloat16()).sample - picture).pow(2).mean())
            total["encode"] += float((model.encode(x.bfloat16()).latent_dist.parameters - moments).pow(2).mean())
    assert ours["decode"] <= theirs["decode"]
    assert ours["encode"] <= theirs["encode"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_vae_that_makes_frames_in_pairs_is_that_of_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for threshold in ("_PAIR_FLOPS", "_PAIR_PIXELS"):
        monkeypatch.setattr(blocking, threshold, 0)
    vae = make_vae(CONFIGS[name])
    torch.manual_seed(0)
    z, x = torch.randn(1, vae.config.z_dim, 4, 5, 3), picture_of(vae, frames=9)
    ours = ParallelVAE(vae, Replicated(), Replicated())
    expected = vae.decode(z).sample
    assert expected.std() > 0.15
    assert (expected.abs() >= 1).float().mean() < 0.1
    assert (ours.decode(z).sample - expected).abs().max() <= 1e-5
    if not vae.config.attn_scales:
        moments = vae.encode(x).latent_dist.parameters
        assert (ours.encode(x).latent_dist.parameters - moments).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["wan22", "wan21"])
def test_the_kernels_of_diffusers_give_its_bits(name: str) -> None:
    vae = make_vae(CONFIGS[name])
    parallel = ParallelVAE(vae, OfDiffusers(), OfDiffusers())
    torch.manual_seed(0)
    z, x = torch.randn(1, vae.config.z_dim, 3, 2, 3), picture_of(vae, frames=6)
    picture = vae.decode(z).sample
    assert torch.equal(parallel.encode(x).latent_dist.parameters, vae.encode(x).latent_dist.parameters)
    assert torch.equal(parallel.decode(z).sample, picture)
    assert torch.equal(torch.cat(list(parallel.decode_stream(z, pixels="float")), dim=1), picture[0])
    assert torch.equal(torch.cat(list(parallel.decode_stream(z))), to_uint8(picture)[0])


@pytest.mark.parametrize("name", ["wan22", "wan21"])
def test_the_own_kernels_round_about_as_much_as_those_of_diffusers(name: str) -> None:
    """Latents of a condition can therefore not be nearer to those of diffusers, except with its own kernels."""
    vae = make_vae(CONFIGS[name])
    x = picture_of(vae, frames=9)
    with attention_in_encoder():
        theirs = vae.encode(x).latent_dist.mode().double()
        exact = copy.deepcopy(vae).double().encode(x.double()).latent_dist.mode()
    ours = ParallelVAE(vae, Replicated(), Replicated()).encode(x).latent_dist.mode().double()
    rounded = (theirs - exact).square().mean().sqrt()
    assert 0 < rounded < 1e-6
    assert (ours - exact).square().mean().sqrt() < 3 * rounded
