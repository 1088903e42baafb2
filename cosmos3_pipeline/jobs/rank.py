"""One rank of `job=generate`: join the world, load the model once, and make the clips of this rank's replica."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from torch import Tensor

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import Config, Dtype, ModelConfig
from cosmos3_pipeline.denoise.texts import Prompt
from cosmos3_pipeline.distributed.device import numerics
from cosmos3_pipeline.distributed.launch import joined_world
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.distributed.life import Life
from cosmos3_pipeline.distributed.mesh import REPLICA, SEQUENCE, RankMesh
from cosmos3_pipeline.errors import Fault
from cosmos3_pipeline.jobs.log import also_to, is_kept
from cosmos3_pipeline.jobs.metrics import SCHEMA_VERSION, Meter, combine, held_bytes, kernels, versions
from cosmos3_pipeline.jobs.origin import Origin
from cosmos3_pipeline.jobs.prompts import PromptLine, line_folder, write_index
from cosmos3_pipeline.models.loading import CheckpointVae, Components, open_checkpoint
from cosmos3_pipeline.planning.geometry import modalities_of, replica_ranks
from cosmos3_pipeline.planning.plan import DIRECTIONS, Plan
from cosmos3_pipeline.planning.vae import reference
from cosmos3_pipeline.stages.build import StageFactory, build_stages, stages_of
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.decode import vae_latents
from cosmos3_pipeline.stages.files import write_whole
from cosmos3_pipeline.stages.likeness import likeness
from cosmos3_pipeline.stages.progress import Bars, Reporter, Silent
from cosmos3_pipeline.stages.text import TextStage
from cosmos3_pipeline.stages.words import read_lines
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Strategy

# A rank that waits for another rank gives up after this many seconds, or this many times the planned seconds of
# the run, whichever is longer.
LEAST_PATIENCE, SLOWER_THAN_PLANNED = 3600.0, 10


@dataclass(frozen=True)
class Run:
    """The work of one rank, and the objects that it keeps from clip to clip: mesh, components and ledgers."""

    config: Config
    plan: Plan
    stages: Mapping[str, StageFactory]
    device: torch.device
    mesh: RankMesh
    components: Components
    ledgers: list[Ledger]
    base_bytes: int  # the bytes that the process held before loading anything
    origin: Origin | None

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files of its replica."""
        return self.mesh.rank(REPLICA) == 0

    @property
    def shows(self) -> bool:
        """Whether this rank shows its progress to the user."""
        return self.writes and self.mesh.rank("dp") == 0


def run_rank(
    config: Config, plan: Plan, stages: Mapping[str, StageFactory], origin: Origin | None, output: str | None
) -> None:
    """Run the `plan` of `config` as the rank that the environment names. All ranks call it together.

    `stages` are replacements, see `build_stages`. `output` is the folder of the run. Under torchrun each rank
    composes its own config; ranks other than rank 0 pass None and get the folder from rank 0.
    """
    with rank_of(config, plan, output) as (device, mesh, directory):
        Life.stage = "load"
        base_bytes = held_bytes(device)
        ledgers = [mesh.comm(axis).ledger for axis in ("cfg", SEQUENCE, REPLICA)]
        parts = components(config, plan, device, mesh, ledgers, reporter_of(mesh))
        run = Run(config, plan, stages, device, mesh, parts, ledgers, base_bytes, origin)
        if config.task.prompt_file is None:
            make_clip(run, directory)
        else:
            make_clips(run, config.task.prompt_file, directory)


