"""A run with adapters: diffusers' own latents with the same adapters, by any ranks and wherever weights are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import make_adapter, merge
from checkpoints import make_layout
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler
from ranks import run_on_ranks
from torch import Tensor
from toy_runs import PROMPT, clip_of, components, context_of, task_config

from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.checkpoint.lora import read_adapters
from cosmos3_pipeline.config.schema import LoraConfig, Placement, SamplerConfig
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.planning.weights import RESIDENT
from cosmos3_pipeline.stages.denoise import DenoiseStage
from cosmos3_pipeline.stages.text import TextStage

SIZE = 80, 48, 9
STEPS, GUIDANCE = 3, 5.0
PLACEMENTS = {
    "resident": RESIDENT,
    "the text stays": replace(RESIDENT, keep_text=True),
    "streamed": replace(RESIDENT, placement=Placement.streamed),
    "streamed, 1 stays": replace(RESIDENT, placement=Placement.streamed, resident_layers=1),
    "sharded": replace(RESIDENT, placement=Placement.sharded),
}
Adapters = list[tuple[Path, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layout(tmp_path_factory.mktemp("lora") / "nano", "nano")


@pytest.fixture(scope="module")
def adapters(folder: Path) -> Adapters:
    first = make_adapter(folder, folder.parent / "first")
    second = make_adapter(folder, folder.parent / "second", seed=1, r=3, target_modules="all-linear")
    return [(first, 0.8), (second, -0.5)]


def latents(rank: int, folder: Path, adapters: Adapters, dtype: torch.dtype, ulysses: int) -> dict[str, Tensor]:
    """Those of each placement."""
    torch.set_num_threads(1)
    asked = [LoraConfig(path=str(path), weight=weight) for path, weight in adapters]
    found = {}
    for name, plan in PLACEMENTS.items():
        if name == "sharded" and ulysses == 1:
            continue
        mesh = RankMesh.build(ulysses=ulysses)
        checkpoint = inspect_checkpoint(folder).with_adapters(read_adapters(asked))
        parts = components(checkpoint, dtype=dtype, weights=plan, mesh=mesh)
        context = context_of(parts, clip_of(*SIZE), folder, mesh=mesh)
        sampler = SamplerConfig(steps=STEPS, guidance_scale=GUIDANCE, seed=3)
        TextStage(task_config(prompt=PROMPT, negative_prompt=""), sampler)(context)
        DenoiseStage(sampler)(context)
        found[name] = context.state.get("latents")
    return found


def reference(folder: Path, adapters: Adapters) -> Tensor:
    scheduler = UniPCMultistepScheduler.from_pretrained(
        folder, subfolder="scheduler", flow_shift=10.0, use_karras_sigmas=False
    )
    pipeline = Cosmos3OmniPipeline.from_pretrained(folder, scheduler=scheduler, enable_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    merge(pipeline.transformer, adapters)
    height, width, frames = SIZE
    made = pipeline(
        prompt=PROMPT,
        negative_prompt="",
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).video
    assert isinstance(made, Tensor)
    return made


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ulysses", [1, 2])
def test_latents_are_those_of_diffusers_with_the_same_adapters(
    ulysses: int, folder: Path, adapters: Adapters
) -> None:
    expected, without = reference(folder, adapters), reference(folder, [])
    assert (expected - without).abs().max() > 0.1
    for found in run_on_ranks(latents, ulysses, folder, adapters, torch.float32, ulysses):
        for name, made in found.items():
            assert (made - expected).abs().max() <= (0 if ulysses == 1 else 5e-6 * expected.abs().max()), name
            assert torch.equal(made, found["resident"]), name


def test_every_placement_has_the_bits_of_the_resident_one_in_bfloat16(folder: Path, adapters: Adapters) -> None:
    for found in run_on_ranks(latents, 2, folder, adapters, torch.bfloat16, 2):
        assert len(found) == len(PLACEMENTS)
        for name, made in found.items():
            assert torch.equal(made, found["resident"]), name
