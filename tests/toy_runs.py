"""The checkpoint of conf/model/toy_random.yaml, and runs of the stages on it without a config or a launcher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, UniPCMultistepScheduler
from omegaconf import OmegaConf
from torch import Tensor, nn

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.schema import Keep, TaskConfig
from cosmos3_pipeline.models.loading import Components
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.stages.context import RunContext

CONF = Path(__file__).parents[1] / "conf"
PROMPT = "A red kite turns in the wind above a rocky coast."


def toy_dimensions() -> dict[str, dict[str, Any]]:
    """`transformer`, `vae` and `sound_tokenizer` of model=toy_random."""
    files = [OmegaConf.load(CONF / "model" / f"{name}.yaml") for name in ("nano", "toy_random")]
    model = OmegaConf.to_container(OmegaConf.merge(*files))
    assert isinstance(model, dict)
    return {name: model[name] for name in ("transformer", "vae", "sound_tokenizer")}


class StreamingVae(nn.Module):
    """diffusers' VAE with the one method that the decode stage calls, one chunk per latent frame."""

    def __init__(self, autoencoder: AutoencoderKLWan) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.encoded_frames: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "autoencoder" else getattr(self.autoencoder, name)

    def encode(self, x: Tensor) -> Any:
        self.encoded_frames.append(x.shape[2])
        return self.autoencoder.encode(x)

    def decode_stream(self, z: Tensor, *, pixels: str = "uint8") -> Iterator[Tensor]:
        picture = self.autoencoder.decode(z).sample
        portions = [1] + [4] * (z.shape[2] - 1)
        if pixels == "float":
            yield from picture[0].split(portions, dim=1)
            return
        frames = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)[0].permute(1, 2, 3, 0)
        yield from frames.split(portions)


def task_config(**changes: Any) -> TaskConfig:
    """The task t2v with the checkpoint's own words, no condition, and `changes`.

    A key that a task option adds has its value of conf/task/t2v.yaml, so tests of stages need not name it.
    """
    nothing: dict[str, Any] = {"negative_prompt": None, "system_prompt": None, "image": None, "last_image": None}
    nothing |= {"prompt_file": None, "video": None}
    nothing |= {"condition_latent_frames": [], "condition_keep": Keep.first}
    nothing |= {"background": [255, 255, 255], "resample": False}
    return replace(_default_task(), **{**nothing, **changes})


@cache
def _default_task() -> TaskConfig:
    return compose(["model=toy_random"]).task


def components(checkpoint: CheckpointInfo, **changes: Any) -> Components:
    settings: dict[str, Any] = {
        "dtype": torch.float32,
        "vae_dtype": torch.float32,
        "device": torch.device("cpu"),
        "flow_shift": 10.0,
        "wrap_vae": StreamingVae,
    }
    return Components(checkpoint, **{**settings, **changes})


def clip_of(height: int, width: int, num_frames: int) -> Clip:
    return Clip(height=height, width=width, num_frames=num_frames, spatial=16, temporal=4, patch=2)


def context_of(parts: Components, clip: Clip, directory: Path, **settings: Any) -> RunContext:
    return RunContext(components=parts, clip=clip, fps=24.0, directory=directory, **settings)


def reference_pipeline(folder: Path, *, dtype: torch.dtype = torch.float32) -> Cosmos3OmniPipeline:
    """diffusers' own pipeline on the same folder, with the sampler of the recommended call."""
    pipeline = Cosmos3OmniPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, flow_shift=10.0, use_karras_sigmas=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
