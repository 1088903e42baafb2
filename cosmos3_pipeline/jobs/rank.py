"""One rank of `job=generate`: join the world, load the model once, and make the clips of this rank's replica."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

from cosmos3_pipeline.config.plugins import build_strategy, discover
from cosmos3_pipeline.distributed.launch import joined_world
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.distributed.mesh import REPLICA, RankMesh
from cosmos3_pipeline.jobs.metrics import SCHEMA_VERSION, Meter, combine, versions
from cosmos3_pipeline.jobs.prompts import Line, line_folder, write_index
from cosmos3_pipeline.models.loading import CheckpointVae, Components, open_checkpoint
from cosmos3_pipeline.plan.geometry import clip_of, replica_ranks
from cosmos3_pipeline.plan.vae import directions, strategy_of, vae_stage
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.decode import vae_latents
from cosmos3_pipeline.stages.files import write_whole
from cosmos3_pipeline.stages.likeness import likeness
from cosmos3_pipeline.stages.progress import Bars, Reporter, Silent
from cosmos3_pipeline.stages.text import read_lines
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.strategy import Direction, Strategy, StrategyPlan

VAE_DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")
STAGES = ("text", "encode", "denoise", "decode", "export")


@dataclass
class Worker:
    """What a rank keeps from clip to clip: its place in the world, the loaded components, its ledgers."""

    device: torch.device
    mesh: RankMesh
    components: Components
    ledgers: list[Ledger] = field(default_factory=list)

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files of its replica."""
        return self.mesh.rank(REPLICA) == 0

    @property
    def shows(self) -> bool:
        """Whether this rank's progress is what a person sees."""
        return self.writes and self.mesh.rank("dp") == 0


def run_rank(plain: dict[str, Any], output: str | None) -> None:
    """Run the resolved config `plain` as the rank that the environment says; all ranks call it together.

    `output` is where the run writes; ranks that compose for themselves under torchrun pass None and learn it
    from rank 0.
    """
    diffusers_logging.set_verbosity_error()
    topology = plain["topology"]
    with joined_world(device=topology["device"], threads=topology["threads_per_rank"]) as device:
        agreed = everyones((output, digest_of(plain)))
        refuse_other_configs([digest for _, digest in agreed])
        directory = Path(str(agreed[0][0]))
        axes = {axis: topology[axis] for axis in ("dp", "cfg", "ulysses")}
        mesh = RankMesh.build(**axes, device_type=device.type)
        ledgers = [mesh.comm(axis).ledger for axis in ("cfg", "ulysses")]
        worker = Worker(device, mesh, components(plain, device, mesh, ledgers, reporter_of(mesh)), ledgers)
        if plain["task"]["prompt_file"] is None:
            make_clip(plain, worker, directory)
        else:
            make_clips(plain, worker, directory)


def make_clips(plain: dict[str, Any], worker: Worker, directory: Path) -> None:
    """One clip per line of the prompt file, dealt to the replicas in turn; a line that fails stops no other."""
    lines = read_lines(plain["task"]["prompt_file"])
    done: list[Line] = []
    for index in range(worker.mesh.rank("dp"), len(lines), worker.mesh.size("dp")):
        folder = line_folder(directory, index)
        text = {**plain["stages"]["text"], "prompt": lines[index]}
        failed = None
        try:
            make_clip({**plain, "stages": {**plain["stages"], "text": text}}, worker, folder)
        # What is wrong with one line (its words, its latents) is told beside it; a lost rank still ends the run.
        except ValueError as error:
            failed = str(error)
        done.append(Line(index + 1, lines[index], folder.name, failed))
    everything = everyones(done)
    if worker.shows:
        write_index(directory, {line.number: line for part in everything for line in part})


def make_clip(plain: dict[str, Any], worker: Worker, directory: Path) -> None:
    """Run the stages once, on all ranks of the replica; its root writes the picture and metrics.json."""
    started = time.perf_counter()
    meter = Meter(worker.device, STAGES, worker.ledgers)
    if worker.writes:
        directory.mkdir(parents=True, exist_ok=True)
    context = RunContext(
        components=worker.components,
        clip=clip_of(OmegaConf.create(plain)),
        fps=plain["task"]["fps"],
        directory=directory,
        mesh=worker.mesh,
        reporter=reporter_of(worker.mesh),
        measure=meter.stage,
    )
    compares = plain["output"]["against_replicated"]
    kept: list[Tensor] = []
    for name in STAGES:
        instantiate(plain["stages"][name])(context)
        if name == "decode" and compares:
            assert context.frames is not None
            context.frames = keep(context.frames, kept)
    loads = {name: asdict(load) for name, load in worker.components.loads.items()}
    measured = everyones((meter.as_dict(), loads), worker.mesh.group(REPLICA))
    seconds = time.perf_counter() - started
    against = against_replicated(context, kept) if compares else None
    if worker.writes:
        stages, loading = (combine([rank[part] for rank in measured]) for part in (0, 1))
        report = metrics(plain, context, stages, seconds)
        report |= {"loading": loading, "against_replicated": against}
        write_whole(directory / "metrics.json", json.dumps(report, indent=2))


def keep(chunks: Iterator[Tensor], kept: list[Tensor]) -> Iterator[Tensor]:
    """The chunks as they come, each also put into `kept`."""
    for chunk in chunks:
        kept.append(chunk.cpu())
        yield chunk


