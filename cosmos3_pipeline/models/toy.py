"""The toy model: Cosmos3's own classes and folder layout at a small width, with random weights from a fixed seed.

It replaces a real checkpoint where the values of the weights do not matter: diffusers loads the folder like any
other. The weights are scaled so that the decoded picture is lively, neither flat nor clamped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from cosmos3_pipeline import stopping
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.models.layouts import LATENTS_MEAN, LATENTS_STD, LAYOUTS
from cosmos3_pipeline.models.maker import write_checkpoint
from cosmos3_pipeline.models.random_weights import CPU, vae_tensor

RECIPE = 3  # increase it with any change of the weights, so that no older toy model in a cache is used


def toy_checkpoint(
    *, transformer: Mapping[str, Any], vae: Mapping[str, Any], sound_tokenizer: Mapping[str, Any]
) -> Path:
    """The folder of the toy model of these dimensions. It is made now, unless the cache has it already.

    `transformer`, `vae` and `sound_tokenizer` are plain values, named as `Cosmos3OmniTransformer`,
    `AutoencoderKLWan` and `Cosmos3AVAEAudioTokenizer` name them. Several processes may call it at once: each
    writes a separate folder, and the folder of the first to finish is kept.

    Raises:
        Refusal: dimensions that the toy cannot have, or a cache folder that cannot be written.
    """
    recipe = {
        "recipe": RECIPE,
        "transformer": dict(transformer),
        "vae": dict(vae),
        "sound_tokenizer": dict(sound_tokenizer),
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
        with stopping.leftover(partial):
            write_toy(partial, transformer=transformer, vae=vae, sound_tokenizer=sound_tokenizer)
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
        # If another process was first, its folder has the same files. `rename` never replaces a folder with files.
        if not folder.is_dir():
            raise


def write_toy(
    folder: Path, *, transformer: Mapping[str, Any], vae: Mapping[str, Any], sound_tokenizer: Mapping[str, Any]
) -> None:
    """Write the toy model of these dimensions into `folder`. The bytes are the same every time."""
    sizes: dict[str, Any] = {"transformer": transformer, "vae": vae, "sound_tokenizer": sound_tokenizer}
    write_checkpoint(folder, LAYOUTS["toy"], **sizes, dtype=torch.float32)


def make_vae(dimensions: Mapping[str, Any], device: torch.device = CPU) -> AutoencoderKLWan:
    """The random VAE of these dimensions, in memory. On the CPU it has the values that `write_toy` writes."""
    with torch.random.fork_rng(devices=[]), device:  # the values that the constructor draws are replaced
        model = AutoencoderKLWan(**dimensions, latents_mean=list(LATENTS_MEAN), latents_std=list(LATENTS_STD))
    patch_size = int(dimensions["patch_size"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(vae_tensor(name, shape, patch_size=patch_size, device=device))
    return model.eval().requires_grad_(False)
