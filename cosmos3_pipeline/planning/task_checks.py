"""Checks of a task by its numbers and keys alone: its inputs, its clip, its sound, its fixed steps."""

from __future__ import annotations

from collections.abc import Iterator

from cosmos3_pipeline.config.schema import Config, TaskConfig, TaskName
from cosmos3_pipeline.config.tasks import (
    ALL_GIVEN,
    FRAMES,
    GIVEN,
    readers,
)
from cosmos3_pipeline.errors import Problem
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.geometry import Clip, clean_frames, nearest_multiple
from cosmos3_pipeline.planning.text import BYTES_PER_TOKEN, LONGEST_TEXT, LONGEST_TRAINED, too_long


def _task(cfg: Config, clip: Clip) -> Iterator[Problem]:
    task = cfg.task
    name = task.name.value
    for given in ALL_GIVEN:
        file, wanted_by = getattr(task, given.key), readers(given)
        if name not in wanted_by and file is not None:
            yield Problem(
                what=f"task.{given.key}={file} with task={name}",
                why=f"it is read by {', '.join(wanted_by)} only, so it would be ignored",
                works=f"task={wanted_by[0]}, or no task.{given.key}",
            )
    frames, own = task.condition_latent_frames, FRAMES.get(task.name)
    if own and frames != own:
        yield Problem(
            what=f"task.condition_latent_frames={frames} with task={name}",
            why=f"{' and '.join(given.what for given in GIVEN[task.name])}: the frames {own} and no others",
            works=f"task.condition_latent_frames={own}",
        )
    elif own is None and (not frames or min(frames) < 0 or max(frames) >= clip.latent_frames):
        yield Problem(
            what=f"task.condition_latent_frames={frames}",
            why=f"{clip.num_frames} frames are {clip.latent_frames} latent frames, numbered from 0",
            works=f"one or more of 0..{clip.latent_frames - 1}, for example [0,1]",
        )
    elif own == [] and frames:
        yield Problem(
            what=f"task.condition_latent_frames={frames} with task={name}",
            why="there is no input to condition on, so it would be ignored",
            works="task.condition_latent_frames=[]",
        )
    elif action_of(task) is None and len(set(clean_frames(frames, clip.latent_frames))) == clip.latent_frames:
        yield Problem(
            what=f"task.condition_latent_frames={frames} of {clip.latent_frames} latent frames",
            why="every frame of the video is given, so nothing would be generated",
            works=f"task.num_frames={clip.num_frames + clip.temporal}",
        )
    modality = "image" if name == "t2i" else "video" if action_of(task) is None else "action"
    if task.name is TaskName.transfer:
        modality = task.modality if task.modality in ("transfer", "transfer_wsm") else "transfer"
    if task.modality != modality:
        yield Problem(
            what=f"task.modality={task.modality} with task={name}",
            why=f"the defaults of {name} are those for {modality}s",
            works=f"no task.modality{', or task=t2i' if task.modality == 'image' else ''}",
        )
    yield from _background(task)
    yield from _words(cfg)


def _background(task: TaskConfig) -> Iterator[Problem]:
    if len(task.background) != 3 or not all(0 <= value <= 255 for value in task.background):
        yield Problem(
            what=f"task.background={task.background} is no colour",
            why="a colour is red, green and blue, each 0 to 255",
            works="task.background=[255,255,255]",
        )


def _words(cfg: Config) -> Iterator[Problem]:
    """Problems of prompts that are empty or would be ignored."""
    task, scale = cfg.task, cfg.sampler.guidance_scale
    distilled = cfg.model.distilled_sigmas is not None  # see `_distilled`
    if not task.prompt.strip():
        yield Problem(
            what="task.prompt is empty",
            why="the model is told what to show by words only",
            works=f"task.prompt='{cfg.model.recommended.prompt}', or no task.prompt, which takes these words",
        )
    for name in too_long(task):
        yield Problem(
            what=f"{name} has more than {LONGEST_TEXT} characters",
            why=f"the models were trained with texts of {LONGEST_TRAINED} tokens at most, and an English token is "
            f"about {BYTES_PER_TOKEN} characters",
            works=f"a text of about {LONGEST_TRAINED * BYTES_PER_TOKEN} characters, or fewer",
        )
    if task.prompt_file is not None and task.prompt != cfg.model.recommended.prompt:
        yield Problem(
            what=f"task.prompt beside task.prompt_file={task.prompt_file}",
            why="each line of the file is the prompt of one clip, so task.prompt would be ignored",
            works="one of them",
        )
    if scale == 0 and not distilled:
        yield Problem(
            what="sampler.guidance_scale=0",
            why="at 0 only the negative prompt is followed, so task.prompt would be ignored",
            works="sampler.guidance_scale=1.0, which is the prompt alone, or more",
        )
    if scale == 1 and task.negative_prompt and not distilled:
        yield Problem(
            what=f"task.negative_prompt with sampler.guidance_scale={scale}",
            why="only guidance reads a negative prompt, and at 1.0 there is none, so it would be ignored",
            works="no task.negative_prompt, or another sampler.guidance_scale",
        )


