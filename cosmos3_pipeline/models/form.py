"""The form of a checkpoint: every tensor has its shape and none has a file, so no weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint.hub import BUILTIN, components_for, local_folder
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo, Placed, inspect_checkpoint
from cosmos3_pipeline.checkpoint.sampler import DISTILLED, Sampler
from cosmos3_pipeline.checkpoint.sound import SOUND_TOKENIZER, sound_weights
from cosmos3_pipeline.checkpoint.stored import NO_FILE, StoredTensor
from cosmos3_pipeline.checkpoint.weights import Part, Weight, transformer_weights, vae_weights
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import ModelConfig
from cosmos3_pipeline.models.maker import rotary_axes
from cosmos3_pipeline.planning.text import NEGATIVE_PROMPT_BYTES

# This sentence is repeated to the length of NVIDIA's negative prompt, for models that have a negative prompt.
FILLING = "a red circle moves left over a blue background at night, "


def form_of(model: ModelConfig, *, sound: bool = False) -> CheckpointInfo:
    """The form of the checkpoint of `model`, with a sound tokenizer if the run has `sound`. Reads no weight.

    If the checkpoint is on this machine, its config, tokenizer and sampler are used. Otherwise the config has the
    numbers of `model`, including the fixed steps of a distilled model, and everything else is the toy model's.
    """
    here = folder_of(model, sound=sound)
    if here is not None:
        found = inspect_checkpoint(here, sound=sound)
        return replace(found, tensors={name: _unread(placed) for name, placed in found.tensors.items()})
    folder = local_folder(f"{BUILTIN}toy", None)
    assert folder is not None
    toy = inspect_checkpoint(folder)
    dimensions: dict[str, Any] = plain(model.transformer)
    channels, axes = model.vae.z_dim, rotary_axes(model.transformer.head_dim)
    transformer = {
        **toy.transformer,
        **dimensions,
        "latent_channel": channels,
        "patch_latent_dim": channels * model.transformer.latent_patch_size**2,
        "rope_axes_dim": axes,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": axes, "rope_type": "default"},
    }
    vae = {**toy.vae, **plain(model.vae)}
    sampler, sigmas = toy.sampler, model.distilled_sigmas
    if sigmas is not None:
        sampler = Sampler(DISTILLED, {"stochastic_sampling": True}, False, None, distilled_sigmas=tuple(sigmas))
    tensors = {"transformer": _placed(transformer_weights(transformer)), "vae": _placed(vae_weights(vae))}
    tokenizer: dict[str, Any] = {**plain(model.sound_tokenizer), "vocoder_input_dim": model.transformer.sound_dim}
    if sound:
        tensors[SOUND_TOKENIZER] = _placed(sound_weights(tokenizer, tokenizer["vocoder_input_dim"]))
    words = FILLING * (NEGATIVE_PROMPT_BYTES // len(FILLING))
    return replace(
        toy,
        transformer=transformer,
        vae=vae,
        sampler=sampler,
        negative_prompt=None if model.repo is None or sigmas is not None else words,
        sound_tokenizer=tokenizer if sound else None,
        tensors=tensors,
    )


def folder_of(model: ModelConfig, *, sound: bool = False) -> Path | None:
    """The folder of the checkpoint that `model` names. None if a file that a run reads is not on this machine."""
    if model.path is None:
        return None
    return local_folder(model.path, model.commit or model.revision, components=components_for(sound=sound))


def _unread(tensors: Iterable[Placed]) -> tuple[Placed, ...]:
    """The same tensors without their files, so that no file is opened."""
    return tuple(replace(one, stored=replace(one.stored, file=Path(NO_FILE))) for one in tensors)


def _placed(weights: Iterable[Weight]) -> tuple[Placed, ...]:
    return tuple(
        Placed(weight, StoredTensor(weight.name, "F32", weight.shape, Path(NO_FILE), 0, 4 * weight.elements))
        for weight in weights
        if weight.part is not Part.NOTHING
    )
