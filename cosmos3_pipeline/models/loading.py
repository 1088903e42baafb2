"""Loads a checkpoint's components. Each is loaded when it is first needed, and only the needed part of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3 import Cosmos3OmniBlocks
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3_distilled import Cosmos3DistilledBlocks
from diffusers.modular_pipelines.cosmos.modular_pipeline import Cosmos3OmniModularPipeline
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from cosmos3_pipeline.checkpoint.hub import components_for, fetch_checkpoint, is_hub_id, local_folder
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo, inspect_checkpoint
from cosmos3_pipeline.checkpoint.lora import read_adapters
from cosmos3_pipeline.checkpoint.sampler import Sampler
from cosmos3_pipeline.checkpoint.weights import VISION_ALONE, Part
from cosmos3_pipeline.config.schema import LoraConfig
from cosmos3_pipeline.denoise.exchange import Exchange
from cosmos3_pipeline.denoise.texts import Prompt, TextEncoder, Texts
from cosmos3_pipeline.distributed import host
from cosmos3_pipeline.distributed.mesh import REPLICA, RankMesh
from cosmos3_pipeline.models.absent import without_weights
from cosmos3_pipeline.models.known import known_to
from cosmos3_pipeline.models.placement import PlacedTransformer
from cosmos3_pipeline.models.reading import read_tensors
from cosmos3_pipeline.models.sound import load_sound_tokenizer
from cosmos3_pipeline.models.tokenizer import load_tokenizer
from cosmos3_pipeline.planning.weights import RESIDENT, WeightsPlan


def open_checkpoint(
    path: str | None,
    *,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    sound_tokenizer: Mapping[str, Any],
    revision: str | None = None,
    lora: Sequence[LoraConfig] = (),
    sound: bool = False,
) -> CheckpointInfo:
    """The checkpoint at `path`: a folder or a hub id. Without a path it is the toy model of these dimensions.

    `sound` says that the checkpoint has to make sound.

    `revision` is for a hub id. Ranks pass the commit that was fetched before they started, so that they send no
    request. The adapters `lora` are added to the transformer's weights when they are read.

    Raises:
        Refusal: there is no checkpoint, it is not a whole Cosmos3 checkpoint, or an adapter does not fit it.
    """
    folder: Path | None
    if path is None:
        from cosmos3_pipeline.models.toy import toy_checkpoint

        folder = toy_checkpoint(transformer=transformer, vae=vae, sound_tokenizer=sound_tokenizer)
    elif is_hub_id(path):
        folder = fetch_checkpoint(path, revision, components=components_for(sound=sound)).folder
    else:
        folder = local_folder(path, revision)
    return inspect_checkpoint(folder or str(path), sound=sound).with_adapters(read_adapters(lora))


GB = 10**9
ALONE = RankMesh()
LONG_LOAD_BYTES = 2 * GB
# Shows the progress of a block of work. It takes a name and the number of units, and gives a function to call with
# the number of new units.
Track = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def _untracked(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda units: None)


@dataclass
class Load:
    """Measurements of loading one component on this rank.

    kept_bytes: bytes that stay on the device. host_peak_bytes: the largest growth of the process's host memory
    while loading. On a CPU it includes the kept bytes.
    """

    seconds: float = 0.0
    kept_bytes: int = 0
    host_peak_bytes: int = 0


class Components:
    """The components of one checkpoint. A diffusers `Cosmos3OmniModularPipeline` holds those that are loaded.

    diffusers' Cosmos3 blocks take `pipeline`. Its safety checker is off, because it downloads further models, and
    no setting of this library asks for it.

    `dtype` is for the transformer, `vae_dtype` for the VAE and the sound tokenizer. For `flow_shift` see
    `load_scheduler`. `wrap_vae` turns the loaded autoencoder into the VAE of the pipeline, once per load. With a
    `vae_source` the autoencoder is on the meta device, and the VAE reads the weights that it needs from the
    source. `track` shows the progress of a long load, and `loads` has the measurements of each load. `weights`
    says where the transformer's weights are, `mesh` which ranks share them, and `modalities` what the transformer
    denoises.
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
        vae_source: CheckpointVae | None = None,
        weights: WeightsPlan = RESIDENT,
        modalities: Collection[str] = VISION_ALONE,
        mesh: RankMesh = ALONE,
        track: Track = _untracked,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self._dtype = dtype
        self._vae_dtype = vae_dtype
        self._flow_shift = flow_shift
        self._wrap_vae = wrap_vae
        self._vae_source = vae_source
        self._vae_has_encoder = False
        self._track = track
        self._count: Callable[[int], None] | None = None
        self._weights = weights
        self._modalities = modalities
        self._mesh = mesh
        self._transformer: PlacedTransformer | None = None
        self.texts = Texts(device)
        self.loads: dict[str, Load] = {}
        disable_progress_bar()  # the run has its own bars, and every rank would show diffusers' bars
        self.pipeline = _DevicePipeline(device, checkpoint.sampler)
        self.pipeline.update_components(default_use_system_prompt=checkpoint.index["default_use_system_prompt"])
        self.pipeline.disable_safety_checker()

    def tokenizer(self) -> Any:
        """The text tokenizer."""
        return self._once("text_tokenizer", partial(load_tokenizer, self.checkpoint))

    def transformer(self) -> PlacedTransformer:
        """The transformer. Its weights are loaded while a pathway is computed, or by `load_vision`."""
        if self._transformer is None:
            self._transformer = PlacedTransformer(
                self.checkpoint,
                self._weights,
                dtype=self._dtype,
                device=self.device,
                comm=self._mesh.comm(REPLICA),
                advance=self._advance,
                modalities=self._modalities,
            )
            self.pipeline.update_components(transformer=self._transformer.model)
        return self._transformer

    def encode_texts(self, prompts: Sequence[Prompt], *, wait: bool = False) -> None:
        """Encode those of `prompts` that `texts` does not have yet; see `Texts.encode`."""
        if not self.texts.lacks(prompts) and not wait:
            return
        placed = self.transformer()
        with self._measured("text") as load, self._progress("GB of text weights", placed.text_read_bytes):
            encoder = TextEncoder(placed.model, sequence=Exchange.over_sequence(self._mesh), layers=placed)
            self.texts.encode(encoder, prompts, wait=wait)
            load.kept_bytes = placed.here_bytes[Part.TEXT]

    def load_vision(self) -> None:
        """Load the weights that stay in memory while denoising, unless they are loaded."""
        placed = self.transformer()
        if placed.here_bytes[Part.VISION]:
            return
        with self._measured("transformer") as load, self._progress("GB of weights", placed.vision_read_bytes):
            placed.load_vision()
            load.kept_bytes = placed.kept_bytes

    def scheduler(self) -> UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler:
        """The sampler, with the run's flow shift."""
        load = partial(load_scheduler, self.checkpoint.sampler, flow_shift=self._flow_shift)
        return self._once("scheduler", load)

    def vae(self, *, encoder: bool) -> Any:
        """The VAE. Its encoder's weights are read only when a caller first asks for the encoder."""
        if self.pipeline.vae is None or (encoder and not self._vae_has_encoder):
            with self._measured("vae") as load:
                if self._vae_source is None:
                    autoencoder = load_vae(
                        self.checkpoint, dtype=self._vae_dtype, device=self.device, encoder=encoder
                    )
                    load.kept_bytes = sum(parameter.nbytes for parameter in autoencoder.parameters())
                else:
                    autoencoder = empty_vae(self.checkpoint, encoder=encoder)
                self.pipeline.update_components(vae=self._wrap_vae(autoencoder))
                if self._vae_source is not None:
                    load.kept_bytes = self._vae_source.read_bytes
            self._vae_has_encoder = encoder
        return self.pipeline.vae

    @contextmanager
    def sound_tokenizer(self) -> Iterator[None]:
        """The sound tokenizer is on the device while the block runs, and is removed at its end."""
        with self._measured("sound_tokenizer") as load:
            model = load_sound_tokenizer(self.checkpoint, dtype=self._vae_dtype, device=self.device)
            load.kept_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.pipeline.update_components(sound_tokenizer=model)
        del model
        try:
            yield
        finally:
            self.pipeline.update_components(sound_tokenizer=None)

    @contextmanager
    def _measured(self, name: str) -> Iterator[Load]:
        """Enters `name` into `loads`, with the time of the block and its peak of host memory."""
        load = self.loads[name] = Load()
        started, before = time.perf_counter(), host.resident_bytes()
        host.reset_peak()
        yield load
        load.host_peak_bytes = max(host.peak_bytes() - before, 0)
        load.seconds = time.perf_counter() - started

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[None]:
        """Shows a bar that counts the GB read, if the load is so large that a person waits."""
        if total < LONG_LOAD_BYTES:
            yield
            return
        done = 0
        with self._track(what, total // GB) as advance:

            def count(nbytes: int) -> None:
                nonlocal done
                before, done = done, done + nbytes
                if more := done // GB - before // GB:
                    advance(more)

            self._count = count
            try:
                yield
            finally:
                self._count = None

    def _advance(self, nbytes: int) -> None:
        if self._count is not None:
            self._count(nbytes)

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if getattr(self.pipeline, name) is None:
            self.pipeline.update_components(**{name: load()})
        return getattr(self.pipeline, name)


class _DevicePipeline(Cosmos3OmniModularPipeline):  # type: ignore[misc] # diffusers is untyped
    """Knows its device before a model is loaded. diffusers takes the device of the first loaded model instead.

    It is built with the blocks for the sampler, because they decide which settings of the sampler it has.
    """

    def __init__(self, device: torch.device, sampler: Sampler) -> None:
        self._run_device = device
        if sampler.distilled_sigmas is None:
            super().__init__(blocks=Cosmos3OmniBlocks())
            self.update_components(use_native_flow_schedule=sampler.native_grid)
        else:
            super().__init__(blocks=Cosmos3DistilledBlocks())
            self.update_components(is_distilled=True, distilled_sigmas=list(sampler.distilled_sigmas))

    @property
    def _execution_device(self) -> torch.device:
        return self._run_device


def load_scheduler(
    sampler: Sampler, *, flow_shift: float | None
) -> UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler:
    """The checkpoint's sampler with the schedule of `flow_shift`, see `Sampler.settings_for`.

    If the installed diffusers has no such class, UniPC takes its place: `Sampler.native_grid` gives the same
    sigmas.
    """
    cls = getattr(diffusers, sampler.class_name, UniPCMultistepScheduler)
    return cls.from_config(known_to(cls, sampler.settings_for(flow_shift)))


def empty_vae(checkpoint: CheckpointInfo, *, encoder: bool) -> AutoencoderKLWan:
    """The autoencoder on the meta device. Without `encoder`, its `encoder` and `quant_conv` are None."""
    with without_weights():
        model = AutoencoderKLWan.from_config(known_to(AutoencoderKLWan, checkpoint.vae))
    for name in () if encoder else ("encoder", "quant_conv"):
        setattr(model, name, None)
    return model.eval().requires_grad_(False)


def load_vae(
    checkpoint: CheckpointInfo, *, dtype: torch.dtype, device: torch.device, encoder: bool
) -> AutoencoderKLWan:
    """The autoencoder in `dtype`. Without `encoder`, its `encoder` and `quant_conv` are None and never read.

    Raises:
        Fault: see `read_tensors`.
    """
    model = empty_vae(checkpoint, encoder=encoder)
    parts = (Part.ENCODER, Part.DECODER) if encoder else (Part.DECODER,)
    model.load_state_dict(read_tensors(checkpoint.parts("vae", parts), dtype=dtype, device=device), assign=True)
    return model.requires_grad_(False)


class CheckpointVae:
    """The VAE of a checkpoint as a `WeightSource`: a rank reads only the weights of its share."""

    def __init__(self, checkpoint: CheckpointInfo) -> None:
        self._tensors = {placed.weight.name: placed for placed in checkpoint.tensors["vae"]}
        self.read_bytes = 0  # in memory, in the dtype that was asked for

    def load(self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Read the named tensors. Raises Fault, see `read_tensors`."""
        found = read_tensors((self._tensors[name] for name in names), dtype=dtype, device=device)
        self.read_bytes += sum(tensor.nbytes for tensor in found.values())
        return found
