"""Every check of a composition, before a weight is read: structure first, then what the arithmetic says.

All problems are collected, so a user mends them in one go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cosmos3_pipeline.checkpoint.adopt import Adopted, adopt_checkpoint
from cosmos3_pipeline.checkpoint.hub import is_hub_id
from cosmos3_pipeline.checkpoint.lora import read_adapter
from cosmos3_pipeline.checkpoint.weights import transformer_weights
from cosmos3_pipeline.config import checks as structure
from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.provenance import Provenance
from cosmos3_pipeline.config.schema import Config, JobName, Placement, TaskName
from cosmos3_pipeline.config.tasks import (
    ALL_GIVEN,
    CLIP,
    FRAMES,
    FROM_VIDEO,
    GIVEN,
    MADE,
    controls_of,
    read_by,
    readers,
)
from cosmos3_pipeline.denoise.checks import check_layout
from cosmos3_pipeline.errors import ConfigError, Problem, Refusal, did_you_mean
from cosmos3_pipeline.planning.action_checks import by_hand, check_actions, settled
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.geometry import Clip, clean_frames, clip_of, nearest_multiple, replica_ranks
from cosmos3_pipeline.planning.plan import DIRECTIONS, Plan, make_plan
from cosmos3_pipeline.planning.sampling import check_cache, check_interval
from cosmos3_pipeline.planning.trained import outside
from cosmos3_pipeline.planning.transfer import transfer_problems
from cosmos3_pipeline.planning.vae import (
    REFERENCE,
    VaePlan,
    directions,
    is_parallel,
    settings_of,
    strategy_of,
    vae_plan,
)
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Exactness

X264_PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"),
    "placebo",
)


@dataclass(frozen=True)
class Checked:
    """A config without a problem, and what its check found out: the plan of its VAE, its checkpoint if any."""

    config: Config
    vae: Mapping[Direction, VaePlan]
    adopted: Adopted | None = None

    def plan(self) -> Plan:
        """The plan of the config, whose VAE is not planned again."""
        return make_plan(self.config, vae=self.vae)


def check_composition(composition: Composition, changes: Mapping[str, Any] | None = None) -> Checked:
    """The typed config of `composition`; raises ConfigError with every problem found.

    Where `model.path` is a folder here, the numbers in the config are the checkpoint's own, see
    `adopt_checkpoint`. `changes` are dotted keys and the values to take for them. Each problem says which file or
    override set its keys.
    """
    found = structure.problems(composition)
    if not found:  # what follows needs every value to be there and in range
        config = composition.typed(changes)
        found.extend(_model(config))
        found.extend(_unread_settings(config, composition.overrides or ()))
        try:
            adopted = adopt_checkpoint(config)
        except Refusal as refusal:
            found.append(refusal.problem)
        else:
            found.extend(() if found else _adapters(config, adopted))  # weights follow from numbers that are right
    if not found:
        numbers = {**(changes or {}), **(adopted.numbers if adopted is not None else {})}
        try:
            config = composition.typed(numbers)
            of_picture = settled(config)
            found.extend(by_hand(of_picture, composition.literal))
            checked = check(composition.typed({**numbers, **of_picture}) if of_picture else config)
            if not found:
                return replace(checked, adopted=adopted)
        except ConfigError as error:
            found.extend(error.problems)
    raise ConfigError(located(found, composition))


def _unread_settings(cfg: Config, overrides: Sequence[str]) -> Iterator[Problem]:
    """Settings on the command line of a strategy that no flag switches on, or of a control that is not made."""
    for name, key in MADE.items():
        set_here = any(override.lstrip("+").startswith(f"task.{key}=") for override in overrides)
        if set_here and cfg.task.name is TaskName.transfer and controls_of(cfg.task).get(name) != FROM_VIDEO:
            yield Problem(
                what=f"task.{key}={getattr(cfg.task, key)} without task.controls.{name}=from_video",
                why="a control clip that is a file is taken as it is, so it would be ignored",
                works=f"task.controls.{name}=from_video with task.video=clip.mp4, or no task.{key}",
            )
    for direction in DIRECTIONS:
        for override in overrides:
            if override.lstrip("+").startswith(f"vae.{direction}.") and not is_parallel(cfg.vae, direction):
                yield Problem(
                    what=f"{override} with vae.parallel_{direction}=false",
                    why=f"without the flag every rank {direction}s the whole, so the setting would be ignored",
                    works=f"vae.parallel_{direction}=true beside it",
                )


def check(cfg: Config) -> Checked:
    """What a check finds out of `cfg`, whose structure is right. Raises ConfigError with every problem of it."""
    clip, vae = clip_of(cfg), dict[Direction, VaePlan]()
    found = [problem for one in CHECKS for problem in one(cfg, clip)]
    found += check_actions(cfg)
    for direction in directions(cfg) if replica_ranks(cfg.topology) else ():
        if found and not is_parallel(cfg.vae, direction):
            continue  # the reference works with any clip and ranks that nothing else is wrong with
        try:
            vae[direction] = _vae(cfg, direction)
        except ConfigError as error:
            found.extend(error.problems)
    found += [problem for one in (_output, _job) for problem in one(cfg)]
    if cfg.model.trained.when_outside == "refuse":
        found.extend(outside(cfg))
    if found:
        raise ConfigError(found)
    return Checked(cfg, vae)


def located(problems: Sequence[Problem], composition: Composition) -> Sequence[Problem]:
    """`problems` with the file or override that set each key named in them, as far as that is known."""
    traced = composition.traced()
    if traced is None:
        return problems
    return [replace(problem, set_by=tuple(_origins(problem.what, traced))) for problem in problems]


def _origins(words: str, traced: Provenance) -> Iterator[str]:
    for key in dict.fromkeys(re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+", words)):
        # A strategy's node was set by whoever chose what it is built from.
        if chain := traced.chain(key) or traced.chain(f"{key}._target_"):
            through = f" ({chain[-1].key})" if len(chain) > 1 else ""
            yield f"{key} by {chain[-1].winner.place}{through}"


def _model(cfg: Config) -> Iterator[Problem]:
    model = cfg.model
    path = model.path
    if model.transformer.sound_gen and model.transformer.sound_dim is None:
        yield Problem(
            what="model.transformer.sound_gen=true with model.transformer.sound_dim=null",
            why="a head for sound needs the channels of a sound latent",
            works="model.transformer.sound_dim=64, as published, or model.transformer.sound_gen=false",
        )
    if path is None and cfg.model.repo is None and cfg.model.distilled_sigmas is not None:
        yield Problem(
            what=f"model.distilled_sigmas with model={cfg.model.name} and model.path=null",
            why="the checkpoint that is made on the spot is not distilled",
            works="a checkpoint of cosmos3 make-checkpoint --layout distilled FOLDER, with model.path=FOLDER",
        )
    if path is not None and is_hub_id(path):
        return
    for key in ("revision", "commit"):
        value = cfg.model.revision if key == "revision" else cfg.model.commit
        if value is not None:
            yield Problem(
                what=f"model.{key}={value} with model.path={'null' if path is None else path}",
                why="only a repository of the hub has revisions, so it would be ignored",
                works=f"model.path={cfg.model.repo or 'nvidia/Cosmos3-Nano'}, or no model.{key}",
            )


def _adapters(cfg: Config, adopted: Adopted | None) -> Iterator[Problem]:
    """What in `model.lora` is no adapter, or fits no weights of the checkpoint, as far as these are known.

    A model that is made on the spot is known by its numbers. A hub id that is not here yet is checked once it is.
    """
    weights = None
    if adopted is not None:
        weights = [placed.weight for placed in adopted.checkpoint.tensors["transformer"]]
    elif cfg.model.path is None and cfg.model.repo is None:
        numbers = {**plain(cfg.model.transformer), "latent_channel": cfg.model.vae.z_dim}
        weights = list(transformer_weights(numbers))
    for number, asked in enumerate(cfg.model.lora):
        try:
            adapter = read_adapter(asked, number)
            if weights is not None:
                adapter.check_fits(weights)
        except Refusal as refusal:
            yield refusal.problem


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
    yield from _input_settings(cfg)
    yield from _words(cfg)


def _input_settings(cfg: Config) -> Iterator[Problem]:
    """How a picture or a clip is read."""
    task, name = cfg.task, cfg.task.name.value
    if len(task.background) != 3 or not all(0 <= value <= 255 for value in task.background):
        yield Problem(
            what=f"task.background={task.background} is no colour",
            why="a colour is red, green and blue, each 0 to 255",
            works="task.background=[255,255,255]",
        )
    elif not read_by(task.name) and task.background != [255, 255, 255]:
        yield Problem(
            what=f"task.background={task.background} with task={name}",
            why="no picture is read that could be transparent, so it would be ignored",
            works="no task.background",
        )
    if CLIP not in read_by(task.name) and not task.resample:
        yield Problem(
            what=f"task.resample=false with task={name}",
            why="no clip is read, so it would be ignored",
            works="no task.resample",
        )


def _words(cfg: Config) -> Iterator[Problem]:
    """Words that nothing would come of."""
    task, scale = cfg.task, cfg.sampler.guidance_scale
    distilled = cfg.model.distilled_sigmas is not None  # see `_distilled`
    if not task.prompt.strip():
        yield Problem(
            what="task.prompt is empty",
            why="the model is told what to show by words only",
            works="task.prompt='a red kite'",
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
        return  # it follows from the picture, see `settled`
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
            why="an image is one frame, and a sound lasts as long as its clip"
            if task.modality == "image"
            else "the models make sound with videos from words, photographs and clips",
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
    """What a distilled checkpoint has of its own, and a run therefore cannot choose."""
    if cfg.model.distilled_sigmas is None or action_of(cfg.task) is not None:  # which it does not run at all
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


def _ranks(cfg: Config, clip: Clip) -> Iterator[Problem]:
    topology = cfg.topology
    ranks = topology.nodes * topology.ranks_per_node
    split = topology.dp * topology.cfg * topology.ulysses
    if ranks % split:
        axes = f"topology.cfg={topology.cfg} x topology.ulysses={topology.ulysses}"
        axes = axes if topology.dp == 1 else f"topology.dp={topology.dp} x {axes}"
        yield Problem(
            what=f"{axes} on {ranks} ranks",
            why=f"{ranks} ranks do not divide by {split}",
            works=f"topology.ranks_per_node={nearest_multiple(ranks, split)}"
            if topology.nodes == 1
            else "axes whose product divides the ranks",
        )
    if topology.dp > 1 and cfg.task.prompt_file is None:
        yield Problem(
            what=f"topology.dp={topology.dp} with one prompt",
            why="a replica makes clips of its own, and one prompt is one clip",
            works="task.prompt_file=prompts.txt with a prompt per line, or topology.dp=1",
        )


def _layout(cfg: Config, clip: Clip) -> Iterator[Problem]:
    """What the transformer's heads and the guidance allow, with the keys' full names."""
    model, topology = cfg.model.transformer, cfg.topology
    for problem in refused(
        lambda: check_layout(
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            cfg=1 if _has_own_passes(cfg) else topology.cfg,
            ulysses=topology.ulysses,
            guidance_scale=cfg.sampler.guidance_scale,
        )
    ):
        named = re.sub(r"(?<![.\w])(cfg|ulysses)=", r"topology.\1=", "\0".join((problem.what, problem.works)))
        what, works = re.sub(r"(?<![.\w])guidance_scale=", "sampler.guidance_scale=", named).split("\0")
        yield Problem(what=what, why=problem.why, works=works)


def _has_own_passes(cfg: Config) -> bool:
    """Whether the passes of a step are looked at elsewhere: in `_distilled`, or in `transfer_problems`."""
    return cfg.model.distilled_sigmas is not None or cfg.task.name is TaskName.transfer


def _weights(cfg: Config, clip: Clip) -> Iterator[Problem]:
    weights, layers = cfg.weights, cfg.model.transformer.num_hidden_layers
    placement, stay = weights.placement, weights.resident_layers
    if placement is Placement.sharded and replica_ranks(cfg.topology) == 1:
        yield Problem(
            what="weights.placement=sharded with one rank for a clip",
            why="there is no other rank to keep a part of the layers",
            works="weights=streamed, or more ranks on topology.cfg or topology.ulysses",
        )
    if placement not in (Placement.streamed, Placement.auto) and stay != 0:
        yield Problem(
            what=f"weights.resident_layers={'null' if stay is None else stay} with "
            f"weights.placement={placement.value}",
            why="only where layers are streamed do some of them stay, so it would be ignored",
            works="weights=streamed, or weights.resident_layers=0",
        )
    if stay is not None and stay > layers:
        yield Problem(
            what=f"weights.resident_layers={stay} with {layers} layers",
            why="no more layers can stay than there are",
            works=f"weights.resident_layers={layers}, which is weights=resident, or null for as many as fit",
        )


def _vae(cfg: Config, direction: Direction) -> VaePlan:
    """The plan of a direction. Raises ConfigError where its strategy refuses, or promises too little."""
    required = Exactness(cfg.vae.required_exactness)
    switched_on = is_parallel(cfg.vae, direction)
    name = settings_of(cfg.vae, direction)["_target_"].rpartition(".")[2] if switched_on else REFERENCE
    named = f"vae.{direction}={name}"
    try:
        planned = vae_plan(cfg, direction, strategy_of(cfg, direction))
    except Refusal as refusal:
        raise ConfigError([replace(refusal.problem, what=f"{named}: {refusal.problem.what}")]) from refusal
    if switched_on and not planned.plan.exactness.satisfies(required):
        problem = Problem(
            what=f"{named} is {planned.plan.exactness} with vae.required_exactness={required}",
            why=f"its output is not {required} equal to that of one rank",
            works=f"vae/{direction}=layer_pipeline, which is bitwise, or "
            f"vae.required_exactness={planned.plan.exactness}",
        )
        raise ConfigError([problem])
    return planned


def _job(cfg: Config) -> Iterator[Problem]:
    if cfg.plan.search and cfg.job.name != JobName.plan:
        yield Problem(
            what=f"plan.search=true with job={cfg.job.name.value}",
            why="only job=plan searches; a run has the layout that it was given",
            works="job=plan, or plan.search=false",
        )


def _output(cfg: Config) -> Iterator[Problem]:
    if cfg.output.preset not in X264_PRESETS:
        yield Problem(
            what=f"output.preset={cfg.output.preset} does not exist",
            why=f"the H.264 encoder's presets are: {', '.join(X264_PRESETS)}",
            works=did_you_mean(cfg.output.preset, X264_PRESETS, otherwise="output.preset=medium"),
        )


CHECKS = (
    *(_task, _clip, _sound, transfer_problems, _distilled, check_interval, check_cache, _ranks, _layout, _weights),
)


def refused(action: Callable[[], object]) -> Iterator[Problem]:
    """The problem that `action` refuses with, or nothing when it does not refuse."""
    try:
        action()
    except Refusal as refusal:
        yield refusal.problem