def against_replicated(context: RunContext, kept: list[Tensor]) -> dict[str, Any] | None:
    """How the run's frames compare with those of a decode that shares nothing out; on the root, else None.

    Decodes the same latents once more, outside the measured stages. All ranks of the replica call it together.
    """
    vae = context.components.pipeline.vae
    replicated = build_strategy({"_target_": discover().target("replicated")})
    group = context.mesh.group(REPLICA)
    reference = ParallelVAE(vae.autoencoder, encode=replicated, decode=replicated, group=group)
    frames = [frame for chunk in reference.decode_stream(vae_latents(context)) for frame in chunk.cpu().numpy()]
    if not context.is_root:
        return None
    return asdict(likeness(frames, (frame for chunk in kept for frame in chunk.numpy())))


def reporter_of(mesh: RankMesh) -> Reporter:
    """What this rank's progress is shown by: one rank's is what a person sees."""
    return Bars(Console(stderr=True)) if mesh.rank(REPLICA) == mesh.rank("dp") == 0 else Silent()


def components(
    plain: dict[str, Any], device: torch.device, mesh: RankMesh, ledgers: list[Ledger], reporter: Reporter
) -> Components:
    """The model that `plain` names, its VAE spread over the ranks of the clip as `plain` says."""
    model = plain["model"]
    checkpoint = open_checkpoint(
        model["path"], transformer=model["transformer"], vae=model["vae"], revision=model["commit"]
    )

    # A decode by one rank needs the whole model; otherwise a rank reads the weights of its own share only.
    whole = bool(plain["output"]["against_replicated"])
    vae_dtype = getattr(torch, model["vae_dtype"])
    source = None if whole else CheckpointVae(checkpoint)

    def wrap(autoencoder: AutoencoderKLWan) -> ParallelVAE:
        parallel = ParallelVAE(
            autoencoder,
            encode=used(plain, "encode").strategy,
            decode=used(plain, "decode").strategy,
            group=mesh.group(REPLICA),
            weights=source,
            dtype=vae_dtype,
            device=device,
        )
        ledgers.append(parallel.ledger)
        if not whole:
            parallel.release("decode", *(() if autoencoder.encoder is None else ("encode",)))
        return parallel

    return Components(
        checkpoint,
        dtype=getattr(torch, model["dtype"]),
        vae_dtype=vae_dtype,
        device=device,
        flow_shift=plain["sampler"]["flow_shift"],
        wrap_vae=wrap,
        vae_source=source,
        track=reporter.track,
    )


@dataclass(frozen=True)
class Used:
    """A direction's strategy, and its plan for the run's clip: None where the task does not go that way."""

    strategy: Strategy
    plan: StrategyPlan | None

    def report(self) -> dict[str, str]:
        """For metrics.json."""
        if self.plan is None:
            return {"strategy": self.strategy.name, "exactness": self.strategy.exactness.value}
        return {
            "strategy": self.plan.strategy,
            "exactness": self.plan.exactness.value,
            "note": self.plan.note,
        }


def used(plain: dict[str, Any], direction: Direction) -> Used:
    """What `direction` uses: the configured strategy where its flag is on, or what it picks, else `replicated`."""
    cfg = OmegaConf.create(plain)
    clip, strategy = clip_of(cfg), strategy_of(cfg, direction)
    if direction not in directions(cfg, clip):
        return Used(strategy, None)
    stage = vae_stage(cfg, direction, clip, plain["model"]["vae"])
    return Used(strategy.settled(stage.program, stage.shape, replica_ranks(cfg.topology)), stage.plan)


def metrics(plain: dict[str, Any], context: RunContext, stages: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What metrics.json says of the run; keys are added in later versions, never renamed."""
    assert context.picture is not None
    topology = plain["topology"]
    return {
        "schema_version": SCHEMA_VERSION,
        "model": plain["model"]["name"],
        "task": plain["task"]["name"],
        "seed": plain["sampler"]["seed"],
        "picture": context.picture.path.name,
        "num_frames": context.picture.num_frames,
        "frames_sha256": context.picture.frames_sha256,
        "seconds": seconds,
        "peak_bytes": max(rank["peak_bytes"] for stage in stages.values() for rank in stage["ranks"]),
        "topology": {
            "ranks": topology["nodes"] * topology["ranks_per_node"],
            "replica_ranks": replica_ranks(OmegaConf.create(topology)),
            **{key: topology[key] for key in ("nodes", "ranks_per_node", "dp", "cfg", "ulysses", "device")},
        },
        "checkpoint": checkpoint_report(context.components, plain["model"]),
        "words": None if context.words is None else asdict(context.words),
        "vae": {direction: used(plain, direction).report() for direction in VAE_DIRECTIONS},
        "stages": stages,
        "versions": versions(),
    }


def checkpoint_report(components: Components, model: dict[str, Any]) -> dict[str, Any]:
    """Which checkpoint ran, by which schedule, and what of it was not read; only the hub's has a commit."""
    checkpoint, schedule = components.checkpoint, components.scheduler().config
    return {
        "path": model["path"],
        "repo": None if model["commit"] is None else model["path"],
        "revision": model["revision"],
        "commit": model["commit"],
        "folder": str(checkpoint.folder),
        "sampler": checkpoint.sampler.class_name,
        "schedule": {key: schedule[key] for key in ("flow_shift", "use_karras_sigmas")},
        "native_flow_grid": checkpoint.sampler.native_grid,
        "not_read": list(checkpoint.not_read),
        "unknown": list(checkpoint.strangers),
    }


def digest_of(plain: dict[str, Any]) -> str:
    """What is the same for two ranks that composed the same configuration."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def refuse_other_configs(digests: list[str]) -> None:
    """Stop when a rank composed another config: under torchrun each rank composes its own command line."""
    others = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
    if others:
        raise ValueError(
            f"ranks {others} composed another configuration than rank 0; one run has one configuration; start "
            "every node with the same command line and the same conf/"
        )


def everyones(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The `value` of every rank of `group` (of the world), in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
