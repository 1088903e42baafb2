"""SeaCache: the passes that diffusers' hook spares, and its latents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cosmos_models import ALL_HEADS, SwitchedGuidance, all_latents, denoise_with, tiny_pipeline
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer, SeaCacheConfig
from transformers import PreTrainedTokenizerFast

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.hub import local_folder
from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.denoise.guidance import PassCounts
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.planning.plan import make_plan

PROMPTS = ([5] * 19, [7] * 7)
STEPS = 9
SETTINGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "eager": {"threshold": 2.0, "max_consecutive_cached": 0},
    "last residual": {"threshold": 0.6, "residual_order": 0},
    "careful ends": {"threshold": 0.8, "retention_steps": 3, "cache_end_steps": 2, "power_exp": 2.0},
}


@contextmanager
def hooked(pipeline: Cosmos3OmniPipeline, settings: SeaCacheConfig) -> Iterator[PassCounts]:
    """`pipeline` with diffusers' own cache, whose passes are counted by the stacks of layers that are run."""
    model, counts = pipeline.transformer, PassCounts()
    stack = Cosmos3OmniTransformer._run_decoder_stack
    names = {tokens: name for tokens, name in zip(map(len, PROMPTS), ("cond", "uncond"), strict=True)}

    def counted(und_seq: torch.Tensor, *others: Any) -> Any:
        counts.computed[names[len(und_seq)]] += 1
        return stack(model, und_seq, *others)

    model._run_decoder_stack = counted
    model.enable_cache(settings)
    try:
        yield counts
    finally:
        model.disable_cache()
        del model._run_decoder_stack


@pytest.mark.parametrize("modalities", ["vision", "sound and action"])
@pytest.mark.parametrize("name", SETTINGS)
def test_passes_and_latents_are_those_of_diffusers(name: str, modalities: str) -> None:
    settings = SeaCacheConfig(**SETTINGS[name])
    pipeline = tiny_pipeline(seed=3, **ALL_HEADS)
    run: dict[str, Any] = {"prompt_ids": PROMPTS, "steps": STEPS}
    with hooked(pipeline, settings) as expected_counts:
        expected = all_latents(None, pipeline, modalities, **run)
    counts = PassCounts()
    ours = all_latents(ParallelLoopDenoiser(cache=settings, counts=counts), pipeline, modalities, **run)
    assert counts.computed == expected_counts.computed
    assert counts.computed["cond"] + counts.cached["cond"] == STEPS
    assert counts.cached["cond"] > 0
    for modality, latents in expected.items():
        torch.testing.assert_close(ours[modality], latents, rtol=0, atol=1e-6)


def test_a_guidance_interval_and_a_cache_go_together() -> None:
    """The negative pass begins its own count where the interval begins."""
    settings, interval = SeaCacheConfig(threshold=0.7), (300.0, 900.0)
    pipeline = tiny_pipeline(seed=4, **ALL_HEADS)
    run: dict[str, Any] = {"prompt_ids": PROMPTS, "steps": STEPS}
    with hooked(pipeline, settings) as expected_counts:
        expected = all_latents(SwitchedGuidance(interval), pipeline, "vision", **run)
    counts = PassCounts()
    denoiser = ParallelLoopDenoiser(cache=settings, guidance_interval=interval, counts=counts)
    ours = all_latents(denoiser, pipeline, "vision", **run)
    assert counts.computed == expected_counts.computed
    assert counts.cached["cond"] != counts.cached["uncond"] > 0
    torch.testing.assert_close(ours["latents"], expected["latents"], rtol=0, atol=1e-6)


@pytest.mark.long
def test_the_toys_passes_and_latents_are_those_of_diffusers() -> None:
    """The trained model, whose steps are as alike as a real one's: of both passes 7 of 20 are spared."""
    pipeline = tiny_pipeline()
    toy = local_folder("builtin:toy", None)
    assert toy is not None
    transformer = Cosmos3OmniTransformer.from_pretrained(toy / "transformer").eval().requires_grad_(False)
    pipeline.register_modules(transformer=transformer)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(toy / "text_tokenizer")
    words = "A large yellow triangle moves up over a purple background."
    run: dict[str, Any] = {
        "prompt_ids": (tokenizer(words)["input_ids"], tokenizer("A")["input_ids"]),
        **{"height": 96, "width": 160, "num_frames": 17, "steps": 20, "guidance_scale": 3.0, "seed": 0},
    }
    settings = SeaCacheConfig()
    counts = PassCounts()
    ours = denoise_with(ParallelLoopDenoiser(cache=settings, counts=counts), pipeline, **run)
    transformer.enable_cache(settings)
    expected = denoise_with(None, pipeline, **run)
    assert counts == PassCounts(Counter(cond=13, uncond=13), Counter(cond=7, uncond=7))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_plan_says_at_most_and_approximate() -> None:
    plan = make_plan(compose(["sampler/cache=seacache", "topology=cpu_x4", "vae=replicated"]))
    every = make_plan(compose(["topology=cpu_x4", "vae=replicated"]))
    assert "20 steps: at most 40 passes (seacache)" in str(plan)
    assert plan.exactness == {**every.exactness, "denoise": "approximate"}
    assert [note for note in plan.notes if "approximate" in note]
    for rank, other in zip(plan.ranks, every.ranks, strict=True):
        kept = 2 * rank.stages["denoise"].share["tokens"] * 128 * 4  # of two steps, in fp32
        now, then = rank.stages["denoise"], other.stages["denoise"]
        assert (now.flops, now.sent) == (then.flops, then.sent)
        assert now.activation_bytes >= then.activation_bytes + kept


REFUSED = {
    "a setting that nothing reads": (["sampler.cache.threshold=0.5"], "sampler.cache.threshold=0.5", "seacache"),
    "nothing to spare": (["sampler/cache=seacache", "sampler.steps=2"], "sampler.steps=2", "sampler.steps=3"),
    "all steps at the ends": (
        ["sampler/cache=seacache", "sampler.cache.retention_steps=19"],
        "sampler.cache.retention_steps=19",
        "sampler.steps=21",
    ),
    "an order that is none": (
        ["sampler/cache=seacache", "sampler.cache.residual_order=2"],
        "sampler.cache.residual_order=2",
        "residual_order=1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    asked, what, works = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        compose(asked)
    (problem,) = refused.value.problems
    assert what in problem.what and works in problem.works and problem.why
