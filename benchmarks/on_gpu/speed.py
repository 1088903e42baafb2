"""Decoding, encoding and denoising beside diffusers at Nano's sizes: interleaved, medians, ratios in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from roofline import Roofline
from torch import Tensor

from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.jobs.verify.distance import Distance
from cosmos3_pipeline.plugin_api import LatentShape, discover
from on_gpu.drawn import drawn_transformer, latents_by, model_config, vae_dimensions
from on_gpu.exact import Clip, Vaes, in_words, result_of
from on_gpu.found import Found
from on_gpu.setting import Setting, free, is_root, on_rank, peak_of, seconds_of

DIFFUSERS = "diffusers"
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
SHARED_OUT = ("layer_pipeline", "spatial_shard", "pipeline_of_shards")
STEPS = 2
SMALL_CLIP, CLIP = (96, 160, 17), (720, 1280, 61)  # height, width (pixels), frames


@dataclass(frozen=True)
class Way:
    """How to do a piece of work once; `together` by all ranks, otherwise by the root while the others wait."""

    run: Callable[[], Tensor]
    together: bool = False


def rounds(ways: Mapping[str, Way], device: torch.device, *, seconds: float) -> dict[str, list[float]]:
    """Seconds of each way in every round, after a first one to warm up.

    The order rotates, and is backwards every other round, so that none always runs after the same other one. There
    are LEAST_ROUNDS, or as many as fit into `seconds`.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    names, began, count, index = list(ways), time.perf_counter(), LEAST_ROUNDS, -1
    while index < count:
        start = index % len(names)
        for name in [*names[start:], *names[:start]][:: -1 if index % 2 else 1]:
            took = once(ways[name], device)
            if index >= 0:
                found[name].append(took)
        if index == 0:
            fitting = int(seconds / (time.perf_counter() - began))
            count = the_roots(max(LEAST_ROUNDS, min(MOST_ROUNDS, fitting)))
        began = time.perf_counter() if index < 0 else began
        index += 1
    return found


def once(way: Way, device: torch.device) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    took = seconds_of(way.run, device) if way.together or is_root() else 0.0
    slowest = torch.tensor(took)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def the_roots(value: int) -> int:
    """What the root has counted, on every rank."""
    shared = torch.tensor(value)
    dist.broadcast(shared, 0)
    return int(shared)


def spread(values: Sequence[float], digits: int) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def write(
    found: Found, title: str, ways: Mapping[str, Way], device: torch.device, *, seconds: float
) -> dict[str, list[float]]:
    """Run the rounds, and on the root a row for each way: seconds, ratio, memory, and how far from diffusers."""
    measured = rounds(ways, device, seconds=seconds)
    reference: Tensor | None = None
    for name, way in ways.items():
        made: list[Tensor] = []
        peak = 0
        if way.together or is_root():
            peak = peak_of(lambda way=way, made=made: made.append(way.run()), device)  # type: ignore[misc]
        reference = made[0] if name == DIFFUSERS and made else reference
        if is_root() and reference is not None:
            distance = Distance(float(reference.max() - reference.min()))
            distance.add(reference, made[0])
            ratios = [theirs / own for theirs, own in zip(measured[DIFFUSERS], measured[name], strict=True)]
            found.row(
                f"{title}, {len(measured[name])} rounds",
                way=name,
                seconds=spread(measured[name], 3),
                **{"times as fast as diffusers": spread(ratios, 2)},
                **{"peak beyond weights": f"{peak / 1e9:.2f} GB"},
                **{"from diffusers": in_words(distance)},
            )
        made.clear()
        free(device)
        dist.barrier()
    return measured


# ------------------------------------------------------------------------------------------------------------- VAE
def vae_clips(*, small: bool) -> list[Clip]:
    """The most important first: 720p, in float32 a quarter of it."""
    if small:
        return [Clip("decode", torch.float32, 3, 4, 4), Clip("encode", torch.float32, 2, 4, 4)]
    return [
        Clip("decode", torch.bfloat16, 8, 45, 80),
        Clip("encode", torch.bfloat16, 5, 45, 80),
        Clip("decode", torch.float32, 3, 22, 40),
    ]


def decode(setting: Setting) -> None:
    """Both directions."""
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
    """diffusers, one rank, and with several ranks what shares a clip out."""
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
    """How far one rank is from its convolutions, each shape at its best time in the library, and nothing else."""
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


# ----------------------------------------------------------------------------------------------------- transformer
def denoise(setting: Setting) -> None:
    """Denoising steps of the whole transformer."""
    found = Found(setting.file)
    with on_rank(setting) as device:
        model, ranks = model_config(setting.model), dist.get_world_size()
        clip = SMALL_CLIP if setting.small else CLIP
        drawn: list[Any] = []
        took = seconds_of(
            lambda: drawn.append(drawn_transformer(model, device, getattr(torch, model.dtype.value))), device
        )
        transformer = drawn[0]
        if is_root():
            elements = sum(parameter.numel() for parameter in transformer.parameters())
            found.note(f"{elements / 1e9:.2f}B weights drawn in {took:.1f} s")
        ways = {
            DIFFUSERS: Way(lambda: latents_by(None, transformer, clip, steps=STEPS)),
            "one rank": Way(lambda: latents_by(ParallelLoopDenoiser(), transformer, clip, steps=STEPS)),
        }
        if ranks > 1:
            mesh = RankMesh.build(cfg=2, ulysses=ranks // 2, device=device)
            ways[f"guidance over 2 x sequence over {ranks // 2}"] = Way(
                lambda: latents_by(ParallelLoopDenoiser(mesh), transformer, clip, steps=STEPS), together=True
            )
        height, width, frames = clip
        title = f"{STEPS} steps with guidance, {width} x {height}, {frames} frames, {model.dtype.value}"
        write(found, title, ways, device, seconds=0.0 if setting.small else 35.0)