@contextmanager
def rank_of(config: Config, plan: Plan, output: str | None) -> Iterator[tuple[torch.device, RankMesh, Path]]:
    """Join the world of `config`: the device of this rank, its place in the mesh, and the directory of the run.

    The time that ranks wait for each other depends on `plan`, because a rank may have more clips or a slower disk.

    All ranks enter it together. Raises ValueError if a rank has composed another config.
    """
    # diffusers' blocks log each exception with a traceback. The code that catches the exception reports it
    # instead.
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    topology = config.topology
    patience = max(LEAST_PATIENCE, SLOWER_THAN_PLANNED * plan.clips * sum(plan.seconds.values()))
    with joined_world(
        device=topology.device.value,
        threads=topology.threads_per_rank,
        patience=patience,
        silence=topology.patience_seconds,
    ) as device:
        agreed = everyones((output, digest_of(config)))
        refuse_other_configs([digest for _, digest in agreed])
        mesh = RankMesh.build(
            dp=topology.dp,
            cfg=topology.cfg,
            cp=(topology.cp[0], topology.cp[1]),
            ulysses=topology.ulysses,
            device=device,
            patience=timedelta(seconds=patience),
        )
        directory = Path(str(agreed[0][0]))
        # Nobody else keeps the output of a rank 0 that was started from here. Under torchrun it keeps its own log.
        first = dist.is_initialized() and dist.get_rank() == 0
        with also_to(directory) if first and not is_kept() else nullcontext():
            yield device, mesh, directory
        everyones(None)  # a barrier: no rank closes its mesh while another still needs it
        mesh.close()


def make_clips(run: Run, prompt_file: str, directory: Path) -> None:
    """Make one clip per line of the prompt file. Replicas take lines in turn. A failed line stops no other."""
    lines = read_lines(prompt_file)
    done: list[PromptLine] = []
    own = dict(list(lines.items())[run.mesh.rank("dp") :: run.mesh.size("dp")])
    encode_together(run, list(own.values()))
    for number, prompt in own.items():
        folder = line_folder(directory, number)
        config = replace(run.config, task=replace(run.config.task, prompt=prompt))
        failed = None
        try:
            make_clip(replace(run, config=config), folder)
        except Fault:
            raise  # a fault of the weights comes from no line, and other ranks may not see it
        # An error of one line (its words, its latents) is reported with the line. A lost rank still ends the run.
        except ValueError as error:
            failed = str(error)
        done.append(PromptLine(number, prompt, folder.name, failed))
    everything = everyones(done)
    if run.shows:
        write_index(directory, {line.number: line for part in everything for line in part})


def encode_together(run: Run, prompts: Sequence[str]) -> None:
    """Encode the prompts of all clips in one pass over the text weights. A wrong prompt fails in `make_clips`."""
    found: list[Prompt] = []
    with reporter_of(run.mesh).track("prompts read", len(prompts)) as advance:
        for prompt in prompts:
            config = replace(run.config, task=replace(run.config.task, prompt=prompt))
            text = build_stages(config, run.plan, run.stages)["text"]
            if not isinstance(text, TextStage):
                return  # a replaced stage encodes prompts in its own way
            context = context_of(run, config, Path())
            with suppress(ValueError):  # `make_clips` reports it in the turn of this line
                text.tokenize(context)
                found += text.prompts(context)
            advance()
    run.components.encode_texts(found, wait=True)


def context_of(run: Run, config: Config, directory: Path) -> RunContext:
    """The context for one run of the stages, which writes to `directory`."""
    return RunContext(
        components=run.components,
        clip=run.plan.clip,
        chunks=run.plan.chunks,
        fps=config.task.fps,
        directory=directory,
        mesh=run.mesh,
        reporter=reporter_of(run.mesh),
    )


def make_clip(run: Run, directory: Path) -> None:
    """Run the stages once, on all ranks of the replica. Its root writes the picture and metrics.json."""
    started = time.perf_counter()
    meter = Meter(run.device, stages_of(run.config, run.plan), run.ledgers)
    if run.writes:
        directory.mkdir(parents=True, exist_ok=True)
    context = replace(context_of(run, run.config, directory), measure=meter.stage)
    compares = run.config.output.against_replicated
    kept: list[Tensor] = []
    for name, stage in build_stages(run.config, run.plan, run.stages).items():
        Life.stage = name
        stage(context)
        if name == "decode" and compares:
            assert context.frames is not None
            context.frames = keep(context.frames, kept)
    loads = {name: asdict(load) for name, load in run.components.loads.items()}
    beyond_bytes = meter.peak_bytes - run.base_bytes
    measured = everyones((meter.as_dict(), loads, beyond_bytes), run.mesh.group(REPLICA))
    seconds = time.perf_counter() - started
    against = against_replicated(context, kept) if compares else None
    if run.writes:
        stages, loading = (combine([rank[part] for rank in measured]) for part in (0, 1))
        report = metrics(run.config, run.plan, context, stages, seconds)
        report |= {"loading": loading, "against_replicated": against}
        report["kernels"] = kernels(run.device, torch_dtype(run.config.model.dtype))
        report["origin"] = None if run.origin is None else asdict(run.origin)
        report["beyond_bytes"] = max(beyond for _, _, beyond in measured)
        write_whole(directory / "metrics.json", json.dumps(report, indent=2))


