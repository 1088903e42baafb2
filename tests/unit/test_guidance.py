"""The guidance interval: diffusers' latents without the passes outside of it, planned pass by pass."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cosmos_models import ALL_HEADS, SwitchedGuidance, all_latents, tiny_pipeline
from diffusers import UniPCMultistepScheduler
from test_denoise_cost import Counted

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.sampler import Sampler, sampler_of
from cosmos3_pipeline.checkpoint.schedule import timesteps_of
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.denoise.cost import PassTokens, Stretch, denoise_costs
from cosmos3_pipeline.denoise.guidance import Guidance, GuidancePass, PassCounts
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.jobs.generate import generate
from cosmos3_pipeline.jobs.rehearse.rank import rehearse_ranks
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.models.layouts import LAYOUTS
from cosmos3_pipeline.models.loading import load_scheduler
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.planning.sampling import _timesteps, begins_twice
from cosmos3_pipeline.planning.transformer import TransformerSize
from cosmos3_pipeline.review.compare import picture

PROMPTS = ([5] * 19, [7] * 7)
STEPS = 5
# The timesteps of five steps with shift 3 are 999, 923, 818, 666 and 429.
INTERVALS = {"the first steps": (700.0, 1000.0), "the last": (0.0, 429.0), "between": (600.0, 950.0)}
GUIDED = {"the first steps": 3, "the last": 1, "between": 3}


@pytest.mark.parametrize("modalities", ["vision", "sound and action"])
@pytest.mark.parametrize("where", INTERVALS)
def test_latents_are_those_of_diffusers_with_its_guidance_switched(where: str, modalities: str) -> None:
    pipeline = tiny_pipeline(seed=3, **ALL_HEADS)
    run: dict[str, Any] = {"prompt_ids": PROMPTS, "steps": STEPS, "guidance_scale": 4.5}
    counts = PassCounts()
    expected = all_latents(SwitchedGuidance(INTERVALS[where]), pipeline, modalities, **run)
    denoiser = ParallelLoopDenoiser(guidance_interval=INTERVALS[where], counts=counts)
    ours = all_latents(denoiser, pipeline, modalities, **run)
    always = all_latents(ParallelLoopDenoiser(), pipeline, modalities, **run)
    for name, latents in expected.items():
        torch.testing.assert_close(ours[name], latents, rtol=0, atol=1e-6, msg=f"{name}, {where}")
    assert not torch.allclose(always["latents"], ours["latents"], atol=1e-2)
    assert counts == PassCounts({"cond": STEPS, "uncond": GUIDED[where]})


def test_a_step_without_the_negative_pass_costs_what_is_planned() -> None:
    torch.set_num_threads(1)
    pipeline = tiny_pipeline(seed=0)
    stretches = (Stretch("vision", 192, frames=3, tokens_per_frame=3 * 4),)
    (cost,) = denoise_costs(
        TransformerSize.of(pipeline.transformer.config, latent_channels=48),
        passes=[PassTokens(19, stretches), PassTokens(7, stretches, negative=True)],
        element_bytes=4,
        on_host=True,
    )
    denoiser = Counted(guidance_interval=(700, 1000))
    all_latents(denoiser, pipeline, "vision", prompt_ids=PROMPTS, steps=STEPS)
    alone, both = cost.step([0]).flops, cost.step([0, 1]).flops
    assert denoiser.flops[1:] == [both, both, alone, alone]


def test_passes_are_dealt_once_and_their_velocities_put_together_in_diffusers_order() -> None:
    """With control clips there are three passes, each with an interval of its own."""
    guidance = Guidance(
        (
            GuidancePass("cond"),
            GuidancePass("cond_no_control", 1.5, (0, 500)),
            GuidancePass("uncond", 3.0, (400, 1000)),
        )
    )
    assert [guidance.at(t) for t in (999, 500, 400, 399)] == [(0, 2), (0, 1, 2), (0, 1, 2), (0, 1)]
    assert guidance.shares(1) == [range(3)]
    assert guidance.shares(2) == [range(2), range(2, 3)]
    assert guidance.shares(3) == [range(1), range(1, 2), range(2, 3)]
    full, without, uncond = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).unbind()
    controlled = without + 1.5 * (full - without)
    torch.testing.assert_close(
        guidance.combine({0: full, 1: without, 2: uncond}), uncond + 3.0 * (controlled - uncond)
    )
    torch.testing.assert_close(guidance.combine({0: full, 2: uncond}), uncond + 3.0 * (full - uncond))
    assert torch.equal(guidance.combine({0: full.bfloat16()}), full.bfloat16().float())


KARRAS = {"use_karras_sigmas": True, "flow_shift": 1.0, "sigma_min": None, "sigma_max": None}
SCHEDULES: dict[str, Sampler] = {
    "shipped": Sampler("UniPCMultistepScheduler", {**KARRAS, "sigma_min": 0.147, "sigma_max": 200.0}, False, None),
    "Karras by betas": Sampler("UniPCMultistepScheduler", KARRAS, False, None),
    "even": Sampler(
        "UniPCMultistepScheduler", {**KARRAS, "use_karras_sigmas": False, "flow_shift": 5.0}, False, None
    ),
    "Edge": Sampler("UniPCMultistepScheduler", {**KARRAS, "sigma_min": 0.147}, True, 3.0),
}


@pytest.mark.parametrize("flow_shift", [None, 1.0, 3.0, 5.0, 10.0, 0.7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_planned_timesteps_are_the_schedulers(schedule: str, flow_shift: float | None) -> None:
    sampler = SCHEDULES[schedule]
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **sampler.settings}
    whole = Sampler(sampler.class_name, settings, sampler.native_grid, sampler.native_flow_shift)
    scheduler = load_scheduler(whole, flow_shift=flow_shift)
    assert isinstance(scheduler, UniPCMultistepScheduler)
    planned = {**whole.settings_for(flow_shift), "native_grid": whole.native_grid}
    for steps in range(1, 61):
        # As diffusers' Cosmos3SetTimestepsStep calls it.
        grid = np.linspace(1.0 - 1.0 / 1000, 0.0, steps + 1)[:-1] if whole.native_grid else None
        if steps == 1 and scheduler.config.use_karras_sigmas:
            continue  # numpy divides by zero
        scheduler.set_timesteps(steps, sigmas=grid)
        assert timesteps_of(planned, steps) == tuple(scheduler.timesteps.tolist()), steps


@pytest.mark.parametrize("model", ["toy_random", "nano", "edge", "super"])
@pytest.mark.parametrize("flow_shift", ["null", "4.0"])
def test_a_composition_plans_with_its_checkpoints_schedule(model: str, flow_shift: str) -> None:
    config = compose([f"model={model}", f"sampler.flow_shift={flow_shift}", "sampler.steps=9"])
    layout = LAYOUTS["toy" if model == "toy_random" else model]
    index = {"use_native_flow_schedule": False, "native_flow_shift": None, **layout.index}
    sampler, _ = sampler_of(layout.scheduler, index, {}, Path("scheduler_config.json"))
    scheduler = load_scheduler(sampler, flow_shift=config.sampler.flow_shift)
    scheduler.set_timesteps(9, sigmas=np.linspace(0.999, 0.0, 10)[:-1] if sampler.native_grid else None)
    assert _timesteps(config) == tuple(scheduler.timesteps.tolist())


SMALL = ("model=toy_random", "task.height=48", "task.width=80", "task.num_frames=5", "sampler.steps=5")
INTERVAL = "sampler.guidance_interval=[700,1000]"


def test_a_run_computes_the_passes_that_are_planned(tmp_path: Path) -> None:
    prepared = prepare(composition_of([*SMALL, "sampler.flow_shift=3.0", INTERVAL]))
    assert prepared.plan.passes == {"cond": 5, "uncond": 3}
    assert "5 steps, 3 of them guided: 8 passes" in str(prepared.plan)
    assert prepared.plan.exactness["denoise"] == "approximate"
    generate(prepared, tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())["denoise"]
    assert found["passes"] == {"computed": prepared.plan.passes, "cached": {}}
    assert found["guidance_interval"] == [700.0, 1000.0]


def test_a_rank_without_the_pass_of_a_step_sends_and_computes_nothing_in_it() -> None:
    asked = ["model=nano", "topology=h200_x4", "task.height=256", "task.width=320", "sampler.steps=10"]
    always, within = (make_plan(compose([*asked, *more])) for more in ([], [INTERVAL]))
    guided = within.passes["uncond"]
    assert within.steps == 10 and 0 < guided < 10
    for rank, before in zip(within.ranks, always.ranks, strict=True):
        now, then = rank.stages["denoise"], before.stages["denoise"]
        assert now.peak_bytes == then.peak_bytes
        if rank.cfg == 0:
            assert (now.flops, now.sent) == (then.flops, then.sent)
        else:
            # The angles of the tokens are computed once, and the guided velocity is gathered in every step.
            assert guided / 10 <= now.flops / then.flops < guided / 10 + 1e-3
            assert guided / 10 < now.sent.bytes / then.sent.bytes < guided / 10 + 0.01


PLACED = {
    "one rank": ["topology=cpu_x1"],
    "cfg": ["topology=cpu_x2"],
    "cfg and ulysses": ["topology=cpu_x4"],
    "streamed": ["topology=cpu_x2", "weights=streamed"],
    "sharded": ["topology=cpu_x2", "weights=sharded"],
}


@pytest.mark.long
@pytest.mark.sampled(1)
@pytest.mark.parametrize("cache", ["none", "seacache"])
@pytest.mark.parametrize("name", PLACED)
def test_a_rehearsal_is_as_planned(name: str, cache: str) -> None:
    asked = ["model=toy_random", "task.height=192", "task.width=320", "sampler.flow_shift=3.0", "sampler.steps=5"]
    asked += [INTERVAL, f"sampler/cache={cache}", "vae=replicated"]
    found = rehearse_ranks(compose([*asked, *PLACED[name]]), None)
    assert found.findings == ()


REFUSED = {
    "backwards": ("[900,100]", [], "guidance_interval=[900.0, 100.0]", "[400,1000]"),
    "beyond the timesteps": ("[400,1001]", [], "guidance_interval=[400.0, 1001.0]", "[400,1000]"),
    "below them": ("[-1,500]", [], "guidance_interval=[-1.0, 500.0]", "[400,1000]"),
    "one end": ("[400]", [], "guidance_interval=[400.0]", "[400,1000]"),
    "no step in it": ("[1,2]", [], "guidance_interval=[1.0, 2.0] with 20 steps", "guidance_scale=1.0"),
    "no guidance": (
        "[400,1000]",
        ["sampler.guidance_scale=1.0"],
        "guidance_scale=1.0",
        "no sampler.guidance_interval",
    ),
    "distilled": (
        "[400,1000]",
        ["model=super_t2i_4step", "task=t2i", "model.path=null"],
        "distilled to 4 steps",
        "no sampler.guidance_interval",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    interval, asked, what, works = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        compose([*asked, f"sampler.guidance_interval={interval}"])
    (problem,) = (one for one in refused.value.problems if "guidance_interval" in one.what)
    assert what in problem.what and works in problem.works and problem.why


def test_a_review_says_that_the_picture_is_another() -> None:
    moved = {"sampler.guidance_interval": (None, [400.0, 1000.0])}
    assert picture(moved, {}, {}) == "another picture (sampler.guidance_interval)"


@pytest.mark.parametrize(
    ("schedule", "flow_shift", "most"),
    [
        ("shipped", 10.0, 100),
        ("shipped", 100.0, 10),
        ("Edge", 100.0, 11),
        ("even", 1000.0, 1),
        ("Edge", 1000.0, 2),
    ],
)
def test_the_most_steps_are_those_that_the_scheduler_takes(schedule: str, flow_shift: float, most: int) -> None:
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **SCHEDULES[schedule].settings}
    sampler = replace(SCHEDULES[schedule], settings=settings)
    planned = {**sampler.settings_for(flow_shift), "native_grid": sampler.native_grid}
    for steps, refused in ((most, False), (most + 1, True)):
        scheduler = load_scheduler(sampler, flow_shift=flow_shift)
        grid = np.linspace(1.0 - 1.0 / 1000, 0.0, steps + 1)[:-1] if sampler.native_grid else None
        scheduler.set_timesteps(steps, sigmas=grid)
        latents = torch.zeros(1, 4, 2)
        with pytest.raises(AssertionError) if refused else nullcontext():
            for timestep in scheduler.timesteps:
                latents = scheduler.step(torch.ones(1, 4, 2), timestep, latents, return_dict=False)[0]
            assert latents.isfinite().all()
        assert begins_twice(planned, steps) is refused
