"""Denoising over real gloo ranks: every layout gives the single rank's latents, and sends what the plan says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cosmos_models import ALL_HEADS, SwitchedGuidance, all_latents, denoise_with, tiny_pipeline
from diffusers import SeaCacheConfig

from cosmos3_pipeline.denoise import CfgLayoutError, ParallelLoopDenoiser, UlyssesLayoutError
from cosmos3_pipeline.denoise.cache import StepCache
from cosmos3_pipeline.denoise.cost import PassTokens, Stretch, Wire, denoise_costs
from cosmos3_pipeline.denoise.guidance import PassCounts
from cosmos3_pipeline.denoise.shards import Grid
from cosmos3_pipeline.distributed.launch import joined_world, run_ranks
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.distributed.mesh import REPLICA, SEQUENCE, RankMesh
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.planning.transformer import TransformerSize

# (prompt tokens, negative prompt tokens), (height, width, frames), clean latent frames: odd counts throughout
CLIPS = {
    "t2v": ((23, 11), (80, 48, 5), ()),
    "i2v": ((14, 31), (48, 112, 9), (0,)),
    "v2v": ((9, 10), (80, 80, 13), (0, 1)),
    "t2i": ((17, 5), (112, 80, 1), ()),
    "fewer tokens than ranks": ((2, 3), (16, 32, 1), ()),
}
STEPS = 3
DISTILLED_SIGMAS = [1.0, 0.9375, 0.625]
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "relu2, no text norm": {"hidden_act": "relu2", "qk_norm_for_text": False},
    "vision's own text norm": {"qk_norm_for_text": False, "use_und_k_norm_for_gen": True},
    "one key/value head": {"num_attention_heads": 4, "num_key_value_heads": 1},
}


def latents(
    denoiser: Any,
    model: dict[str, Any],
    clip: str,
    *,
    seed: int,
    guidance_scale: float = 6.0,
    distilled_sigmas: list[float] | None = None,
) -> torch.Tensor:
    words, (height, width, num_frames), clean = CLIPS[clip]
    generator = torch.Generator("cpu").manual_seed(seed + 100)
    prompt, negative = (torch.randint(0, 250, (n,), generator=generator).tolist() for n in words)
    latent = (1, 48, (num_frames - 1) // 4 + 1, height // 16, width // 16)
    return denoise_with(
        denoiser,
        tiny_pipeline(seed=seed, **model),
        prompt_ids=(prompt, negative),
        height=height,
        width=width,
        num_frames=num_frames,
        steps=STEPS,
        guidance_scale=guidance_scale,
        distilled_sigmas=distilled_sigmas,
        seed=seed,
        conditioning=torch.randn(latent, generator=generator) if clean else None,
        condition_frames=clean,
    )


def compare(mesh: RankMesh, model: str, clip: str, *, seed: int, most: float = 1e-5, **sampler: Any) -> None:
    """The same latents as diffusers', the same bits on every rank of the replica, and the messages of the plan."""
    seed += mesh.rank("dp")
    with nullcontext() if sampler else wire_of_the_plan(mesh, model, clip):
        own = latents(ParallelLoopDenoiser(mesh), MODELS[model], clip, seed=seed, **sampler)
    replica = mesh.group(REPLICA)
    roots = own.clone()
    dist.broadcast(roots, group_src=0, group=replica)
    assert torch.equal(own, roots), f"rank {dist.get_rank()} differs from its root: {model}, {clip}"
    if mesh.rank(REPLICA) == 0:
        expected = latents(None, MODELS[model], clip, seed=seed, **sampler)
        difference = (own - expected).abs().max().item()
        assert expected.std() > 0.5, f"flat: {model}, {clip}"
        assert difference < most, f"{difference}: {model}, {clip}"


def compare_modalities(mesh: RankMesh, modalities: str, most: float = 1e-5, **run: Any) -> None:
    """As `compare`, of sound and actions beside vision, at odd counts of tokens."""
    pipeline = tiny_pipeline(seed=7, **ALL_HEADS)
    run = {"prompt_ids": ([3] * 13, [9] * 6), **run}
    own = all_latents(ParallelLoopDenoiser(mesh), pipeline, modalities, **run)
    expected = all_latents(None, pipeline, modalities, **run)
    for name, values in expected.items():
        difference = (own[name] - values).abs().max().item()
        assert difference < most, f"{difference}: {name}, {modalities}"
        roots = own[name].clone()
        dist.broadcast(roots, group_src=0, group=mesh.group(REPLICA))
        assert torch.equal(own[name], roots), f"rank {dist.get_rank()} differs from its root: {name}"