def keep(chunks: Iterator[Tensor], kept: list[Tensor]) -> Iterator[Tensor]:
    """Yield the chunks as they come, and append a copy of each to `kept`."""
    for chunk in chunks:
        kept.append(chunk.cpu())
        yield chunk


def against_replicated(context: RunContext, kept: list[Tensor]) -> dict[str, Any] | None:
    """How alike the run's frames are to the frames of a replicated decode. None on ranks other than the root.

    Decodes the same latents again, outside of the measured stages. All ranks of the replica call it together.
    """
    vae = context.components.pipeline.vae
    alone, group = reference(), context.mesh.group(REPLICA)
    replicated = ParallelVAE(vae.autoencoder, encode=alone, decode=alone, group=group)
    frames = [frame for chunk in replicated.decode_stream(vae_latents(context)) for frame in chunk.cpu().numpy()]
    if not context.is_root:
        return None
    found = likeness(frames, (frame for chunk in kept for frame in chunk.numpy()))
    assert found is not None  # the same latents give the same sizes
    return asdict(found)


def reporter_of(mesh: RankMesh) -> Reporter:
    """The reporter for this rank's progress. Only one rank shows its progress."""
    return Bars(Console(stderr=True)) if mesh.rank(REPLICA) == mesh.rank("dp") == 0 else Silent()


def components(
    config: Config,
    plan: Plan,
    device: torch.device,
    mesh: RankMesh,
    ledgers: list[Ledger],
    reporter: Reporter,
    *,
    checkpoint: CheckpointInfo | None = None,
) -> Components:
    """The model of `config`, or of `checkpoint`. Its VAE runs on the ranks of the clip as `plan` says."""
    checkpoint = checkpoint or checkpoint_of(config)
    # A replicated decode needs the whole VAE. Otherwise a rank reads only the weights of its share.
    whole = config.output.against_replicated
    source = None if whole else CheckpointVae(checkpoint)
    vae_dtype = torch_dtype(config.model.vae_dtype)

    def wrap(autoencoder: AutoencoderKLWan) -> ParallelVAE:
        parallel = ParallelVAE(
            autoencoder,
            encode=strategy_for(plan, "encode"),
            decode=strategy_for(plan, "decode"),
            group=mesh.group(REPLICA),
            weights=source,
            dtype=vae_dtype,
            device=device,
            comm=mesh.new_comm(REPLICA),
        )
        ledgers.append(parallel.ledger)
        if not whole:
            # Weights for a later direction are read later, because denoising needs their memory.
            first: Direction = "encode" if "encode" in plan.vae else "decode"
            parallel.release(**{first: plan.vae[first].shape})
        return parallel

    return Components(
        checkpoint,
        dtype=torch_dtype(config.model.dtype),
        vae_dtype=vae_dtype,
        device=device,
        flow_shift=config.sampler.flow_shift,
        wrap_vae=wrap,
        vae_source=source,
        weights=plan.weights,
        modalities=modalities_of(config),
        mesh=mesh,
        track=reporter.track,
    )


def strategy_for(plan: Plan, direction: Direction) -> Strategy:
    """The VAE's strategy for `direction`, even if the task does not use that direction."""
    return plan.vae[direction].strategy if direction in plan.vae else plan.unused[direction]


def checkpoint_of(config: Config) -> CheckpointInfo:
    """The checkpoint that a rank opens. If it is on the hub, `model.commit` of it is on this machine already."""
    model = config.model
    dimensions = {name: plain(getattr(model, name)) for name in ("transformer", "vae", "sound_tokenizer")}
    return open_checkpoint(
        model.path, revision=model.commit, lora=model.lora, sound=config.task.sound, **dimensions
    )


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """torch's dtype with the name of `dtype`."""
    found: torch.dtype = getattr(torch, dtype.value)
    return found


