"""Sound and actions beside vision, on one rank: the latents of diffusers, and the plan's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cosmos_models import ALL_HEADS, MODALITIES, all_latents, tiny_pipeline, transfer_latents
from diffusers import SeaCacheConfig
from diffusers.hooks.sea_cache import SeaCacheSharedState
from test_denoise_cost import Counted

from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.denoise.cost import PassTokens, Stretch, denoise_costs
from cosmos3_pipeline.denoise.guidance import PassCounts
from cosmos3_pipeline.denoise.transfer import ParallelTransferDenoiser
from cosmos3_pipeline.planning.transformer import TransformerSize

PROMPTS = ([5] * 19, [7] * 7)
MODES = ("policy", "forward_dynamics", "inverse_dynamics")
MODELS: dict[str, dict[str, Any]] = {
    "silu": {},
    "relu2": {"hidden_act": "relu2", "qk_norm_for_text": False},
    "a width that is no power of two": {"hidden_size": 72},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("modalities", MODALITIES)
def test_latents_are_those_of_diffusers(modalities: str, model: str, guidance_scale: float, threads: int) -> None:
    pipeline = tiny_pipeline(seed=3, **ALL_HEADS, **MODELS[model])
    run: dict[str, Any] = {"prompt_ids": PROMPTS, "guidance_scale": guidance_scale}
    torch.set_num_threads(threads)
    try:
        expected = all_latents(None, pipeline, modalities, **run)
        ours = all_latents(ParallelLoopDenoiser(), pipeline, modalities, **run)
    finally:
        torch.set_num_threads(1)
    assert ours.keys() == expected.keys()
    assert len(ours) == 1 + modalities.count("sound") + modalities.count("action")
    for name, latents in expected.items():
        assert latents.std() > 0.5
        assert torch.equal(ours[name], latents), f"{name}, {modalities}"


@pytest.mark.parametrize("mode", MODES)
def test_actions_that_are_given_stay_and_others_are_found(mode: str) -> None:
    pipeline = tiny_pipeline(seed=5, **ALL_HEADS)
    expected = all_latents(None, pipeline, "action", prompt_ids=PROMPTS, mode=mode)
    ours = all_latents(ParallelLoopDenoiser(), pipeline, "action", prompt_ids=PROMPTS, mode=mode)
    for name, latents in expected.items():
        torch.testing.assert_close(ours[name], latents, rtol=0, atol=1e-6)
    assert not ours["action_latents"][:, 10:].any()


def test_half_precision_is_that_of_diffusers() -> None:
    pipeline = tiny_pipeline(seed=2, hidden_size=64, **ALL_HEADS)
    pipeline.transformer.to(torch.bfloat16)
    pipeline.transformer.time_embedder.float()  # kept in fp32 by diffusers when it loads a checkpoint
    expected = all_latents(None, pipeline, "sound and action", prompt_ids=PROMPTS)
    ours = all_latents(ParallelLoopDenoiser(), pipeline, "sound and action", prompt_ids=PROMPTS)
    for name, latents in expected.items():
        torch.testing.assert_close(ours[name], latents, rtol=0, atol=1e-3)


def test_flops_are_counted_with_every_modality() -> None:
    torch.set_num_threads(1)
    pipeline = tiny_pipeline(seed=0, **ALL_HEADS)
    stretches = (
        Stretch("vision", 192, frames=3, tokens_per_frame=3 * 4, clean=frozenset([0])),
        Stretch("sound", 5, frames=10),
        Stretch("action", 12, frames=12),
    )
    (cost,) = denoise_costs(
        TransformerSize.of(pipeline.transformer.config, latent_channels=48),
        passes=[PassTokens(19, stretches), PassTokens(7, stretches, negative=True)],
        element_bytes=4,
        on_host=True,
    )
    denoiser = Counted()
    found = all_latents(denoiser, pipeline, "sound and action", prompt_ids=PROMPTS)
    assert found["sound_latents"].shape == (5, 10)
    assert denoiser.flops[1:] == [cost.step(range(3)).flops] * 2


class CountedTransfer(Counted, ParallelTransferDenoiser):
    """As `Counted`, of the passes of transfer."""


@pytest.mark.parametrize("controls", [1, 2])
def test_flops_are_counted_with_passes_over_two_sequences(controls: int) -> None:
    torch.set_num_threads(1)
    pipeline = tiny_pipeline(seed=0)
    clean = frozenset(range(3))
    stretches = [Stretch("vision", 192, frames=3, tokens_per_frame=3 * 4, clean=clean)] * controls
    target = Stretch("vision", 192, frames=3, tokens_per_frame=3 * 4, clean=frozenset([0]))
    (cost,) = denoise_costs(
        TransformerSize.of(pipeline.transformer.config, latent_channels=48),
        passes=[
            PassTokens(19, (*stretches, target)),
            PassTokens(19, (target,)),
            PassTokens(7, (*stretches, target), negative=True),
        ],
        element_bytes=4,
        on_host=True,
        nested=True,
    )
    denoiser = CountedTransfer()
    transfer_latents(denoiser, pipeline, controls=controls, clean_frames=1, prompt_ids=PROMPTS)
    assert denoiser.flops[1:] == [cost.step(range(3)).flops] * 2
    once = sum(text.flops for text in cost.texts) + cost.clip_flops
    assert denoiser.flops[0] == once + cost.step(range(3)).flops


@pytest.mark.parametrize("control_interval", [None, [400.0, 900.0]])
@pytest.mark.parametrize("interval", [None, [700.0, 1000.0]])
def test_transfer_guides_within_its_intervals(
    interval: list[float] | None, control_interval: list[float] | None
) -> None:
    pipeline = tiny_pipeline(seed=4)
    run: dict[str, Any] = {"controls": 1, "clean_frames": 5, "prompt_ids": PROMPTS, "steps": 4}
    intervals: dict[str, Any] = {"guidance_interval": interval, "control_interval": control_interval}
    expected = transfer_latents(None, pipeline, **intervals, **run)
    counts = PassCounts()
    ours = transfer_latents(ParallelTransferDenoiser(**intervals, counts=counts), pipeline, **run)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert counts.computed["cond_full"] == 4
    assert (counts.computed["cond_no_control"] == 4) == (control_interval is None)
    assert (counts.computed["uncond_full"] == 4) == (interval is None)
    assert all(counts.computed[name] for name in ("cond_no_control", "uncond_full"))


@pytest.mark.parametrize("interval", [None, [700.0, 1000.0]])
def test_transfer_spares_the_passes_that_diffusers_spares(
    interval: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And looks at the latents once in a step, for all passes that have been in the same steps."""
    pipeline, settings, steps = tiny_pipeline(seed=4), SeaCacheConfig(threshold=2.0), list[int]()
    run: dict[str, Any] = {"controls": 2, "clean_frames": 5, "prompt_ids": PROMPTS, "steps": 8}
    pipeline.transformer.enable_cache(settings)
    expected = transfer_latents(None, pipeline, guidance_interval=interval, **run)
    pipeline.transformer.disable_cache()
    without = transfer_latents(None, pipeline, guidance_interval=interval, **run)
    gate = SeaCacheSharedState.resolve_gate

    def resolve_gate(self: Any, state: Any, seen: Any, *others: Any) -> bool:
        steps.append(seen.step_index)
        return gate(self, state, seen, *others)

    monkeypatch.setattr(SeaCacheSharedState, "resolve_gate", resolve_gate)
    counts = PassCounts()
    denoiser = ParallelTransferDenoiser(guidance_interval=interval, cache=settings, counts=counts)
    ours = transfer_latents(denoiser, pipeline, **run)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert (expected - without).abs().max() > 1e-3
    assert counts.cached["cond_full"] == counts.cached["cond_no_control"] > 0
    assert steps == list(range(8))