def sent(ledger: Ledger, before: Ledger) -> Wire:
    counted = ledger.since(before)
    return Wire(counted.sent_bytes, counted.sent_messages)


@contextmanager
def wire_of_the_plan(mesh: RankMesh, model: str, clip: str) -> Iterator[None]:
    """Check that the run in this block sends exactly the planned bytes over both axes."""
    words, (height, width, num_frames), clean = CLIPS[clip]
    config = tiny_pipeline(**MODELS[model]).transformer.config
    stretch = Stretch(
        "vision", 192, (num_frames - 1) // 4 + 1, -(-height // 32) * -(-width // 32), frozenset(clean)
    )
    costs = denoise_costs(
        TransformerSize.of(config, latent_channels=48),
        passes=[PassTokens(words[0], (stretch,)), PassTokens(words[1], (stretch,), negative=True)],
        cfg=mesh.cfg,
        grid=Grid(mesh.ulysses, *mesh.cp),
        element_bytes=4,
        on_host=True,
    )
    cost = costs[mesh.rank("cfg") * mesh.size(SEQUENCE) + mesh.rank(SEQUENCE)]
    assert (cost.cfg_rank, cost.sequence_rank) == (mesh.rank("cfg"), mesh.rank(SEQUENCE))
    guidance, sequence = mesh.comm("cfg").ledger, mesh.comm(SEQUENCE).ledger
    before = guidance.snapshot(), sequence.snapshot()
    yield
    assert sent(guidance, before[0]) == cost.step(range(3)).cfg * STEPS
    text = Wire()
    for one in cost.texts:
        text += one.sequence
    assert sent(sequence, before[1]) == text + cost.step(range(3)).sequence * STEPS
    # One rank may have clean tokens only.
    assert (mesh.cfg > 1) == any(one.step(range(3)).cfg.bytes > 0 for one in costs)


def in_layout(dp: int, cfg: int, ulysses: int) -> None:
    with joined_world(device="cpu", threads=1):
        mesh = RankMesh.build(dp=dp, cfg=cfg, ulysses=ulysses)
        models = [*MODELS, "grouped"]
        for number, (model, clip) in enumerate(zip(models, CLIPS, strict=True)):
            compare(mesh, model, clip, seed=number)
        for modalities in ("sound", "sound and action"):
            compare_modalities(mesh, modalities, size=(48, 112, 9))
        for mode in ("forward_dynamics", "inverse_dynamics"):
            compare_modalities(mesh, "action", mode=mode)
        compare_modalities(mesh, "sound", size=(16, 32, 1))


def in_thin_layout(dp: int, cfg: int, ulysses: int) -> None:
    with joined_world(device="cpu", threads=1):
        mesh = RankMesh.build(dp=dp, cfg=cfg, ulysses=ulysses)
        assert mesh.size(REPLICA) * dp == dist.get_world_size()
        compare(mesh, "grouped", "v2v", seed=1)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("ranks", "dp", "cfg", "ulysses"),
    [
        pytest.param(4, 1, 2, 2, id="4 ranks, cfg x ulysses"),
        pytest.param(2, 1, 2, 1, id="2 ranks, cfg"),
        pytest.param(2, 1, 1, 2, id="2 ranks, ulysses"),
        pytest.param(4, 1, 1, 4, id="4 ranks, ulysses"),
    ],
)
def test_every_layout_gives_the_single_rank_latents(ranks: int, dp: int, cfg: int, ulysses: int) -> None:
    run_ranks(in_layout, dp, cfg, ulysses, ranks=ranks)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("ranks", "dp", "cfg", "ulysses"),
    [
        pytest.param(3, 3, 1, 1, id="3 ranks, dp"),
        pytest.param(3, 1, 1, 1, id="3 ranks, two of them spare"),
        pytest.param(4, 2, 2, 1, id="4 ranks, dp x cfg"),
    ],
)
def test_replicas_and_spare_ranks_give_the_single_rank_latents(
    ranks: int, dp: int, cfg: int, ulysses: int
) -> None:
    run_ranks(in_thin_layout, dp, cfg, ulysses, ranks=ranks)


INTERVALS = {"t2v": (400, 700), "i2v": (700, 1000), "fewer tokens than ranks": (0, 600)}


