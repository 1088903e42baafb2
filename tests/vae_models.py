"""Random `AutoencoderKLWan` models whose pictures are lively: neither flat nor clamped."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan

WAN22: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 6,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}
WAN21: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}


def vae_config(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`base` with changes, and latents_mean and latents_std of its width."""
    config = {**base, **changes}
    return {**config, "latents_mean": [0.0] * config["z_dim"], "latents_std": [1.0] * config["z_dim"]}


def make_vae(config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """A random VAE whose decoder maps unit-variance latents to pictures with a standard deviation near 0.35.

    Norm gains and biases are random too, so that a bias or a gain that is dropped or misplaced shows.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**config).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        if name.endswith("gamma"):
            p.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            p.uniform_(-0.2, 0.2)
        else:
            fan_in = p[0].numel()
            p.normal_(0, (1.5 / fan_in) ** 0.5)
    with torch.no_grad():
        z = torch.randn(1, config["z_dim"], 2, 4, 4)
        out = _unclamped(vae, z)
        vae.decoder.conv_out.weight.mul_(0.35 / out.std())
        vae.decoder.conv_out.bias.mul_(0.1)
    return vae.to(dtype)


def _unclamped(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    vae.clear_cache()
    frames = []
    for i, frame in enumerate(vae.post_quant_conv(z).split(1, dim=2)):
        vae._conv_idx = [0]
        frames.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return torch.cat(frames, dim=2)
