"""One rank of `job=verify`: takes the input that a run gives the VAE, and runs every strategy on it.

If the run skips passes, the clip is also denoised with every pass, and both clips are compared.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.denoise.guidance import PassCounts
from cosmos3_pipeline.distributed.device import numerics
from cosmos3_pipeline.distributed.mesh import REPLICA, RankMesh
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.jobs.metrics import versions
from cosmos3_pipeline.jobs.rank import checkpoint_of, rank_of, reporter_of, torch_dtype
from cosmos3_pipeline.jobs.verify import EVERY_PASS, PICTURE_FILE, REPORT_FILE, Verification
from cosmos3_pipeline.jobs.verify.picture import draw
from cosmos3_pipeline.jobs.verify.trial import Trial, check_skipping
from cosmos3_pipeline.models.loading import Components
from cosmos3_pipeline.planning.geometry import modalities_of
from cosmos3_pipeline.planning.plan import Plan
from cosmos3_pipeline.planning.sampling import with_every_pass
from cosmos3_pipeline.planning.vae import reference
from cosmos3_pipeline.stages.build import build_stages
from cosmos3_pipeline.stages.chunked import ChunkedStage
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.decode import vae_latents
from cosmos3_pipeline.stages.files import write_whole
from cosmos3_pipeline.stages.progress import Reporter
from cosmos3_pipeline.vae.inputs import problem_of
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.program import program_for

SCHEMA_VERSION = 1


def verify_rank(config: Config, plan: Plan, verification: Verification, output: str | None) -> None:
    """Compare the strategies of `verification`, as the rank that the environment names. All ranks call it.

    The root writes to `output`. Under torchrun, ranks other than rank 0 pass None.
    """
    with rank_of(config, plan, output) as (device, mesh, directory), torch.no_grad():
        reporter = reporter_of(mesh)
        given = inputs(config, plan, device, mesh, reporter)
        vae, comm = given.vae, mesh.new_comm(REPLICA)
        references: dict[str, Any] = {}
        checks, rows = [], []
        with reporter.track("strategies", len(verification.chosen)) as advance:
            for direction, alone in verification.references.items():
                tensor = vae.picture if direction == "encode" else given.latents
                assert tensor is not None, f"the task gives the VAE nothing to {direction}"
                trial = Trial(direction, tensor, vae.autoencoder, comm, alone)
                references[direction] = trial.reference.cost
                for one in verification.chosen:
                    if one.direction == direction:
                        check, row = trial.check(one)
                        checks.append(check)
                        rows += [] if row is None else [row]
                        advance()
        if verification.skipping:
            # `trial` is that of decode, which is the last direction. Its reference is the clip of this run.
            every = inputs(with_every_pass(config), plan, device, mesh, reporter)
            clip = Trial("decode", every.latents, vae.autoencoder, comm, verification.references["decode"])
            check, row = check_skipping(verification.skipping, clip.reference, trial.reference)
            off = (every.denoised - given.denoised).norm() / every.denoised.norm()
            passes = {"run": dict(given.passes.computed), EVERY_PASS: dict(every.passes.computed)}
            checks.append({**check, "passes": passes, "latents_distance": float(off)})
            rows += [] if row is None else [row]
        if comm.is_root:
            report = {
                "schema_version": SCHEMA_VERSION,
                "model": config.model.name,
                "task": config.task.name.value,
                "seed": config.sampler.seed,
                "latents": config.verify.latents or "denoised by this run",
                "dtype": config.model.vae_dtype.value,
                "topology": {"replica_ranks": mesh.size(REPLICA), "device": config.topology.device.value},
                "passed": all(check["passed"] for check in checks),
                "reference": references,
                "checks": checks,
                "versions": versions(),
                "numerics": numerics(device),
            }
            if rows:
                draw(rows, directory / PICTURE_FILE)
            write_whole(directory / REPORT_FILE, json.dumps(report, indent=2))


class ListeningVae(ParallelVAE):
    """The VAE for the stages before decode. It encodes with the reference, and keeps its input as `picture`."""

    picture: Tensor | None = None

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        self.picture = x
        return super().encode(x, return_dict)


class Inputs(NamedTuple):
    """The inputs of a run's VAE: `vae.picture` to encode, and `latents`, which are `denoised` in the VAE's scale.

    `passes` are those that denoising has taken.
    """

    vae: ListeningVae
    latents: Tensor
    denoised: Tensor
    passes: PassCounts


def inputs(config: Config, plan: Plan, device: torch.device, mesh: RankMesh, reporter: Reporter) -> Inputs:
    """Run the stages of `config` before decode. All ranks call it together.

    For a clip in chunks, picture and latents are those of the first chunk. For a transfer, the picture is the last
    control clip.

    Raises Refusal for latents that cannot be decoded.
    """
    alone, latents_file = reference(), config.verify.latents

    def wrap(autoencoder: AutoencoderKLWan) -> ListeningVae:
        return ListeningVae(autoencoder, encode=alone, decode=alone, group=mesh.group(REPLICA))

    parts = Components(
        checkpoint_of(config),
        dtype=torch_dtype(config.model.dtype),
        vae_dtype=torch_dtype(config.model.vae_dtype),
        device=device,
        flow_shift=config.sampler.flow_shift,
        wrap_vae=wrap,
        weights=plan.weights,
        modalities=modalities_of(config),
        mesh=mesh,
    )
    context = RunContext(
        parts, plan.clip, config.task.fps, Path(), chunks=plan.chunks, mesh=mesh, reporter=reporter
    )
    stages = build_stages(replace(config, output=replace(config.output, control=False)), plan)
    if isinstance(chunked := stages.get("decode"), ChunkedStage):
        stages["text"](context)
        chunked.first_chunk(context, denoise=latents_file is None)
    else:
        for name in ("encode",) if latents_file else ("text", "encode", "denoise"):
            stages[name](context)
    if latents_file:
        context.state.set("latents", load_file(Path(latents_file).expanduser())["latents"][:1].to(device))
    vae = parts.vae(encoder=False)
    assert isinstance(vae, ListeningVae)
    latents = vae_latents(context)
    program = program_for("decode", vae.config)
    problem = problem_of(program, latents, dtype=vae.dtype, device=device, one_clip=True)
    if problem is not None:
        raise Refusal(problem.what, problem.why, problem.works)
    return Inputs(vae, latents, context.state.get("latents").float(), context.passes)
