"""The stages of a run, built from its config and its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cosmos3_pipeline.config.schema import Config, TaskName
from cosmos3_pipeline.errors import Refusal, did_you_mean
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.geometry import modalities_of
from cosmos3_pipeline.planning.plan import Plan
from cosmos3_pipeline.stages import STAGES
from cosmos3_pipeline.stages.actions import action_stages
from cosmos3_pipeline.stages.context import Stage
from cosmos3_pipeline.stages.decode import DecodeStage
from cosmos3_pipeline.stages.denoise import DenoiseStage
from cosmos3_pipeline.stages.encode import EncodeStage
from cosmos3_pipeline.stages.export import ExportStage
from cosmos3_pipeline.stages.rollout import RolloutStage
from cosmos3_pipeline.stages.sound import SoundStage
from cosmos3_pipeline.stages.text import TextStage
from cosmos3_pipeline.stages.transfer import TransferStage

# Makes a stage from the config and the plan. A factory that is sent to ranks must pickle, so it must be a function
# or class of a module.
StageFactory = Callable[[Config, Plan], Stage]
NO_OTHERS: Mapping[str, StageFactory] = MappingProxyType({})


def build_stages(config: Config, plan: Plan, others: Mapping[str, StageFactory] = NO_OTHERS) -> dict[str, Stage]:
    """The stages by their names in `STAGES`, in the order in which they run.

    A transfer, and a task with more actions than one chunk has, are made chunk after chunk. Their stage `decode`
    encodes, denoises and decodes each chunk in turn, so they have no stages `encode` and `denoise`.

    Stages can be replaced from Python, never from a composition: `others` maps a stage's name to its new factory.
    `jobs.generate.generate(prepared, output, stages=others)` sends the factories to every rank.

    Raises:
        Refusal: `others` has a name that no stage has.
    """
    for name in others:
        if name not in STAGES:
            raise Refusal(
                what=f"another stage for {name}",
                why=f"the stages of a run are: {', '.join(STAGES)}",
                works=did_you_mean(name, STAGES, otherwise=f"one of {', '.join(STAGES)}"),
            )
    action = action_of(config.task)
    factories: dict[str, StageFactory] = {
        "text": lambda config, plan: TextStage(config.task, config.sampler),
        "encode": lambda config, plan: EncodeStage(config.task),
        "denoise": lambda config, plan: DenoiseStage(
            config.sampler, modalities=modalities_of(config), stays=plan.weights.stays
        ),
        "sound": lambda config, plan: SoundStage(config.task),
        "decode": lambda config, plan: DecodeStage(),
        "export": lambda config, plan: ExportStage(
            config.output, modality=config.task.modality, writing=plan.writing
        ),
    }
    if action is not None:
        factories |= action_stages(action)
    found = {name: {**factories, **others}[name] for name in stages_of(config, plan)}
    chunked = transfer if config.task.name is TaskName.transfer else rollout if plan.chunks.count > 1 else None
    if chunked is not None:
        found["decode"] = others.get("decode", chunked)
        for name in ("encode", "denoise"):
            del found[name]
    return {name: make(config, plan) for name, make in found.items()}


def stages_of(config: Config, plan: Plan) -> tuple[str, ...]:
    """The stages of this run, in order: no `sound` without sound, and no `decode` without a clip."""
    makes = {"sound": config.task.sound, "decode": "decode" in plan.vae}
    return tuple(name for name in STAGES if makes.get(name, True))


def transfer(config: Config, plan: Plan) -> Stage:
    """The stage that makes a clip from control clips, chunk after chunk."""
    return TransferStage(config.task, config.sampler, config.output, plan.chunks, stays=plan.weights.stays)


def rollout(config: Config, plan: Plan) -> Stage:
    """The stage that makes a clip from input actions, chunk after chunk."""
    action = action_of(config.task)
    assert action is not None
    return RolloutStage(config.task, config.sampler, config.output, action, plan.chunks, stays=plan.weights.stays)
