"""Compares denoising steps of the whole transformer at Nano's sizes with diffusers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.distributed.mesh import RankMesh
from on_gpu.drawn import drawn_transformer, latents_by
from on_gpu.found import Found
from on_gpu.rounds import DIFFUSERS, Way, write
from on_gpu.setting import Setting, is_root, on_rank, seconds_of
from on_gpu.vaes import model_config

STEPS = 2
SMALL_CLIP, CLIP = (96, 160, 17), (720, 1280, 61)  # height, width (pixels), frames


def denoise(setting: Setting) -> None:
    """Measure denoising steps of the whole transformer."""
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