def vae_report(plan: Plan, direction: Direction) -> dict[str, str]:
    """The entry of metrics.json for the VAE's `direction`. A task need not use both directions."""
    if direction not in plan.vae:
        strategy = plan.unused[direction]
        return {"strategy": strategy.name, "exactness": strategy.exactness.value}
    planned = plan.vae[direction].plan
    return {"strategy": planned.strategy, "exactness": planned.exactness.value, "note": planned.note}


def metrics(
    config: Config, plan: Plan, context: RunContext, stages: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The content of metrics.json. Later versions add keys and never rename them."""
    topology, picture = config.topology, context.picture
    return {
        "schema_version": SCHEMA_VERSION,
        "model": config.model.name,
        "task": config.task.name.value,
        "seed": config.sampler.seed,
        # These are None if the task makes no picture, no sound or no actions.
        "picture": None if picture is None else picture.path.name,
        "num_frames": None if picture is None else picture.num_frames,
        "frames_sha256": None if picture is None else picture.frames_sha256,
        "sound": None if picture is None or picture.sound is None else asdict(picture.sound),
        "writing": None if picture is None or picture.written is None else asdict(picture.written),
        "actions": None if context.actions is None else context.actions.name,
        "seconds": seconds,
        "peak_bytes": max(rank["peak_bytes"] for stage in stages.values() for rank in stage["ranks"]),
        "topology": {
            "ranks": topology.nodes * topology.ranks_per_node,
            "replica_ranks": replica_ranks(topology),
            **plan.topology,
            "device": topology.device.value,
        },
        "checkpoint": checkpoint_report(context.components, config.model),
        "weights": plan.weights.as_dict(),
        "words": None if context.words is None else asdict(context.words),
        "inputs": {key: [asdict(change) for change in changes] for key, changes in context.inputs.items()},
        "denoise": {
            "exactness": plan.exactness["denoise"],
            "steps": config.sampler.steps,
            "cache": plan.cache,
            "guidance_interval": config.sampler.guidance_interval,
            "passes": {
                "computed": dict(context.passes.computed),
                "cached": dict(context.passes.cached),
            },
        },
        "vae": {direction: vae_report(plan, direction) for direction in DIRECTIONS},
        "stages": stages,
        "versions": versions(),
        "numerics": numerics(context.components.device),
    }


def checkpoint_report(components: Components, model: ModelConfig) -> dict[str, Any]:
    """The checkpoint that ran, its schedule, and its parts that were not read. A local one has no commit."""
    checkpoint, schedule = components.checkpoint, components.scheduler().config
    sampler = checkpoint.sampler
    return {
        "path": model.path,
        "repo": None if model.commit is None else model.path,
        "revision": model.revision,
        "commit": model.commit,
        "folder": str(checkpoint.folder),
        "lora": [
            {**plain(asked), "file": str(adapter.file), "layers": len(adapter.added)}
            for asked, adapter in zip(model.lora, checkpoint.adapters, strict=True)
        ],
        "sampler": sampler.class_name,
        "schedule": {key: schedule.get(key) for key in ("flow_shift", "use_karras_sigmas")},
        "native_flow_grid": sampler.native_grid,
        "distilled_sigmas": None if sampler.distilled_sigmas is None else list(sampler.distilled_sigmas),
        "not_read": list(checkpoint.not_read),
        "unknown": list(checkpoint.strangers),
    }


def digest_of(config: Config) -> str:
    """A hash of the config. It is equal on two ranks that composed the same config."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()


def refuse_other_configs(digests: list[str]) -> None:
    """Raise ValueError if a rank composed another config: under torchrun each rank composes its command line."""
    others = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
    if others:
        raise ValueError(
            f"ranks {others} composed another configuration than rank 0; one run has one configuration; start "
            "every node with the same command line and the same conf/"
        )


def everyones(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The `value` of every rank of `group` (default: the world), in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
