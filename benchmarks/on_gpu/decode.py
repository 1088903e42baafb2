"""Compares decoding and encoding at Nano's sizes with diffusers, and with the convolutions alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist
from roofline import Roofline
from torch import Tensor

from cosmos3_pipeline.plugin_api import LatentShape, discover
from on_gpu.found import Found
from on_gpu.rounds import DIFFUSERS, Way, write
from on_gpu.setting import Setting, free, is_root, on_rank
from on_gpu.vaes import Clip, Vaes, result_of, vae_dimensions

SHARED_OUT = ("layer_pipeline", "spatial_shard", "pipeline_of_shards")


def vae_clips(*, small: bool) -> list[Clip]:
    """The clips, the most important first: 720p, and in float32 a quarter of it."""
    if small:
        return [Clip("decode", torch.float32, 3, 4, 4), Clip("encode", torch.float32, 2, 4, 4)]
    return [
        Clip("decode", torch.bfloat16, 8, 45, 80),
        Clip("encode", torch.bfloat16, 5, 45, 80),
        Clip("decode", torch.float32, 3, 22, 40),
    ]


def decode(setting: Setting) -> None:
    """Measure both directions."""
    found = Found(setting.file)
    with on_rank(setting) as device:
        vaes = Vaes(vae_dimensions(setting.model), device)
        for clip in vae_clips(small=setting.small):
            given = vaes.given(clip).to(clip.dtype)
            ways = vae_ways(vaes, clip, given)
            measured = write(found, clip.name, ways, device, seconds=0.0 if setting.small else 12.0)
            if is_root():
                convolutions_alone(found, vaes, clip, measured["one rank"])
            free(device)
            dist.barrier()


def vae_ways(vaes: Vaes, clip: Clip, given: Tensor) -> dict[str, Way]:
    """The ways: diffusers, one rank, and with several ranks the strategies that share a clip."""
    theirs, alone = vaes.models[clip.dtype], vaes.alone(clip.dtype)
    ways = {
        DIFFUSERS: Way(lambda: result_of(theirs, clip.direction, given)),
        "one rank": Way(lambda: result_of(alone, clip.direction, given)),
    }
    if dist.get_world_size() > 1:
        for name in SHARED_OUT:
            vae = vaes.together(clip, discover().strategies[name]())
            ways[f"{name}, {dist.get_world_size()} ranks"] = Way(
                lambda vae=vae: result_of(vae, clip.direction, given),  # type: ignore[misc]
                together=True,
            )
    return ways


def convolutions_alone(found: Found, vaes: Vaes, clip: Clip, own: Sequence[float]) -> None:
    """Compare one rank with its convolutions alone, each shape at the best time of the convolution library."""
    program = vaes.programs[clip.direction]
    line = Roofline(program, LatentShape(1, clip.frames, clip.rows, clip.cols), clip.dtype, vaes.device)
    line.measure()
    found.row(
        "convolutions alone",
        clip=clip.name,
        seconds=f"{line.seconds:.3f}",
        rate=f"{line.flops / line.seconds / 1e12:.1f} TFLOP/s",
        **{"part of one rank's time": f"{line.seconds / statistics.median(own):.0%}"},
    )
