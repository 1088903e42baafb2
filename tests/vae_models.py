"""Random `AutoencoderKLWan` models whose pictures are lively: neither flat nor clamped."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from cosmos3_pipeline.plugin_kit.cases import WAN21, WAN22
from cosmos3_pipeline.vae.program import decoder_program

__all__ = ["CONFIGS", "WAN21", "WAN22", "make_vae", "picture_of", "vae_config", "wan_video"]


def vae_config(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`base` with changes, and latents_mean and latents_std of its width."""
    config = {**base, **changes}
    return {**config, "latents_mean": [0.0] * config["z_dim"], "latents_std": [1.0] * config["z_dim"]}


CONFIGS = {
    "wan22": vae_config(WAN22),
    "wan22 patch 4": vae_config(WAN22, patch_size=4, in_channels=48, out_channels=48, num_res_blocks=2),
    "wan22 time first": vae_config(WAN22, temperal_downsample=[True, True, False], decoder_base_dim=12),
    "wan21": vae_config(WAN21),
    "wan21 attention": vae_config(WAN21, attn_scales=[0.5], temperal_downsample=[True, False, False]),
    "wan21 two levels": vae_config(WAN21, dim_mult=[1, 2], temperal_downsample=[True]),
}


def make_vae(config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """A random VAE whose decoder maps unit-variance latents to pictures with a standard deviation near 0.35.

    Norm gains and biases are random too, so that a bias or a gain that is dropped or misplaced shows.
    """
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKLWan(**config).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        if name.endswith("gamma"):
            p.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            p.uniform_(-0.2, 0.2, generator=generator)
        else:
            fan_in = p[0].numel()
            p.normal_(0, (1.5 / fan_in) ** 0.5, generator=generator)
    with torch.no_grad():
        z = torch.randn(1, config["z_dim"], 2, 4, 4, generator=generator)
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


def wan_video(vae: Any) -> torch.Tensor:
    """The video [1, F, 3, H, W] in [0, 1] of a tiny random `WanPipeline` with `vae`; the same for the same VAE."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    words = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    ).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=words,
        negative_prompt_embeds=-words,
        height=48,
        width=32,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames


def picture_of(
    vae: Any, *, frames: int = 9, rows: int = 3, cols: int = 2, batch: int = 1, seed: int = 0
) -> torch.Tensor:
    scale = decoder_program(vae.config).spatial
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, rows * scale, cols * scale, generator=generator) * 2 - 1
