"""The ranks of `job=rehearse`, one after the other in this process: the real stages on tensors without values."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from diffusers.utils import logging as diffusers_logging

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.schema import Config, Device, Placement
from cosmos3_pipeline.distributed.mesh import REPLICA
from cosmos3_pipeline.jobs.rank import Run, components, context_of
from cosmos3_pipeline.models.form import form_of
from cosmos3_pipeline.planning.geometry import replica_ranks
from cosmos3_pipeline.planning.plan import Plan, make_plan
from cosmos3_pipeline.rehearsal.findings import (
    Line,
    RankFound,
    Rehearsed,
    StageFound,
    findings_of,
    ranks_of_a_kind,
)
from cosmos3_pipeline.rehearsal.messages import Log, RehearsedMesh, unmet
from cosmos3_pipeline.rehearsal.meter import Measured, StageMeter
from cosmos3_pipeline.rehearsal.places import Place
from cosmos3_pipeline.rehearsal.tracker import ACCELERATOR, Tracker, rehearsing
from cosmos3_pipeline.stages.build import build_stages
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.text import TextStage

# Steps that are run; those between the first and the last do the same.
STEPS = 3


def rehearse_ranks(config: Config, ranks: Sequence[int] | None) -> Rehearsed:
    """Rehearse `ranks` of a checked config, or one of each kind, and hold them against its plan.

    Every topology counts as accelerators. Raises Refusal for a strategy that cannot be honoured.
    """
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # what it raises is told as a finding
    notes, checkpoint = tuple(_notes(config)), form_of(config.model)
    config = on_accelerators(config)
    plan = make_plan(config)
    tokens = tokens_of(config, plan, checkpoint)
    # With the weights where they are without knowing the tokens, as a run's plan has them.
    plan = make_plan(_with_weights(config, plan), text_tokens=tokens)
    alike = ranks_of_a_kind(plan) if ranks is None else {rank: [rank] for rank in ranks}
    found, logs = list[RankFound](), dict[int, Log]()
    for rank in alike:
        logs[rank] = Log()
        found.append(_rehearse(config, plan, checkpoint, rank, logs[rank]))
    # Of ranks that are alike only one is there, so a peer may be missing; those that are there are asked.
    findings = tuple(findings_of(plan, found, list(unmet(logs))))
    return Rehearsed(plan, tuple(found), alike, findings, notes)


def on_accelerators(config: Config) -> Config:
    """`config` as it is rehearsed: on accelerators, and without what follows the last stage."""
    return replace(
        config,
        topology=replace(config.topology, device=Device.cuda),
        output=replace(config.output, against_replicated=False, latents=False),
    )


def _with_weights(config: Config, plan: Plan) -> Config:
    weights = plan.weights
    layers = weights.resident_layers if weights.placement is Placement.streamed else None
    chosen = replace(config.weights, placement=weights.placement, resident_layers=layers)
    return replace(config, weights=chosen)


def tokens_of(config: Config, plan: Plan, checkpoint: CheckpointInfo) -> tuple[int, int]:
    """The lengths of the prompt and of the negative prompt, as the transformer is given them."""
    guided = replace(config, sampler=replace(config.sampler, guidance_scale=2.0))  # so that both are asked for
    run = _run(guided, plan, checkpoint, RehearsedMesh(), StageMeter(Tracker(), []))
    context = context_of(run, guided, Path())
    text = build_stages(guided, plan)["text"]
    assert isinstance(text, TextStage)
    text.tokenize(context)
    prompt, negative = (len(input_ids) for input_ids, _ in text.prompts(context))
    return prompt, negative


def _run(config: Config, plan: Plan, checkpoint: CheckpointInfo, mesh: RehearsedMesh, meter: StageMeter) -> Run:
    ledgers = [mesh.comm(axis).ledger for axis in ("cfg", "ulysses", REPLICA)]
    meter.watch(ledgers)
    parts = components(config, plan, ACCELERATOR, mesh, ledgers, meter, checkpoint=checkpoint)
    return Run(config, plan, {}, ACCELERATOR, mesh, parts, ledgers, base_bytes=0, origin=None)


def _rehearse(config: Config, plan: Plan, checkpoint: CheckpointInfo, rank: int, log: Log) -> RankFound:
    topology, tracker = config.topology, Tracker()
    spare = replica_ranks(topology) // (topology.cfg * topology.ulysses)
    mesh = RehearsedMesh(
        dp=topology.dp, spare=spare, cfg=topology.cfg, ulysses=topology.ulysses, place=rank, log=log
    )
    meter, raised, left = StageMeter(tracker, []), None, 0
    short = replace(config, sampler=replace(config.sampler, steps=min(config.sampler.steps, STEPS)))
    try:
        with rehearsing(tracker):
            run = _run(short, plan, checkpoint, mesh, meter)
            context = replace(context_of(run, short, Path()), measure=meter.stage, reporter=meter)
            _play(short, plan, context)
            left = tracker.live
    # Whatever the code raises on a rank is what the rehearsal is for.
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)
        where = [Place(line.filename, line.lineno or 0) for line in last]
        raised = f"{type(error).__name__}: {error} ({_innermost(where)})"
    meter.finish(steps=config.sampler.steps)
    stages = {name: _found(measured) for name, measured in meter.stages.items() if name in plan.ranks[rank].stages}
    misplaced = tracker.misplaced + Counter(log.on_host)
    return RankFound(rank, stages, left, _lines(misplaced.items()), raised)


def _play(config: Config, plan: Plan, context: RunContext) -> None:
    """The stages as `make_clip` calls them; frames are read and dropped in place of the export."""
    for name, stage in build_stages(config, plan).items():
        if name != "export":
            stage(context)
    assert context.frames is not None
    for _ in context.frames:
        pass


def _innermost(places: Sequence[Place]) -> str:
    ours = [place for place in places if place.is_ours]
    return (ours or list(places))[-1].name


def _found(measured: Measured) -> StageFound:
    counts = measured.counts
    return StageFound(
        peak_bytes=measured.peak_bytes,
        holders=_lines(measured.holders),
        sent_bytes=counts.sent_bytes,
        sent_messages=counts.sent_messages,
        kernels=counts.kernels,
        moved_bytes=counts.moved_bytes,
        waits=_lines(measured.waits.items()),
        repeated=_lines(measured.repeated.items()),
    )


def _lines(counted: Iterable[tuple[Place, int]]) -> tuple[Line, ...]:
    return tuple(Line(place.name, place.text, amount) for place, amount in counted)


def _notes(config: Config) -> Iterable[str]:
    """What the reader of a rehearsal has to know of it."""
    if config.sampler.steps > STEPS:
        yield f"{STEPS} of {config.sampler.steps} denoising steps were run; each other one counts as the second"
    if config.output.against_replicated:
        yield "the second decode of output.against_replicated is not rehearsed, nor the weights that it needs"
    if config.topology.device is Device.cpu:
        yield "rehearsed and planned as on accelerators; what a CPU needs is the plan's own number, see job=plan"
    if config.model.dtype.value == "float32":
        yield (
            "attention in float32 with fewer keys than queries counts as a fused kernel; PyTorch on CUDA may take "
            "one that makes a matrix of all pairs"
        )
