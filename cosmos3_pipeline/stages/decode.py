"""Latents to frames, chunk by chunk. A decoded chunk is exported at once, so no rank holds the whole video."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cosmos3_pipeline.stages.context import RunContext

_END = object()


class DecodeStage:
    """Leaves `context.frames`, an iterator of uint8 chunks [frames, H, W, 3]. Reading the iterator decodes.

    Every rank must read its iterator to the end, because all ranks share the work; only the root gets chunks.
    """

    def __call__(self, context: RunContext) -> None:
        context.frames = self._decode(context)

    def _decode(self, context: RunContext) -> Iterator[Tensor]:
        with context.measure("decode"):
            vae = context.components.vae(encoder=False)
            chunks = iter(vae.decode_stream(vae_latents(context)))
        with context.reporter.track("decoded frames", context.clip.num_frames) as advance:
            while True:
                with context.measure("decode", portion=True), torch.no_grad():
                    chunk = next(chunks, _END)
                if not isinstance(chunk, Tensor):
                    return
                advance(len(chunk))
                yield chunk


def vae_latents(context: RunContext) -> Tensor:
    """The latents [1, C, T, h, w] in the VAE's own scale and dtype, as diffusers' decode block computes them."""
    pipeline = context.components.pipeline
    latents, dtype = context.state.get("latents"), pipeline.vae.dtype
    mean = pipeline._vae_latents_mean.to(device=latents.device, dtype=dtype)
    inv_std = pipeline._vae_latents_inv_std.to(device=latents.device, dtype=dtype)
    # In place, because these tensors may be larger than all that a rank holds to decode.
    z: Tensor = latents.to(dtype, copy=True)
    return z.div_(inv_std.view(1, -1, 1, 1, 1)).add_(mean.view(1, -1, 1, 1, 1))
