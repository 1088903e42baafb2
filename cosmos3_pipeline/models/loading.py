"""Loading a checkpoint's components, each when it is first needed and no more of it than is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer, UniPCMultistepScheduler
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3 import Cosmos3OmniBlocks
from diffusers.modular_pipelines.cosmos.modular_pipeline import Cosmos3OmniModularPipeline
from diffusers.utils.logging import disable_progress_bar
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from cosmos3_pipeline.checkpoint.hub import fetch_checkpoint, is_hub_id
from cosmos3_pipeline.plan.checkpoint import CheckpointInfo, inspect_checkpoint

ENCODER_HALF = ("encoder", "quant_conv")
PIPELINE_SETTINGS = ("default_use_system_prompt", "use_native_flow_schedule")


def open_checkpoint(
    path: str | None, *, transformer: Mapping[str, Any], vae: Mapping[str, Any], revision: str | None = None
) -> CheckpointInfo:
    """The checkpoint at `path`: a folder, or the hub id of one; without a path the toy model of these dimensions.

    `revision` is of a hub id: ranks give the commit that was fetched before they started, which needs no request.

    Raises:
        Refusal: there is none, or it is not a whole Cosmos3 checkpoint.
    """
    if path is None:
        from cosmos3_pipeline.models.toy import toy_checkpoint

        return inspect_checkpoint(toy_checkpoint(transformer=transformer, vae=vae))
    return inspect_checkpoint(fetch_checkpoint(path, revision).folder if is_hub_id(path) else path)


class Components:
    """The components of one checkpoint, held by a diffusers `Cosmos3OmniModularPipeline` as they are loaded.

    `pipeline` is what diffusers' Cosmos3 blocks take. Its safety checker is switched off: it downloads models
    of its own, and none of this library's settings asks for it.

    `dtype` is the transformer's, `vae_dtype` the VAE's; for `flow_shift` see `load_scheduler`. `wrap_vae` turns
    the loaded autoencoder into what the pipeline holds as its VAE, once per load; without `vae_weights` it is
    given one on the meta device, and reads from `checkpoint` what it needs.
    """

    def __init__(
        self,
        checkpoint: CheckpointInfo,
        *,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        device: torch.device,
        flow_shift: float | None,
        wrap_vae: Callable[[AutoencoderKLWan], Any],
        vae_weights: bool = True,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self._dtype = dtype
        self._vae_dtype = vae_dtype
        self._flow_shift = flow_shift
        self._wrap_vae = wrap_vae
        self._vae_weights = vae_weights
        self._vae_has_encoder = False
        disable_progress_bar()  # the run has a display of its own, and every rank would show diffusers' bars
        self.pipeline = _DevicePipeline(device)
        settings = {key: checkpoint.index[key] for key in PIPELINE_SETTINGS if key in checkpoint.index}
        self.pipeline.update_components(**settings)
        self.pipeline.disable_safety_checker()

    def tokenizer(self) -> Any:
        """The text tokenizer."""
        return self._once("text_tokenizer", partial(load_tokenizer, self.checkpoint.folder))

    def transformer(self) -> Cosmos3OmniTransformer:
        """The transformer on the run's device."""
        load = partial(load_transformer, self.checkpoint.folder, dtype=self._dtype, device=self.device)
        return self._once("transformer", load)

    def scheduler(self) -> UniPCMultistepScheduler:
        """The sampler, with the run's flow shift."""
        load = partial(load_scheduler, self.checkpoint.folder, flow_shift=self._flow_shift)
        return self._once("scheduler", load)

    def vae(self, *, encoder: bool) -> Any:
        """The VAE; its encoder's weights are read only once something asks for the encoder."""
        if self.pipeline.vae is None or (encoder and not self._vae_has_encoder):
            if self._vae_weights:
                autoencoder = load_vae(self.checkpoint, dtype=self._vae_dtype, device=self.device, encoder=encoder)
            else:
                autoencoder = empty_vae(self.checkpoint, encoder=encoder)
            self.pipeline.update_components(vae=self._wrap_vae(autoencoder))
            self._vae_has_encoder = encoder
        return self.pipeline.vae

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if getattr(self.pipeline, name) is None:
            self.pipeline.update_components(**{name: load()})
        return getattr(self.pipeline, name)


class _DevicePipeline(Cosmos3OmniModularPipeline):  # type: ignore[misc] # diffusers is untyped
    """Knows its device before a model is loaded, where diffusers would look at the first one that is."""

    def __init__(self, device: torch.device) -> None:
        self._run_device = device
        super().__init__(blocks=Cosmos3OmniBlocks())

    @property
    def _execution_device(self) -> torch.device:
        return self._run_device


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the checkpoint in `folder`."""
    return AutoTokenizer.from_pretrained(str(folder / "text_tokenizer"))


def load_transformer(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Cosmos3OmniTransformer:
    """The transformer in `dtype`, but for what diffusers keeps in fp32 (`_keep_in_fp32_modules`)."""
    model = Cosmos3OmniTransformer.from_pretrained(str(folder), subfolder="transformer", dtype=dtype)
    return model.to(device).requires_grad_(False)


def load_scheduler(folder: Path, *, flow_shift: float | None) -> UniPCMultistepScheduler:
    """The checkpoint's sampler as shipped, or with `flow_shift` in place of the shipped schedule.

    A given shift also switches Karras sigmas off, as NVIDIA's recommended call does: the Cosmos3 base
    checkpoints ship with Karras sigmas, which know no shift. Source: diffusers' page on Cosmos3.
    """
    scheduler = UniPCMultistepScheduler.from_pretrained(str(folder), subfolder="scheduler")
    if flow_shift is None:
        return scheduler
    return UniPCMultistepScheduler.from_config(scheduler.config, flow_shift=flow_shift, use_karras_sigmas=False)


def empty_vae(checkpoint: CheckpointInfo, *, encoder: bool) -> AutoencoderKLWan:
    """The autoencoder on the meta device; without `encoder` its `encoder` and `quant_conv` are None."""
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(dict(checkpoint.vae))
    for name in () if encoder else ENCODER_HALF:
        setattr(model, name, None)
    return model.eval().requires_grad_(False)


def load_vae(
    checkpoint: CheckpointInfo, *, dtype: torch.dtype, device: torch.device, encoder: bool
) -> AutoencoderKLWan:
    """The autoencoder in `dtype`; without `encoder` its `encoder` and `quant_conv` are None and never read."""
    if encoder:
        model = AutoencoderKLWan.from_pretrained(str(checkpoint.folder), subfolder="vae", dtype=dtype)
        return model.to(device).requires_grad_(False)
    model = empty_vae(checkpoint, encoder=False)
    weights: dict[str, Tensor] = {}
    for file in checkpoint.weight_files["vae"]:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            wanted = (name for name in tensors.keys() if not name.startswith(ENCODER_HALF))  # noqa: SIM118 # no dict
            weights.update((name, tensors.get_tensor(name).to(dtype)) for name in wanted)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)
