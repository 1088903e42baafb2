"""Checkpoints distilled to four steps: diffusers' own latents, the defaults of a run, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import drop, edit, make_layout
from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer, FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3LoopDenoiser
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3_distilled import Cosmos3DistilledBlocks
from PIL import Image
from toy_runs import PROMPT, clip_of, components, context_of, task_config
from transformers import AutoTokenizer

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.files import MODULAR_INDEX, NEGATIVE_PROMPT
from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.config.schema import Keep, SamplerConfig
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.errors import ConfigError, Refusal
from cosmos3_pipeline.jobs.generate import generate
from cosmos3_pipeline.jobs.rehearse.rank import rehearse_ranks
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.models.layouts import DISTILLED_SIGMAS
from cosmos3_pipeline.planning import plan_of
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.denoise import DenoiseStage
from cosmos3_pipeline.stages.encode import EncodeStage
from cosmos3_pipeline.stages.media import write_video
from cosmos3_pipeline.stages.media.shown import filling
from cosmos3_pipeline.stages.text import TextStage

SCHEDULER = "scheduler/scheduler_config.json"
STEPS = SamplerConfig(steps=4, guidance_scale=1.0, seed=3)
SMALL = ("task.height=48", "task.width=80", "task.num_frames=5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layout(tmp_path_factory.mktemp("distilled") / "distilled", "distilled")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` that a test may change."""
    return shutil.copytree(whole, tmp_path / "distilled")


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 11, 3), dtype=np.uint8)
    return [Image.fromarray(frame).resize((162, 122), Image.Resampling.BICUBIC) for frame in noise]


class Reference:
    """diffusers' own blocks of a distilled checkpoint on the same folder, up to the latents."""

    def __init__(self, folder: Path) -> None:
        blocks = Cosmos3DistilledBlocks()
        del blocks.sub_blocks["decode"]
        blocks.sub_blocks["denoise"].sub_blocks["denoise"].set_progress_bar_config(disable=True)
        self.pipeline = blocks.init_pipeline()
        self.pipeline.update_components(
            transformer=Cosmos3OmniTransformer.from_pretrained(
                folder, subfolder="transformer", dtype=torch.float32
            ),
            vae=AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
            text_tokenizer=AutoTokenizer.from_pretrained(folder / "text_tokenizer"),
            distilled_sigmas=json.loads((folder / MODULAR_INDEX).read_text())["distilled_sigmas"],
        )
        self.pipeline.disable_safety_checker()

    def latents(self, **inputs: Any) -> torch.Tensor:
        found = self.pipeline(prompt=PROMPT, generator=torch.Generator().manual_seed(3), **inputs).get("latents")
        assert isinstance(found, torch.Tensor)
        return found


@pytest.fixture(scope="module")
def reference(whole: Path) -> Reference:
    return Reference(whole)


class PlainDenoise(DenoiseStage):
    """The stage with diffusers' own denoiser block and transformer."""

    def __init__(self, transformer: Cosmos3OmniTransformer) -> None:
        super().__init__(STEPS)
        self._whole = transformer

    def denoiser(self, context: RunContext) -> Any:
        context.components.pipeline.update_components(transformer=self._whole)
        return Cosmos3LoopDenoiser()


# Latent rows and columns of odd grids, which the transformer pads.
@pytest.mark.sampled(5)
@pytest.mark.long
@pytest.mark.parametrize("size", [(80, 112, 9), (48, 80, 17)], ids=["5x7x3", "3x5x5"])
@pytest.mark.parametrize("task", ["t2i", "t2v", "i2v", "v2v", "v2v-last"])
def test_latents_are_diffusers_own(
    task: str,
    size: tuple[int, int, int],
    whole: Path,
    reference: Reference,
    frames: list[Image.Image],
    tmp_path: Path,
) -> None:
    height, width, num_frames = size if task != "t2i" else (*size[:2], 1)
    condition: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if task == "i2v":
        frames[0].save(tmp_path / "photo.png")
        condition = {"image": str(tmp_path / "photo.png"), "condition_latent_frames": [0]}
        theirs = {"image": frames[0]}
    elif task.startswith("v2v"):
        condition, theirs = clip_condition(frames, tmp_path, size=(width, height), last=task == "v2v-last")
    expected = reference.latents(height=height, width=width, num_frames=num_frames, fps=24.0, **theirs)
    assert expected.std() > 0.5
    # Ours multiplies text and vision tokens apart. Measured 0 as well; the tolerance is for processors whose
    # matrix kernels round by the number of rows.
    for stage, tolerance in ((PlainDenoise(reference.pipeline.transformer), 0.0), (DenoiseStage(STEPS), 1e-5)):
        parts = components(inspect_checkpoint(whole), flow_shift=None)
        context = context_of(parts, clip_of(height, width, num_frames), tmp_path)
        TextStage(task_config(prompt=PROMPT), STEPS)(context)
        EncodeStage(task_config(**condition))(context)
        stage(context)
        ours = context.state.get("latents")
        assert ours.shape == expected.shape and ours.dtype == torch.float32
        assert (ours - expected).abs().max().item() <= tolerance, type(stage).__name__


