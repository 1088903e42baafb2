"""The toy's VAE: diffusers' `AutoencoderKLWan`, narrow, trained on images first and then on clips."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
from scenes import draw_scene, render
from torch import Tensor

from cosmos3_pipeline.jobs.verify.distance import PICTURE_RANGE
from cosmos3_pipeline.stages.likeness import psnr_db
from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_plugins.replicated import Replicated

DIMENSIONS = {
    "base_dim": 16,
    "decoder_base_dim": 16,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}
CROP = 64
CANVASES = ((64, 64), (96, 96), (96, 160))
UNSEEN = 10**9  # seeds from here on are only for measuring
LATENT_NOISE = 0.05  # share of the latents' standard deviation; with it, similar latents give similar pixels


def make_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**DIMENSIONS)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            # A block adds little at first, so that activations do not explode over many blocks.
            if name.endswith("conv2.weight"):
                parameter.mul_(0.2)
    return vae


def trained_vae(out: Path) -> tuple[AutoencoderKLWan, ParallelVAE]:
    """The VAE that was trained in `out`, and the same as a ParallelVAE, which takes a third of the time."""
    vae = make_vae().eval().requires_grad_(False)
    further = out / "decoder.pt"
    vae.load_state_dict(torch.load(further if further.exists() else out / "vae.pt"))
    return vae, ParallelVAE(vae, encode=Replicated(), decode=Replicated())


def crops(seed: int, count: int, frames: int) -> Tensor:
    """Crops of scenes, [count, 3, frames, CROP, CROP], from pictures of all sizes that the pipeline makes."""
    rng = random.Random(seed)
    clips = []
    for _ in range(count):
        height, width = rng.choice(CANVASES)
        top, left = rng.randint(0, height - CROP), rng.randint(0, width - CROP)
        # A crop of a few frames is a part of a longer clip, so that shapes move at the speed of that clip.
        long = render(draw_scene(rng.getrandbits(40)), 17, height, width) if frames > 1 else None
        if long is None:
            scene = render(draw_scene(rng.getrandbits(40)), 1, height, width)
        else:
            first = rng.randint(0, 17 - frames)
            scene = long[:, first : first + frames]
        clips.append(scene[:, :, top : top + CROP, left : left + CROP])
    return torch.stack(clips)


@contextmanager
def single_frames_as_2d() -> Iterator[None]:
    """Run causal convolutions of a single frame as 2D convolutions with the last temporal tap.

    Without frames before it the other taps see zeros. A 2D convolution takes a third of the time.
    """
    whole = autoencoder_kl_wan.WanCausalConv3d.forward

    def forward(self: autoencoder_kl_wan.WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] == 1 and cache_x is None and self.stride[0] == 1:
            columns, _, rows, *_ = self._padding
            y = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=(rows, columns))
            return y.unsqueeze(2)
        result: Tensor = whole(self, x, cache_x)
        return result

    autoencoder_kl_wan.WanCausalConv3d.forward = forward
    try:
        yield
    finally:
        autoencoder_kl_wan.WanCausalConv3d.forward = whole


# For each phase: its first step, its share of the full rate, and its batches (clips, frames), which are taken in
# turn. Muon's updates are equally large if a gradient is mostly noise, so small batches get a lower rate.
PHASES = (
    (0, 1.0, ((16, 1),)),
    (2000, 0.5, ((16, 1), (4, 9), (8, 5))),
)
STEPS = 4750  # fewer than RATE_STEPS, the schedule of the rate: latents need no better encoder
RATE_STEPS = 6500
# Afterwards only the decoder is trained, so that the latents for the transformer do not change.
DECODER_STEPS = 4000
DECODER_BATCHES = ((4, 9), (16, 1), (8, 5), (4, 9))


def phase_of(step: int) -> tuple[int, float, tuple[tuple[int, int], ...]]:
    return next(phase for phase in reversed(PHASES) if step >= phase[0])


def training_batch(step: int) -> Tensor:
    """The batch of step number `step`."""
    batches = phase_of(step)[2]
    clips, frames = batches[step % len(batches)]
    return crops(step, clips, frames)


def decoder_batch(step: int) -> Tensor:
    """The batch of step number `step` of the decoder's training."""
    clips, frames = DECODER_BATCHES[step % len(DECODER_BATCHES)]
    return crops(10**8 + step, clips, frames)


def loss_of(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """The squared error of the decoded clips. A little noise on the latents works better than a KL term."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(vae.quant_conv.weight.requires_grad):
            latents = vae.encode(clips).latent_dist.mean.float()
        noise = LATENT_NOISE * latents.detach().std() * torch.randn_like(latents)
        shown = vae.decode(latents + noise).sample.float()
    return F.mse_loss(shown, clips) + 1e-5 * latents.square().mean()


@torch.no_grad()
def measure(vae: AutoencoderKLWan) -> dict[str, float]:
    """PSNR in dB on images and clips that training does not draw."""
    seen = {}
    for name, clips in (("images", crops(UNSEEN, 32, 1)), ("clips", crops(UNSEEN + 1, 6, 9))):
        made = vae.decode(vae.encode(clips).latent_dist.mode()).sample
        seen[name] = psnr_db(PICTURE_RANGE, F.mse_loss(made, clips).item())
    return seen