def guided_at_times(cfg: int, ulysses: int) -> None:
    """A rank of the negative pass has the same latents, also after steps in which it computed nothing."""
    with joined_world(device="cpu", threads=1):
        mesh = RankMesh.build(cfg=cfg, ulysses=ulysses)
        for clip, interval in INTERVALS.items():
            before, counts = mesh.comm("cfg").ledger.snapshot(), PassCounts()
            denoiser = ParallelLoopDenoiser(mesh, guidance_interval=interval, counts=counts)
            own = latents(denoiser, {}, clip, seed=4)
            expected = latents(SwitchedGuidance(interval), {}, clip, seed=4)
            assert (own - expected).abs().max() < 1e-5, clip
            assert 0 < counts.computed["uncond"] < STEPS == counts.computed["cond"], clip
            messages = mesh.comm("cfg").ledger.since(before).sent_messages
            if cfg > 1 and clip != "fewer tokens than ranks":  # there not every rank has tokens
                assert messages == (counts.computed["uncond"] if mesh.rank("cfg") else STEPS)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("cfg", "ulysses"), [(2, 1), (1, 2), (2, 2)])
def test_a_guidance_interval_gives_the_single_rank_latents(cfg: int, ulysses: int) -> None:
    run_ranks(guided_at_times, cfg, ulysses, ranks=cfg * ulysses)


SEACACHE = SeaCacheConfig(threshold=2.0)


def with_a_cache(cfg: int, ulysses: int) -> None:
    """The passes that one rank spares are spared on all, also on a spare one, and the rest is as ever."""
    with joined_world(device="cpu", threads=1):
        alone, here = PassCounts(), PassCounts()
        mesh = RankMesh.build(cfg=cfg, ulysses=ulysses)
        expected = latents(ParallelLoopDenoiser(cache=SEACACHE, counts=alone), {}, "i2v", seed=4)
        if mesh.rank(REPLICA) > 0:  # as if its distances had other last bits
            StepCache._decided = lambda self, *_: frozenset(self._since)  # type: ignore[method-assign]
        own = latents(ParallelLoopDenoiser(mesh, cache=SEACACHE, counts=here), {}, "i2v", seed=4)
        assert (own - expected).abs().max() < 1e-5
        assert here == alone and here.cached["cond"] == here.cached["uncond"] > 0


@pytest.mark.parametrize(("ranks", "cfg", "ulysses"), [(3, 1, 1), (4, 2, 2)])
def test_a_cache_spares_the_same_passes_on_every_rank(ranks: int, cfg: int, ulysses: int) -> None:
    run_ranks(with_a_cache, cfg, ulysses, ranks=ranks)


def distilled() -> None:
    """Ranks whose generators are seeded apart, but for the one that draws the noise of every step."""
    with joined_world(device="cpu", threads=1):
        torch.manual_seed(dist.get_rank())
        mesh = RankMesh.build(ulysses=dist.get_world_size())
        for number, clip in enumerate(CLIPS):
            compare(mesh, "grouped", clip, seed=number, guidance_scale=1.0, distilled_sigmas=DISTILLED_SIGMAS)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_steps_of_a_distilled_model_draw_the_same_noise_on_every_rank(ranks: int) -> None:
    run_ranks(distilled, ranks=ranks)


def uneven_heads() -> None:
    """Three ranks over six heads in two groups: the middle rank's heads belong to both."""
    with joined_world(device="cpu", threads=1):
        mesh = RankMesh.build(ulysses=3)
        MODELS["cut groups"] = {"num_attention_heads": 6, "num_key_value_heads": 2}
        MODELS["odd groups"] = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 12}
        for number, model in enumerate(("cut groups", "odd groups")):
            compare(mesh, model, "i2v", seed=number)


def test_heads_that_cut_through_key_value_groups() -> None:
    run_ranks(uneven_heads, ranks=3)


def refused_layouts() -> None:
    with joined_world(device="cpu", threads=1):
        with pytest.raises(CfgLayoutError, match=r"guidance_scale=1\.0"):
            latents(ParallelLoopDenoiser(RankMesh.build(cfg=2)), {}, "t2v", seed=0, guidance_scale=1.0)
        with pytest.raises(UlyssesLayoutError, match="ulysses=2 with 3 attention heads"):
            heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
            latents(ParallelLoopDenoiser(RankMesh.build(ulysses=2)), heads, "t2v", seed=0)
        with pytest.raises(Refusal, match=r"(?s)dp=3 x cfg=1 x cp=\[1,1\] x ulysses=1 on 2 ranks.*3 ranks"):
            RankMesh.build(dp=3)


def test_what_cannot_be_split_is_refused_on_every_rank() -> None:
    run_ranks(refused_layouts, ranks=2)