def _clip(cfg: Config, clip: Clip) -> Iterator[Problem]:
    if action_of(cfg.task) is not None:
        return  # the size follows from the picture, see `settled`
    for key, value in (("height", cfg.task.height), ("width", cfg.task.width)):
        if value % clip.spatial:
            yield Problem(
                what=f"task.{key}={value} is not a multiple of {clip.spatial}",
                why=f"one latent row or column is {clip.spatial} pixels",
                works=f"task.{key}={nearest_multiple(value, clip.spatial)}",
            )
    frames, step = cfg.task.num_frames, clip.temporal
    if frames is None or cfg.task.name is TaskName.transfer:
        return  # see `transfer_problems`
    if cfg.task.name.value == "t2i":
        if frames != 1:
            yield Problem(
                what=f"task.num_frames={frames} with task=t2i",
                why="an image has one frame",
                works="task.num_frames=1, or task=t2v",
            )
    elif frames == 1:
        yield Problem(
            what=f"task.num_frames=1 with task={cfg.task.name.value}",
            why="one frame is an image, which has its own task and prompt",
            works=f"task=t2i, or task.num_frames={step + 1}",
        )
    elif (frames - 1) % step:
        yield Problem(
            what=f"task.num_frames={frames} is not {step}k + 1",
            why=f"the first latent frame is one frame, each later one {step}",
            works=f"task.num_frames={nearest_multiple(frames - 1, step) + 1}",
        )


# Why a task cannot have sound, for tasks with a reason of their own.
NO_SOUND = {
    TaskName.t2i: "an image is one frame, and a sound lasts as long as its clip",
    TaskName.transfer: "no published model makes sound that follows controls: diffusers' transfer has none, and "
    "NVIDIA's framework guides by controls without it",
}


def _sound(cfg: Config, clip: Clip) -> Iterator[Problem]:
    model, task = cfg.model, cfg.task
    if not task.sound:
        if cfg.output.sound:
            yield Problem(
                what="output.sound=true with task.sound=false",
                why="there is no sound to write, so it would be ignored",
                works="task.sound=true, or output.sound=false",
            )
        return
    if task.modality != "video":
        yield Problem(
            what=f"task.sound=true with task={task.name.value}",
            why=NO_SOUND.get(task.name, "the models make sound with videos from words, photographs and clips"),
            works="task=t2v, or task.sound=false",
        )
    if not model.transformer.sound_gen:
        yield Problem(
            what=f"task.sound=true with model={model.name}",
            why="its transformer has no head for sound (model.transformer.sound_gen=false)",
            works="model=nano or model=super, which have one, or task.sound=false",
        )
    if model.distilled_sigmas is not None:
        yield Problem(
            what=f"task.sound=true with a checkpoint distilled to {len(model.distilled_sigmas)} steps",
            why="it learned its steps for the picture alone, and diffusers has no such steps for sound",
            works="a checkpoint that is not distilled, or task.sound=false",
        )


def _distilled(cfg: Config, clip: Clip) -> Iterator[Problem]:
    """Problems of settings that a distilled checkpoint fixes, so that a run cannot choose them."""
    # Actions and transfer are refused by `check_actions` and `transfer_problems`, with any settings.
    fits_no_task = action_of(cfg.task) is not None or cfg.task.name is TaskName.transfer
    if cfg.model.distilled_sigmas is None or fits_no_task:
        return
    sampler, topology, steps = cfg.sampler, cfg.topology, len(cfg.model.distilled_sigmas)
    checkpoint = f"a checkpoint distilled to {steps} steps"
    if sampler.steps != steps:
        yield Problem(
            what=f"sampler.steps={sampler.steps} with {checkpoint}",
            why="it learned these steps and no others, each with a noise level of its own",
            works=f"sampler.steps={steps}, or no sampler.steps",
        )
    if sampler.guidance_scale != 1.0:
        yield Problem(
            what=f"sampler.guidance_scale={sampler.guidance_scale} with {checkpoint}",
            why="it learned to answer as its teacher did with guidance, which is not applied a second time",
            works="sampler.guidance_scale=1.0, or no sampler.guidance_scale",
        )
    if sampler.flow_shift is not None:
        yield Problem(
            what=f"sampler.flow_shift={sampler.flow_shift} with {checkpoint}",
            why="a shift moves the noise levels of the steps, and those are the checkpoint's own",
            works="sampler.flow_shift=null, or no sampler.flow_shift",
        )
    if cfg.task.negative_prompt:
        yield Problem(
            what=f"task.negative_prompt with {checkpoint}",
            why="only guidance reads a negative prompt, and these steps have none, so it would be ignored",
            works="no task.negative_prompt; the prompt itself says what to show",
        )
    if topology.cfg > 1:
        yield Problem(
            what=f"topology.cfg={topology.cfg} with {checkpoint}",
            why="without guidance there is one pass only, so the second rank would have nothing to do",
            works=f"topology.cfg=1 topology.ulysses={topology.cfg * topology.ulysses}",
        )


TASK_CHECKS = (_task, _clip, _sound, _distilled)
