"""One rank of `job=verify`: take what the run gives the VAE, and put it through one strategy after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from cosmos3_pipeline.config.plugins import build_strategy, discover
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.distributed.launch import joined_world
from cosmos3_pipeline.distributed.mesh import REPLICA, RankMesh
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.jobs.metrics import versions
from cosmos3_pipeline.jobs.rank import digest_of, everyones, refuse_other_configs
from cosmos3_pipeline.jobs.verify import PICTURE_FILE, REPORT_FILE, chosen
from cosmos3_pipeline.jobs.verify.picture import draw
from cosmos3_pipeline.jobs.verify.trial import Trial
from cosmos3_pipeline.models.loading import Components, open_checkpoint
from cosmos3_pipeline.plan.geometry import clip_of
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.decode import vae_latents
from cosmos3_pipeline.stages.files import write_whole
from cosmos3_pipeline.stages.progress import Bars, Reporter, Silent
from cosmos3_pipeline.vae.inputs import problem_of
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.program import program_for

SCHEMA_VERSION = 1


def verify_rank(plain: dict[str, Any], output: str | None) -> None:
    """Verify the resolved config `plain` as the rank that the environment says; all ranks call it together.

    `output` is where the root writes; ranks that compose for themselves under torchrun pass None.
    """
    diffusers_logging.set_verbosity_error()
    topology, cfg = plain["topology"], OmegaConf.create(plain)
    with joined_world(device=topology["device"], threads=topology["threads_per_rank"]) as device, torch.no_grad():
        agreed = everyones((output, digest_of(plain)))
        refuse_other_configs([digest for _, digest in agreed])
        directory = Path(str(agreed[0][0]))
        axes = {axis: topology[axis] for axis in ("dp", "cfg", "ulysses")}
        mesh = RankMesh.build(**axes, device_type=device.type)
        reporter: Reporter = Bars(Console(stderr=True)) if mesh.rank(REPLICA) == 0 else Silent()
        vae, latents = inputs(plain, device, mesh, reporter)
        given = {"encode": vae.picture, "decode": latents}
        comm, picked = Comm(mesh.group(REPLICA)), chosen(cfg)
        reference, checks, rows = {}, [], []
        with reporter.track("strategies", len(picked)) as advance:
            for direction in dict.fromkeys(one.direction for one in picked):
                tensor = given[direction]
                assert tensor is not None, f"the task gives the VAE nothing to {direction}"
                trial = Trial(direction, tensor, vae.autoencoder, comm)
                reference[direction] = trial.reference.cost
                for one in picked:
                    if one.direction == direction:
                        check, row = trial.check(one)
                        checks.append(check)
                        rows += [] if row is None else [row]
                        advance()
        if comm.is_root:
            report = {
                "schema_version": SCHEMA_VERSION,
                "model": plain["model"]["name"],
                "task": plain["task"]["name"],
                "seed": plain["sampler"]["seed"],
                "latents": plain["verify"]["latents"] or "denoised by this run",
                "dtype": plain["model"]["vae_dtype"],
                "topology": {"replica_ranks": mesh.size(REPLICA), "device": topology["device"]},
                "passed": all(check["passed"] for check in checks),
                "reference": reference,
                "checks": checks,
                "versions": versions(),
            }
            if rows:
                draw(rows, directory / PICTURE_FILE)
            write_whole(directory / REPORT_FILE, json.dumps(report, indent=2))


class ListeningVae(ParallelVAE):
    """The VAE of the stages before decode: encodes with the reference, and keeps the picture that it was given."""

    picture: Tensor | None = None

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        self.picture = x
        return super().encode(x, return_dict)


def inputs(
    plain: dict[str, Any], device: torch.device, mesh: RankMesh, reporter: Reporter
) -> tuple[ListeningVae, Tensor]:
    """What a run of `plain` gives the VAE: the VAE, with the picture if there is one, and the latents to decode.

    Raises Refusal for latents that cannot be decoded.
    """
    model, latents_file = plain["model"], plain["verify"]["latents"]
    reference = build_strategy({"_target_": discover().target("replicated")})

    def wrap(autoencoder: AutoencoderKLWan) -> ListeningVae:
        return ListeningVae(autoencoder, encode=reference, decode=reference, group=mesh.group(REPLICA))

    parts = Components(
        open_checkpoint(
            model["path"], transformer=model["transformer"], vae=model["vae"], revision=model["commit"]
        ),
        dtype=getattr(torch, model["dtype"]),
        vae_dtype=getattr(torch, model["vae_dtype"]),
        device=device,
        flow_shift=plain["sampler"]["flow_shift"],
        wrap_vae=wrap,
    )
    clip = clip_of(OmegaConf.create(plain))
    context = RunContext(parts, clip, plain["task"]["fps"], Path(), mesh=mesh, reporter=reporter)
    for name in ("encode",) if latents_file else ("text", "encode", "denoise"):
        instantiate(plain["stages"][name])(context)
    if latents_file:
        context.state.set("latents", load_file(Path(latents_file).expanduser())["latents"].to(device))
    vae = parts.vae(encoder=False)
    assert isinstance(vae, ListeningVae)
    latents = vae_latents(context)
    program = program_for("decode", vae.config)
    problem = problem_of(program, latents, dtype=vae.dtype, device=device, one_clip=True)
    if problem is not None:
        what, why, works = problem.split("; ", 2)
        raise Refusal(what=what, why=why, works=works)
    return vae, latents
