"""One rank of `job=generate`: join the world, run the stages, and let the root write what was measured."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console

from cosmos3_pipeline.config.plugins import build_strategy, discover
from cosmos3_pipeline.distributed.launch import joined_world
from cosmos3_pipeline.distributed.mesh import REPLICA, RankMesh
from cosmos3_pipeline.jobs.metrics import SCHEMA_VERSION, Meter, combine, versions
from cosmos3_pipeline.models.loading import Components, open_checkpoint
from cosmos3_pipeline.plan.geometry import Clip, clip_of
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.files import write_whole
from cosmos3_pipeline.stages.progress import Bars, Silent
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.strategy import Strategy

STAGES = ("text", "encode", "denoise", "decode", "export")


def run_rank(plain: dict[str, Any], output: str | None) -> None:
    """Run the resolved config `plain` as the rank that the environment says; all ranks call it together.

    `output` is where the root writes; ranks that compose for themselves under torchrun pass None.
    """
    diffusers_logging.set_verbosity_error()
    topology = plain["topology"]
    with joined_world(device=topology["device"], threads=topology["threads_per_rank"]) as device:
        started = time.perf_counter()
        refuse_other_configs(plain)
        mesh = RankMesh.build(cfg=topology["cfg"], ulysses=topology["ulysses"], device_type=device.type)
        meter = Meter(device, STAGES)
        for axis in ("cfg", "ulysses"):
            meter.watch(mesh.comm(axis).ledger)
        root = mesh.rank(REPLICA) == 0
        context = RunContext(
            components=components(plain, device, mesh, meter),
            clip=clip(plain),
            fps=plain["task"]["fps"],
            directory=Path(output or "."),
            mesh=mesh,
            reporter=Bars(Console(stderr=True)) if root else Silent(),
            measure=meter.stage,
        )
        for name in STAGES:
            instantiate(plain["stages"][name])(context)
        measured = gather(meter.as_dict())
        if root:
            assert context.picture is not None
            seconds = time.perf_counter() - started
            report = metrics(plain, context, combine(measured), seconds)
            write_whole(context.directory / "metrics.json", json.dumps(report, indent=2))


def components(plain: dict[str, Any], device: torch.device, mesh: RankMesh, meter: Meter) -> Components:
    """The model that `plain` names, its VAE spread over the ranks of the clip as `plain` says."""
    model, vae = plain["model"], plain["vae"]
    checkpoint = open_checkpoint(model["path"], transformer=model["transformer"], vae=model["vae"])

    def wrap(autoencoder: AutoencoderKLWan) -> ParallelVAE:
        parallel = ParallelVAE(
            autoencoder,
            encode=strategy(vae, "encode"),
            decode=strategy(vae, "decode"),
            group=mesh.group(REPLICA),
        )
        meter.watch(parallel.ledger)
        return parallel

    return Components(
        checkpoint,
        dtype=getattr(torch, model["dtype"]),
        vae_dtype=getattr(torch, model["vae_dtype"]),
        device=device,
        flow_shift=plain["sampler"]["flow_shift"],
        wrap_vae=wrap,
    )


def clip(plain: dict[str, Any]) -> Clip:
    """The clip that `plain` asks for."""
    return clip_of(OmegaConf.create(plain))


def strategy(vae: dict[str, Any], direction: str) -> Strategy:
    """The strategy that `direction` uses: the configured one where its flag is on, else `replicated`."""
    parallel = vae[f"parallel_{direction}"]
    built = build_strategy(vae[direction] if parallel else {"_target_": discover().target("replicated")})
    assert isinstance(built, Strategy)
    return built


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
            **{key: topology[key] for key in ("nodes", "ranks_per_node", "cfg", "ulysses", "device")},
        },
        "vae": {
            direction: {"strategy": used.name, "exactness": used.exactness.value}
            for direction in ("encode", "decode")
            for used in (strategy(plain["vae"], direction),)
        },
        "stages": stages,
        "versions": versions(),
    }


def refuse_other_configs(plain: dict[str, Any]) -> None:
    """Stop when a rank composed another config: under torchrun each rank composes its own command line."""
    if not dist.is_initialized():
        return
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    others = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
    if others:
        raise ValueError(
            f"ranks {others} composed another configuration than rank 0; one run has one configuration; start "
            "every node with the same command line and the same conf/"
        )


def gather(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank measured, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [measured]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, measured)
    return everything
