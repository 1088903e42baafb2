"""Denoising over a grid of ranks: each gives one rank's latents, and sends what the plan says."""

from __future__ import annotations

import pytest
import torch
from cosmos_models import tiny_transformer
from test_denoise_ranks import compare, compare_modalities
from test_transfer_ranks import RUNS, check

from cosmos3_pipeline.denoise import CpLayoutError, ParallelTransformer
from cosmos3_pipeline.denoise.exchange import Exchange
from cosmos3_pipeline.denoise.layers import LoadedLayers
from cosmos3_pipeline.denoise.modalities import Items, Vision
from cosmos3_pipeline.denoise.texts import TextEncoder
from cosmos3_pipeline.distributed.launch import joined_world, run_ranks
from cosmos3_pipeline.distributed.mesh import RankMesh

CUT_GROUPS = {"num_attention_heads": 6, "num_key_value_heads": 2}
GUIDED = 1e-4  # over steps of a solver at guidance scale 6, which amplify what float32 rounds
COLUMN, ROW, SQUARE = (2, 1), (1, 2), (2, 2)


def velocities(
    sequence: Exchange, dtype: torch.dtype, *, words: int, frames: int, size: tuple[int, int]
) -> torch.Tensor:
    """The velocity of a random clip, flat, with every second frame clean."""
    transformer = tiny_transformer(seed=3, **CUT_GROUPS).to(dtype)
    generator = torch.Generator().manual_seed(4)
    shape = (frames, size[0] // 2, size[1] // 2)
    each = shape[1] * shape[2]
    noisy_frames = torch.arange(0, frames, 2)
    noisy = words + torch.cat([torch.arange(frame * each, (frame + 1) * each) for frame in noisy_frames])
    positions = torch.randint(0, 40, (3, words + frames * each), generator=generator)
    latents = torch.randn(1, 48, frames, *size, generator=generator).to(dtype)
    encoder = TextEncoder(transformer, sequence=sequence, layers=LoadedLayers(transformer))
    (text,) = encoder.encode([(torch.randint(0, 250, (words,), generator=generator), positions[:, :words])])
    ours = ParallelTransformer(transformer, sequence=sequence)
    items = Items(Vision(), shapes=[shape], noisy_frames=[noisy_frames], noisy=noisy)
    prepared = ours.prepare(text, position_ids=positions, items=(items,))
    embedded = ours.embed(prepared, {"vision": [latents]}, torch.tensor([700.0]))
    (hidden,) = ours.hidden([prepared], [embedded])
    return ours.gather(prepared, ours.velocity(prepared, hidden))


def exact(cp: tuple[int, int], ulysses: int) -> None:
    """Compare with one rank, up to rounding in each dtype. No axis divides the numbers of tokens evenly."""
    mesh = RankMesh.build(cp=cp, ulysses=ulysses)
    for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for clip in (
            {"words": 13, "frames": 5, "size": (10, 14)},
            {"words": 3, "frames": 3, "size": (6, 10)},
        ):
            expected = velocities(Exchange(), dtype, **clip)
            difference = (velocities(Exchange.over_sequence(mesh), dtype, **clip) - expected).abs().max().item()
            assert expected.std() > 0.3
            assert difference < most, (difference, dtype, clip)


def in_grid(cfg: int, cp: tuple[int, int], ulysses: int) -> None:
    with joined_world(device="cpu", threads=1):
        if cfg == 1:
            exact(cp, ulysses)
        mesh = RankMesh.build(cfg=cfg, cp=cp, ulysses=ulysses)
        first = "one key/value head" if ulysses < 3 else "grouped"
        for number, (model, clip) in enumerate([(first, "i2v"), ("relu2, no text norm", "v2v")]):
            compare(mesh, model, clip, seed=number, most=GUIDED)
        compare_modalities(mesh, "sound and action", most=GUIDED, size=(48, 112, 9))
        check(mesh, {}, RUNS["two controls"], most=GUIDED)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("cfg", "cp", "ulysses"),
    [
        pytest.param(1, COLUMN, 1, id="2 ranks, a column"),
        pytest.param(1, ROW, 1, id="2 ranks, a row"),
        pytest.param(1, SQUARE, 1, id="4 ranks, a square"),
        pytest.param(1, ROW, 2, id="4 ranks, a row x ulysses"),
        pytest.param(1, (3, 2), 1, id="6 ranks, uneven"),
        pytest.param(2, COLUMN, 2, id="8 ranks, cfg x a column x ulysses"),
        pytest.param(2, ROW, 2, id="8 ranks, cfg x a row x ulysses"),
    ],
)
def test_every_grid_gives_the_single_rank_latents(cfg: int, cp: tuple[int, int], ulysses: int) -> None:
    run_ranks(in_grid, cfg, cp, ulysses, ranks=cfg * cp[0] * cp[1] * ulysses)


def too_few_tokens() -> None:
    with joined_world(device="cpu", threads=1):
        mesh = RankMesh.build(cp=(2, 1), ulysses=2)
        with pytest.raises(CpLayoutError, match=r"cp=\[2,1\] x ulysses=2 over 1 tokens"):
            compare(mesh, "grouped", "fewer tokens than ranks", seed=0)


def test_a_group_without_tokens_is_refused() -> None:
    run_ranks(too_few_tokens, ranks=4)
