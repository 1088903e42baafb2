"""Runs the ranks of `job=rehearse` one after the other in this process: real stages on tensors without values."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diffusers.utils import logging as diffusers_logging

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.schema import Config, Device, Placement, SamplerConfig, TaskConfig
from cosmos3_pipeline.distributed.mesh import REPLICA, SEQUENCE
from cosmos3_pipeline.jobs.rank import Run, components, context_of, encode_together
from cosmos3_pipeline.models.form import folder_of, form_of
from cosmos3_pipeline.planning.geometry import grid_of, replica_ranks
from cosmos3_pipeline.planning.plan import Plan, RankPlan, make_plan
from cosmos3_pipeline.rehearsal.findings import (
    KernelFound,
    RankFound,
    Rehearsed,
    SourceLine,
    StageFound,
    findings_of,
    rehearsed_ranks,
)
from cosmos3_pipeline.rehearsal.messages import Log, RehearsedMesh
from cosmos3_pipeline.rehearsal.meter import Measured, StageMeter
from cosmos3_pipeline.rehearsal.places import Place
from cosmos3_pipeline.rehearsal.replay import faults_of, not_replayed
from cosmos3_pipeline.rehearsal.roofline import by_kind, summed
from cosmos3_pipeline.rehearsal.tracker import ACCELERATOR, Tracker, rehearsing
from cosmos3_pipeline.stages.build import StageFactory, build_stages
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.text import TextStage
from cosmos3_pipeline.stages.words import read_lines

# Denoising steps that are run, because all steps between the first and the last are alike. Distilled checkpoints
# and guidance intervals run all steps, because their steps are not alike.
STEPS = 3
# Clips of a prompt file that are run. Each clip after the first starts with memory that the previous clip left.
CLIPS = 2
# Kernels of a stage that the report names.
COSTLIEST = 5
# Code lines that the report names for memory that is still held after the last frame.
HELD = 5
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Script:
    """The input of every rehearsed rank: a config on accelerators, its plan, the form of its checkpoint.

    `words` are the prompts of a replica's clips. Each prompt is padded to `tokens` tokens.
    """

    config: Config
    plan: Plan
    checkpoint: CheckpointInfo
    words: tuple[str, ...]
    tokens: int

    @property
    def stages(self) -> dict[str, StageFactory]:
        """The stages that a rehearsal replaces."""
        if self.config.task.prompt_file is None:
            return {}
        return {"text": lambda config, plan: EvenText(config.task, config.sampler, self.tokens)}


class EvenText(TextStage):
    """Pads the prompt of every clip to `tokens` tokens, so that one plan is true for all clips."""

    def __init__(self, task: TaskConfig, sampler: SamplerConfig, tokens: int) -> None:
        super().__init__(task, sampler)
        self._tokens = tokens

    def tokenize(self, context: RunContext) -> None:
        """Turn the words into tokens and repeat the last token."""
        super().tokenize(context)
        ids = list(context.state.get("cond_input_ids"))
        context.state.set("cond_input_ids", ids + ids[-1:] * (self._tokens - len(ids)))


def rehearse_ranks(config: Config, ranks: Sequence[int] | None, tell: Tell = lambda words: None) -> Rehearsed:
    """Rehearse `ranks` of a checked config, or by default those of `rehearsed_ranks`, and compare with its plan.

    Every topology is rehearsed as if it had accelerators. `tell` gets progress words. Raises Refusal for a
    strategy that cannot be used.
    """
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # its exceptions are reported as findings
    script = script_of(on_accelerators(config))
    alike = rehearsed_ranks(script.plan, ranks)
    logs = {rank: Log() for rank in alike}
    found = []
    for number, (rank, log) in enumerate(logs.items(), 1):
        place = f"rank {rank} ({number} of {len(logs)})"
        found.append(_rehearse(script, rank, log, partial(_tell_stage, tell, place)))
    findings = tuple(findings_of(script.plan, found, faults_of(logs)))
    notes = (*_notes(config, script), *_not_replayed(logs))
    return Rehearsed(script.plan, tuple(found), alike, findings, notes)


def _tell_stage(tell: Tell, place: str, stage: str) -> None:
    tell(f"{place}: {stage}")


def script_of(config: Config) -> Script:
    """The script of `config`. All clips of a replica have the longest line of the prompt file as their prompt."""
    plan, checkpoint = make_plan(config), form_of(config.model, sound=config.task.sound)
    words = [config.task.prompt]
    if config.task.prompt_file is not None:
        longest = max(read_lines(config.task.prompt_file).values(), key=len)
        words = [f"{longest} {number}" for number in range(plan.clips)]  # so that no two prompts are equal
    lengths = [tokens_of(_with_words(config, each), plan, checkpoint) for each in words]
    tokens, negative = max(prompt for prompt, _ in lengths), lengths[0][1]
    # The placement of the weights is chosen before the tokens are known, as in the plan of a run.
    plan = make_plan(_with_weights(config, plan), text_tokens=(tokens, negative))
    return Script(config, plan, checkpoint, tuple(words), tokens)


def on_accelerators(config: Config) -> Config:
    """`config` as it is rehearsed: on accelerators, and without the work after the last stage."""
    # Which passes a cache skips depends on values, and a rehearsal has none. With threshold 0 it skips none, as
    # planned.
    every = replace(config.sampler.cache, threshold=0.0)
    return replace(
        config,
        sampler=replace(config.sampler, cache=every),
        topology=replace(config.topology, device=Device.cuda),
        output=replace(config.output, against_replicated=False, latents=False),
    )


def _with_weights(config: Config, plan: Plan) -> Config:
    weights = plan.weights
    layers = weights.resident_layers if weights.placement is Placement.streamed else None
    chosen = replace(config.weights, placement=weights.placement, resident_layers=layers)
    return replace(config, weights=chosen)


def _with_words(config: Config, words: str) -> Config:
    return replace(config, task=replace(config.task, prompt=words))


def tokens_of(config: Config, plan: Plan, checkpoint: CheckpointInfo) -> tuple[int, int]:
    """The lengths in tokens of the prompt and of the negative prompt, as the transformer gets them."""
    guided = replace(config, sampler=replace(config.sampler, guidance_scale=2.0))  # guidance needs both prompts
    script = Script(guided, plan, checkpoint, (), 0)
    run = _run(script, RehearsedMesh(), StageMeter(Tracker(plan.accelerator)))
    context = context_of(run, guided, Path())
    text = build_stages(guided, plan)["text"]
    assert isinstance(text, TextStage)
    text.tokenize(context)
    prompt, negative = (len(input_ids) for input_ids, _ in text.prompts(context))
    return prompt, negative


def _run(script: Script, mesh: RehearsedMesh, meter: StageMeter) -> Run:
    ledgers = [mesh.comm(axis).ledger for axis in ("cfg", SEQUENCE, REPLICA)]
    config, plan = script.config, script.plan
    parts = components(config, plan, ACCELERATOR, mesh, ledgers, meter, checkpoint=script.checkpoint)
    return Run(config, plan, script.stages, ACCELERATOR, mesh, parts, ledgers, base_bytes=0, origin=None)


def _rehearse(script: Script, rank: int, log: Log, tell: Tell) -> RankFound:
    topology, tracker = script.config.topology, Tracker(script.plan.accelerator)
    grid = grid_of(topology)
    mesh = RehearsedMesh(
        dp=topology.dp,
        spare=replica_ranks(topology) // (topology.cfg * grid.ranks),
        cfg=topology.cfg,
        cp=(grid.rows, grid.columns),
        ulysses=grid.ulysses,
        place=rank,
        log=log,
    )
    steps = steps_of(script.config)
    short = replace(script.config, sampler=replace(script.config.sampler, steps=steps))
    meters, raised, left = [StageMeter(tracker) for _ in script.words[:CLIPS]], None, Counter[Place]()
    try:
        with rehearsing(tracker):
            run = _run(replace(script, config=short), mesh, meters[0])
            if short.task.prompt_file is not None:
                tell("text of all clips")
                with meters[0].watching(run.ledgers).stage("text"):
                    encode_together(run, script.words)
            for words, meter in zip(script.words, meters, strict=False):
                _play(run, _with_words(short, words), meter.watching(run.ledgers), tell)
                meter.finish(steps=script.config.sampler.steps, chunks=script.plan.chunks.count)
            left = tracker.live_by_place
    # Any exception of the code on a rank is a finding of the rehearsal.
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)
        where = [Place(line.filename, line.lineno or 0) for line in last]
        raised = f"{type(error).__name__}: {error} ({_innermost(where)})"
    clips = [_stages_found(meter, script.plan.ranks[rank]) for meter in meters]
    for later in clips[1:]:
        later.pop("text", None)  # the prompts of all clips are encoded before the first clip
    return RankFound(
        rank=rank,
        stages=clips[0],
        second_clip=clips[1] if len(clips) > 1 else {},
        left_bytes=left.total(),
        left=_lines(left.most_common(HELD)),
        pinned_bytes=tracker.most_pinned_bytes,
        waits_between=_lines(sum((meter.between for meter in meters), Counter[Place]()).items()),
        misplaced=_lines((tracker.misplaced + Counter(log.on_host)).items()),
        raised=raised,
    )


def steps_of(config: Config) -> int:
    """The number of denoising steps that a rehearsal of `config` runs."""
    steps = config.sampler.steps
    intervals = config.sampler.guidance_interval, config.task.control_guidance_interval
    differ = config.model.distilled_sigmas is not None or any(one is not None for one in intervals)
    return steps if differ else min(steps, STEPS)


def _play(run: Run, config: Config, meter: StageMeter, tell: Tell) -> None:
    """Call the stages as `make_clip` does. Frames are read and dropped instead of exported."""
    context = replace(context_of(run, config, Path()), measure=meter.stage, reporter=meter)
    for name, stage in build_stages(config, run.plan, run.stages).items():
        if name != "export":
            tell(name)
            stage(context)
    for _ in context.frames or ():
        pass


def _innermost(places: Sequence[Place]) -> str:
    ours = [place for place in places if place.is_ours]
    return (ours or list(places))[-1].name


def _stages_found(meter: StageMeter, planned: RankPlan) -> dict[str, StageFound]:
    return {name: _found(measured) for name, measured in meter.stages.items() if name in planned.stages}


def _found(measured: Measured) -> StageFound:
    counts = measured.counts
    total = summed(counts.works.values())
    costliest = sorted(counts.works.items(), key=lambda item: -item[1].seconds)[:COSTLIEST]
    return StageFound(
        peak_bytes=measured.peak_bytes,
        holders=_lines(measured.holders),
        sent_bytes=counts.sent_bytes,
        sent_messages=counts.sent_messages,
        kernels=total.calls,
        moved_bytes=total.moved_bytes,
        flops=total.flops,
        roofline_seconds=total.seconds,
        kinds={kind: work._asdict() for kind, work in by_kind(counts.works).items()},
        costliest=tuple(
            KernelFound(kernel.name, kernel.place.name, kernel.place.text, *work) for kernel, work in costliest
        ),
        copied_bytes=counts.copied_bytes,
        waits=_lines(measured.waits.items()),
        repeated=_lines(measured.repeated.items()),
        left=_lines(measured.left.items()),
    )


def _lines(counted: Iterable[tuple[Place, int]]) -> tuple[SourceLine, ...]:
    return tuple(SourceLine(place.name, place.text, amount) for place, amount in counted)


def _notes(config: Config, script: Script) -> Iterable[str]:
    """Notes for the reader: how the rehearsal differs from a run."""
    if config.sampler.steps > (steps := steps_of(config)):
        yield f"{steps} of {config.sampler.steps} denoising steps were run; each other one counts as the second"
    if config.task.prompt_file is not None:
        run = min(len(script.words), CLIPS)
        yield (
            f"{run} of the {len(script.words)} clips of a replica were run, and the text of all was encoded; each "
            f"counts as the longest line of {config.task.prompt_file}, with {script.tokens:,} tokens"
        )
    if config.model.repo is not None and folder_of(config.model, sound=config.task.sound) is None:
        yield "the checkpoint is not on this machine: the words are cut into tokens by the toy's tokenizer"
    if config.output.against_replicated:
        yield "the second decode of output.against_replicated is not rehearsed, nor the weights that it needs"
    if config.topology.device is Device.cpu:
        yield "rehearsed and planned as on accelerators; what a CPU needs is the plan's own number, see job=plan"
    if config.model.dtype.value == "float32":
        yield (
            "attention in float32 with fewer keys than queries counts as a fused kernel; PyTorch on CUDA may take "
            "one that makes a matrix of all pairs"
        )


def _not_replayed(logs: dict[int, Log]) -> Iterable[str]:
    """A note on messages that were not replayed, because not all ranks that exchange them were rehearsed."""
    missing = not_replayed(logs)
    if missing:
        absent = sorted({rank for ranks in missing.values() for rank in ranks})
        groups = sorted({name.partition(" #")[0] for name in missing})
        yield (
            f"who waits for whom was not replayed in {', '.join(groups)}, because ranks {absent} were not "
            "rehearsed; messages between rehearsed ranks were compared. rehearse.ranks with all of them replays it"
        )
