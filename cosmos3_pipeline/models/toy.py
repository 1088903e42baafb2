"""The toy model: Cosmos3's own classes and folder layout at a small width, with random weights from a fixed seed.

It stands in for a real checkpoint wherever the numbers do not matter but everything else does: diffusers
loads the folder like any other. The weights are scaled so that the decoded picture is lively, neither flat
nor clamped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler
from torch import Tensor, nn

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.models.toy_tokenizer import make_tokenizer

RECIPE = 1  # raise it with any change of the weights, so that nobody goes on with an older toy
SEED = 0
SHARD_SIZE = "1MB"  # of the transformer: small enough that it has several shards and an index
FLOW_SHIFT = 10.0

# Mean and standard deviation of each latent channel of the Wan2.2 VAE, from its published config.
LATENTS_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
LATENTS_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


def toy_checkpoint(*, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Path:
    """The folder of the toy model of these dimensions, made now unless it is in the cache already.

    `transformer` and `vae` are plain values, named as `Cosmos3OmniTransformer` and `AutoencoderKLWan` name
    them. Several processes may call it at once: each writes a folder of its own, the first to finish wins.

    Raises:
        Refusal: dimensions that the toy cannot have, or a cache folder that cannot be written.
    """
    recipe = {
        "recipe": RECIPE,
        "transformer": dict(transformer),
        "vae": dict(vae),
        "versions": {name: version(name) for name in ("diffusers", "transformers", "tokenizers", "torch")},
    }
    fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    cache = cache_folder()
    folder = cache / f"toy-{fingerprint}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    except OSError as error:
        raise Refusal(
            what=f"the toy model cannot be written to {cache}",
            why=str(error),
            works="the environment variable COSMOS3_CACHE set to a folder that can be written",
        ) from error
    try:
        write_toy(partial, transformer=transformer, vae=vae)
        _rename_unless_there(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """`$COSMOS3_CACHE`, or `cosmos3_pipeline` in the user's cache folder."""
    if own := os.environ.get("COSMOS3_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cosmos3_pipeline"


def _rename_unless_there(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # Another process renamed the same files there first: a folder is never replaced by another.
        if not folder.is_dir():
            raise


def write_toy(folder: Path, *, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Write the toy model of these dimensions into `folder`; the same bytes every time."""
    tokenizer = make_tokenizer(int(transformer["vocab_size"]))
    pipeline = Cosmos3OmniPipeline(
        transformer=make_transformer(transformer, latent_channels=int(vae["z_dim"])),
        text_tokenizer=tokenizer,
        vae=make_vae(vae),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=False, flow_shift=FLOW_SHIFT
        ),
        enable_safety_checker=False,
    )
    pipeline.save_config(folder)
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size=SHARD_SIZE)
    pipeline.vae.save_pretrained(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    tokenizer.save_pretrained(str(folder / "text_tokenizer"))


def make_transformer(dimensions: Mapping[str, Any], *, latent_channels: int) -> Cosmos3OmniTransformer:
    """A random transformer: text and noise level both show in its velocities, which are of the noise's size."""
    half = int(dimensions["head_dim"]) // 2
    spatial = half // 3  # of the rotary frequencies for rows and for columns; time takes the rest
    with torch.random.fork_rng(devices=[]):  # what the constructor draws is replaced below
        model = Cosmos3OmniTransformer(
            **dimensions,
            latent_channel=latent_channels,
            patch_latent_dim=latent_channels * int(dimensions["latent_patch_size"]) ** 2,
            rope_axes_dim=[half - 2 * spatial, spatial, spatial],
        )

    def weight(name: str, noise: Tensor) -> Tensor:
        if "norm" in name:
            return 1 + 0.1 * noise
        if name == "embed_tokens.weight":
            return noise
        return noise / noise[0].numel() ** 0.5 if noise.ndim == 2 else 0.1 * noise

    _fill(model, weight)
    return model


def make_vae(dimensions: Mapping[str, Any]) -> AutoencoderKLWan:
    """A random Wan2.2 VAE whose decoder paints coloured, moving patches from unit noise.

    Raises:
        Refusal: another number of latent channels than the statistics of the Wan2.2 VAE have.
    """
    if dimensions["z_dim"] != len(LATENTS_MEAN):
        raise Refusal(
            what=f"model.vae.z_dim={dimensions['z_dim']} for the toy model",
            why=f"the latents' mean and deviation are the Wan2.2 VAE's, which has {len(LATENTS_MEAN)} channels",
            works=f"model.vae.z_dim={len(LATENTS_MEAN)}",
        )
    with torch.random.fork_rng(devices=[]):
        model = AutoencoderKLWan(**dimensions, latents_mean=list(LATENTS_MEAN), latents_std=list(LATENTS_STD))
    sub_pixels = int(dimensions["patch_size"]) ** 2

    def weight(name: str, noise: Tensor) -> Tensor:
        if "norm" in name:
            return 1 + 0.1 * noise
        if name.endswith("bias"):
            return 0.1 * noise if name != "decoder.conv_out.bias" else torch.zeros_like(noise)
        scaled = _taper(noise / noise[0].numel() ** 0.5)
        if name.startswith("decoder.up_blocks"):
            if "time_conv" in name:
                # One half makes the even frames, the other the odd ones: alike, or the picture flickers.
                even, odd = scaled.chunk(2)
                return torch.cat([even, 0.95 * even + 0.31 * odd])
            if ".resample." in name:
                # The shortcut beside it has no weights and turns channels into stripes; outweigh it.
                return 6 * scaled
        if name == "decoder.conv_out.weight":
            # What enters is positive on average, so a filter that does not sum to zero tints the whole picture.
            # The sub-pixels of a patch are channels here: alike, or the picture is a grid.
            filters = scaled - scaled.mean(dim=(1, 2, 3, 4), keepdim=True)
            shared = filters[::sub_pixels].repeat_interleave(sub_pixels, dim=0)
            return 0.6 * (0.98 * shared + 0.2 * filters)
        return scaled

    _fill(model, weight)
    return model


def _taper(kernel: Tensor) -> Tensor:
    """A conv kernel [out, in, ...] with weaker outer taps, for smooth pictures, and the same energy on average.

    The past's taps are weaker as well: before the first frame there is nothing, and it shall be as lively.
    """
    for dim, size in list(enumerate(kernel.shape))[2:]:
        if size == 3:
            past = kernel.ndim == 5 and dim == 2
            taps = torch.tensor((0.4, 0.6, 1.0) if past else (0.8, 1.0, 0.8), dtype=kernel.dtype)
            shape = [1] * kernel.ndim
            shape[dim] = size
            kernel = kernel * (taps * (size / taps.square().sum()).sqrt()).view(shape)
    return kernel


def _fill(model: nn.Module, weight: Callable[[str, Tensor], Tensor]) -> None:
    """Set every parameter to `weight(its name, standard normal noise of its shape)`."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, torch.randn(parameter.shape, generator=generator)))
    model.eval().requires_grad_(False)
