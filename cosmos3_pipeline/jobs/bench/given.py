"""What the contestants of a case are given: random latents, a random picture, or a photograph in a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cosmos3_pipeline.jobs.bench.suite import Case
from cosmos3_pipeline.vae.program import Program

SEED = 0
WARM_UP_CHUNKS = 3  # the first, one in the middle and the last
PHOTOGRAPH = "photograph.png"


@dataclass(frozen=True)
class Given:
    """`tensor`: latents [1, C, T, h, w] or a picture [1, 3, F, H, W] in [-1, 1].

    `photograph`: a file with the picture's first frame, where a condition is made of it.
    """

    tensor: Tensor
    chunk: int
    photograph: Path

    def short(self) -> Given:
        """So many chunks of it as warm up most kernels, where nothing is timed."""
        return replace(self, tensor=self.tensor[:, :, : 1 + (WARM_UP_CHUNKS - 1) * self.chunk].contiguous())


def given_for(case: Case, program: Program, folder: Path, device: torch.device) -> Given:
    """The same on every rank: from a fixed seed, drawn in float32 and rounded to the case's dtype."""
    s, generator = case.shape, torch.Generator().manual_seed(SEED)
    path = folder / PHOTOGRAPH
    dtype = getattr(torch, case.dtype)
    if case.direction == "decode":
        latents = torch.randn(1, program.z_dim, s.frames, s.rows, s.cols, generator=generator)
        return Given(latents.to(device, dtype), 1, path)
    size = (program.picture_frames(s.frames), s.rows * program.spatial, s.cols * program.spatial)
    if case.call == "condition":
        pixels = torch.randint(0, 256, (*size[1:], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
        # Only its size counts: what is encoded is the photograph, repeated.
        return Given(torch.empty(1, 3, *size, device="meta"), program.temporal, path)
    picture = torch.rand(1, 3, *size, generator=generator) * 2 - 1
    return Given(picture.to(device, dtype), program.temporal, path)
