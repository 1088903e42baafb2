"""Planned memory against what is alive while a slice runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vae_models import WAN21, WAN22, make_vae, vae_config

from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes
from cosmos3_pipeline.vae import ParallelVAE, kernels
from cosmos3_pipeline.vae.executor import Slice
from cosmos3_pipeline.vae.footprint import activation_bytes
from cosmos3_pipeline.vae.frames import HaloExchange
from cosmos3_pipeline.vae.kernels import arithmetic_dtype, norm_weight, rms_norm
from cosmos3_pipeline.vae.ops import Attention, LatentShape, Margins
from cosmos3_pipeline.vae.pixels import latent_chunk, picture_chunk
from cosmos3_pipeline.vae.program import decoder_program, encoder_program
from cosmos3_plugins.replicated import Replicated


def measured(
    part: Slice,
    chunks: list[list[list[torch.Tensor]]],
    weights: dict[str, torch.Tensor],
    exchange: HaloExchange | None = None,
) -> int:
    """Peak bytes of a slice that is given the portions of `chunks`, each some tensors."""
    known = [*weights.values(), *(tensor for chunk in chunks for tensors in chunk for tensor in tensors)]
    # The first pass reorders weights, which is not activation.
    for _ in range(2):
        state = part.state(len(chunks))
        with LiveBytes(known) as live:
            for chunk in chunks:
                given = ([tensor.clone() for tensor in tensors] for tensors in chunk)
                for _ in part.portions(given, state, exchange):
                    pass
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("base", [WAN22, WAN21], ids=["wan22", "wan21"])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_planned_activations_are_within_15_percent(
    base: dict[str, Any], direction: str, frames: int, dtype: torch.dtype
) -> None:
    config = vae_config(base, base_dim=32, decoder_base_dim=32)
    vae = make_vae(config, dtype=dtype)
    program = (decoder_program if direction == "decode" else encoder_program)(config)
    latent = LatentShape(1, frames, 12, 10, dtype.itemsize)
    weights = vae.state_dict()
    size = program.spatial
    z = torch.randn(1, config["z_dim"], frames, 12, 10).to(dtype)
    x = torch.rand(1, 3, 4 * frames - 3, 12 * size, 10 * size).to(dtype)
    inputs = [[[latent_chunk(z, i) if direction == "decode" else picture_chunk(x, i)]] for i in range(frames)]
    planned = activation_bytes(program, latent)
    peak = measured(Slice(program, 0, len(program), weights), inputs, weights)
    assert abs(planned / peak - 1) <= 0.15, (planned, peak)

    if arithmetic_dtype(dtype, torch.device("cpu")) != dtype:
        return  # what is made in bands of float32 is little beside the largest activations only
    for cut in {len(program) // 3, 2 * len(program) // 3, program.portions_from} - {len(program)}:
        crossing = [
            [
                [torch.randn(shape).to(dtype) for shape in program.carried_shapes(cut, latent, first=i == 0)]
                for _ in range(program.portions_at(cut, first=i == 0))
            ]
            for i in range(frames)
        ]
        planned = activation_bytes(program, latent, cut)
        peak = measured(Slice(program, cut, len(program), weights), crossing, weights)
        assert abs(planned / peak - 1) <= 0.15, (cut, planned, peak)


class Above:
    """The exchange of the first rows of a picture, of which `rest` [B, T, H, W, C] are those below."""

    rows, cols = True, False

    def __init__(self, rest: torch.Tensor) -> None:
        self.rest = rest

    def coming(self, margins: Margins) -> Margins:
        return margins.on(False, True, False, False)

    def start(self, padded: torch.Tensor, margins: Margins) -> Callable[[], None]:
        raise AssertionError("attention reads no margins")

    def gather(self, slab: torch.Tensor) -> torch.Tensor:
        return torch.cat([slab, self.rest], dim=2)


def test_attention_without_instructions_for_bfloat16_is_that_in_float32_rounded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, *maps = (torch.randn(size).bfloat16() for size in ((1, 2, 3, 4, 8), (24, 8), (24,), (8, 8), (8,)))
    wide = [tensor.float() for tensor in maps]
    expected = kernels.attention(x.float(), x.float(), (wide[0], wide[1]), (wide[2], wide[3])).bfloat16()
    monkeypatch.setattr(kernels, "arithmetic_dtype", lambda dtype, device: torch.float32)
    found = kernels.attention(x, x, (maps[0], maps[1]), (maps[2], maps[3]))
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_attention_of_a_slab_is_for_its_own_pixels_and_takes_the_memory_planned(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vae_config(WAN22, decoder_base_dim=32)
    program, weights = decoder_program(config), make_vae(config).state_dict()
    (number,) = (i for i, op in enumerate(program.ops) if isinstance(op, Attention))
    whole, slab = LatentShape(1, 1, 12, 10), LatentShape(1, 1, rows, 10)
    (shape,) = program.carried_shapes(number, whole, first=True)
    x = torch.randn(shape)
    part = Slice(program, number, number + 1, weights)
    (expected,) = part.run([x.clone()], part.state(1))
    seen = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v: (seen.append((q.shape[-2], k.shape[-2], v.shape[-2])), attend(q, k, v))[1],
    )
    gamma = norm_weight(weights[program.ops[number].weights[0].name])
    exchange = Above(rms_norm(x[:, :, rows:], gamma))
    (found,) = part.run([x[:, :, :rows].clone()], part.state(1), exchange)
    assert seen == [(rows * 10, 120, 120)]
    assert (found - expected[:, :, :rows]).abs().max() <= 1e-5
    planned = activation_bytes(program, slab, number, number + 1, cut_rows=True, whole=whole)
    peak = measured(part, [[[x[:, :, :rows].clone()]]], weights, exchange)
    assert abs(planned / peak - 1) <= 0.15, (planned, peak)


@pytest.mark.parametrize(("frames", "rows", "calls"), [(4, 2, 1), (4, 8, 2), (3, 8, 2), (2, 16, 2), (2, 40, 6)])
def test_a_norm_takes_as_many_rows_or_frames_as_fit_its_block(
    frames: int, rows: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block has 16 rows."""
    x, gamma = torch.randn(1, frames, rows, 4, 8), norm_weight(torch.rand(8))
    sizes = []
    monkeypatch.setattr(kernels, "NORM_BLOCK_ELEMENTS", 16 * 4 * 8)
    monkeypatch.setattr(kernels, "rms_norm", lambda part, g: (sizes.append(part.numel()), rms_norm(part, g))[1])
    out = torch.empty_like(x)
    kernels.norm_silu(x, gamma, out)
    assert torch.equal(out, F.silu(rms_norm(x, gamma)))
    assert len(sizes) == calls and max(sizes) <= 16 * 4 * 8


def test_activations_do_not_grow_with_the_clip() -> None:
    program = decoder_program(vae_config(WAN22))
    sizes = [activation_bytes(program, LatentShape(1, frames, 6, 5)) for frames in (2, 8, 64)]
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_stream_of_64_latent_frames_needs_no_more_than_one_of_8() -> None:
    config = vae_config(WAN22)
    model = make_vae(config)
    vae = ParallelVAE(model, Replicated(), Replicated())
    peaks = []
    for frames in (3, 8, 64):
        z = torch.randn(1, config["z_dim"], frames, 2, 2)
        with LiveBytes([*model.state_dict().values(), z]) as live:
            assert sum(len(chunk) for chunk in vae.decode_stream(z)) == 4 * frames - 3
        peaks.append(live.peak)
    assert peaks[1] == peaks[2]