def clip_condition(
    frames: list[Image.Image], folder: Path, *, size: tuple[int, int], last: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same clip for a task of ours and for diffusers, which has nothing to stretch in `size`."""
    import av

    with write_video(folder / "clip.mp4", height=122, width=162, fps=24, crf=10, preset="ultrafast") as video:
        video.write(np.stack([np.asarray(frame) for frame in frames]))
    with av.open(str(folder / "clip.mp4")) as container:
        decoded = [filling(frame.to_image(), size) for frame in container.decode(video=0)]
    indexes = [1] if last else [0, 1]
    ours = {
        "video": str(folder / "clip.mp4"),
        "condition_latent_frames": indexes,
        "condition_keep": Keep.last if last else Keep.first,
    }
    keep = "last" if last else "first"
    return ours, {
        "video": decoded,
        "condition_frame_indexes_vision": indexes,
        "condition_video_keep": keep,
    }


@pytest.mark.parametrize("task", ["t2v", "t2i"])
@pytest.mark.parametrize("model", ["nano", "super", "toy_random", "super_i2v_4step"])
def test_steps_guidance_and_schedule_are_the_checkpoints_without_a_word(
    model: str, task: str, whole: Path
) -> None:
    cfg = compose([f"model={model}", f"model.path={whole}", f"task={task}"])
    assert (cfg.sampler.steps, cfg.sampler.guidance_scale, cfg.sampler.flow_shift) == (4, 1.0, None)
    assert cfg.model.distilled_sigmas == DISTILLED_SIGMAS
    compose([f"model={model}", f"model.path={whole}", f"task={task}", "sampler.steps=4"])


def test_a_run_says_what_it_ran(whole: Path, tmp_path: Path) -> None:
    given = ["model=nano", f"model.path={whole}", *SMALL, "model.dtype=float32", "model.vae_dtype=float32"]
    generate(prepare(composition_of(given)), tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["checkpoint"]
    assert metrics["sampler"] == "FlowMatchEulerDiscreteScheduler"
    assert metrics["distilled_sigmas"] == DISTILLED_SIGMAS
    assert metrics["schedule"] == {"flow_shift": None, "use_karras_sigmas": False}
    assert (tmp_path / "video.mp4").stat().st_size > 0


def test_the_plan_is_of_four_passes(whole: Path) -> None:
    """Four steps with the prompt alone: half of what four guided steps of the same numbers compute."""
    plan = plan_of(compose(["model=nano", f"model.path={whole}", *SMALL, "topology.ulysses=1"]))
    (rank,) = plan["ranks"]
    assert (plan["steps"], rank["stages"]["denoise"]["passes"]) == (4, 1)
    assert len(rank["stages"]["text"]["text_tokens"]) == 1
    option = compose(["model=super_i2v_4step", "task=i2v", "task.image=photo.png", "topology=h200_x1"])
    planned = plan_of(option)
    assert (planned["steps"], planned["ranks"][0]["stages"]["denoise"]["passes"]) == (4, 1)


@pytest.mark.sampled(1)
@pytest.mark.long
@pytest.mark.parametrize("size", [(96, 160, 17), (192, 320, 17)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rehearsal_is_as_planned(dtype: str, size: tuple[int, int, int], whole: Path, tmp_path: Path) -> None:
    """All four steps are run, with the photograph's frame put back after each."""
    Image.effect_noise((70, 50), 90).convert("RGB").save(tmp_path / "photo.png")
    given = [f"task.{key}={value}" for key, value in zip(("height", "width", "num_frames"), size, strict=True)]
    given += ["task=i2v", f"task.image={tmp_path / 'photo.png'}", f"model.dtype={dtype}", "topology=h100_x1"]
    found = rehearse_ranks(compose(["model=nano", f"model.path={whole}", *given]), None)
    assert found.findings == ()
    assert not [note for note in found.notes if "denoising steps were run" in note]


REFUSED = {
    "other steps": (["sampler.steps=8"], "sampler.steps=8", "sampler.steps=4"),
    "guidance": (["sampler.guidance_scale=6"], "sampler.guidance_scale=6.0", "sampler.guidance_scale=1.0"),
    "no guidance at all": (["sampler.guidance_scale=0"], "sampler.guidance_scale=0", "sampler.guidance_scale=1.0"),
    "a shift": (["sampler.flow_shift=3"], "sampler.flow_shift=3.0", "sampler.flow_shift=null"),
    "a negative prompt": (["task.negative_prompt=dark"], "task.negative_prompt", "no task.negative_prompt"),
    "two ranks for guidance": (
        ["topology.ranks_per_node=4", "topology.cfg=2", "topology.ulysses=2"],
        "topology.cfg=2",
        "topology.cfg=1 topology.ulysses=4",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_checkpoint_fixes_is_refused_not_clamped(name: str, whole: Path) -> None:
    asked, what, works = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        compose(["model=nano", f"model.path={whole}", *asked])
    (problem,) = refused.value.problems
    assert problem.what.startswith(what) and works in problem.works and problem.why
    if what.partition("=")[0] in asked[0]:
        assert any(asked[0].partition("=")[0] in origin for origin in problem.set_by)


@pytest.mark.parametrize("negative_prompt", ["''", "null"])
def test_an_empty_negative_prompt_is_none(negative_prompt: str, whole: Path) -> None:
    compose(["model=nano", f"model.path={whole}", f"task.negative_prompt={negative_prompt}"])


@pytest.mark.long
def test_an_option_of_four_steps_needs_a_distilled_checkpoint(tmp_path: Path) -> None:
    folder = make_layout(tmp_path / "super", "super")
    with pytest.raises(ConfigError, match="is not distilled"):
        compose(["model=super_t2i_4step", f"model.path={folder}"])
    with pytest.raises(ConfigError, match="made on the spot is not distilled"):
        compose(["model=toy_random", "model.distilled_sigmas=[1.0,0.5]"])


def test_a_negative_prompt_of_the_folder_is_not_read(folder: Path) -> None:
    (folder / NEGATIVE_PROMPT).parent.mkdir(exist_ok=True)
    (folder / NEGATIVE_PROMPT).write_text('{"style": "dark"}')
    assert inspect_checkpoint(folder).negative_prompt is None


def without_list(folder: Path) -> None:
    edit(folder / SCHEDULER, fixed_step_sampler_config={"sample_type": "sde"})


# Each changes a whole folder. The refusal contains the words.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "steps nowhere": (
        lambda f: (without_list(f), drop(f / MODULAR_INDEX, "distilled_sigmas")),
        "distilled_sigmas: None",
    ),
    "no steps": (lambda f: edit(f / MODULAR_INDEX, distilled_sigmas=[]), r"distilled_sigmas: \[\]"),
    "a word": (lambda f: edit(f / MODULAR_INDEX, distilled_sigmas="four"), "must be a list"),
    "not a number": (lambda f: edit(f / MODULAR_INDEX, distilled_sigmas=[1.0, float("nan")]), "must be a number"),
    "no noise left": (lambda f: edit(f / MODULAR_INDEX, distilled_sigmas=[1.0, 0.0]), "must be a number"),
    "rising": (lambda f: edit(f / MODULAR_INDEX, distilled_sigmas=[0.5, 1.0]), "less noise than the step before"),
    "two answers": (lambda f: edit(f / MODULAR_INDEX, distilled_sigmas=[1.0, 0.75, 0.5, 0.25]), "says t_list"),
    "not stochastic": (lambda f: edit(f / SCHEDULER, stochastic_sampling=False), "stochastic_sampling: False"),
    "a shift": (lambda f: edit(f / SCHEDULER, shift=3.0), "shift: 3.0"),
    "an ODE": (
        lambda f: edit(f / SCHEDULER, fixed_step_sampler_config={"sample_type": "ode"}),
        "sample_type: 'ode'",
    ),
    "settings a list": (lambda f: edit(f / SCHEDULER, fixed_step_sampler_config=[1]), "keys with values"),
}


@pytest.mark.parametrize(("damage", "said"), BROKEN.values(), ids=BROKEN)
def test_steps_that_are_not_clear_are_refused(damage: Callable[[Path], object], said: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(Refusal, match=said) as refused:
        inspect_checkpoint(folder)
    assert refused.value.problem.works


@pytest.mark.parametrize(
    "change",
    [
        lambda f: drop(f / MODULAR_INDEX, "distilled_sigmas"),
        without_list,
        lambda f: edit(
            f / SCHEDULER, fixed_step_sampler_config={"sample_type": "sde", "t_list": [*DISTILLED_SIGMAS, 0.0]}
        ),
    ],
    ids=["the framework's list alone", "the index alone", "a list that ends clean"],
)
def test_the_steps_are_found_in_either_file(change: Callable[[Path], object], folder: Path) -> None:
    change(folder)
    assert inspect_checkpoint(folder).sampler.distilled_sigmas == tuple(DISTILLED_SIGMAS)
