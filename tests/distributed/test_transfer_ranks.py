"""Transfer over real gloo ranks: diffusers' latents, what the plan says is sent, and a whole run's pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cosmos_models import tiny_pipeline, transfer_latents
from diffusers import SeaCacheConfig
from test_denoise_ranks import sent

from cosmos3_pipeline.denoise.cost import PassTokens, Stretch, Wire, denoise_costs
from cosmos3_pipeline.denoise.guidance import UNCOND, Guidance, PassCounts
from cosmos3_pipeline.denoise.shards import Grid
from cosmos3_pipeline.denoise.transfer import ParallelTransferDenoiser
from cosmos3_pipeline.distributed.launch import joined_world, run_ranks
from cosmos3_pipeline.distributed.mesh import REPLICA, SEQUENCE, RankMesh
from cosmos3_pipeline.planning.transformer import TransformerSize

STEPS = 2
PROMPTS = ([3] * 13, [9] * 6)
# Controls, size in pixels and frames, clean frames, the scales of both guidances: odd counts throughout.
RUNS: dict[str, dict[str, Any]] = {
    "one control": {"controls": 1, "size": (80, 112, 9), "clean_frames": 1},
    "two controls": {"controls": 2, "size": (48, 80, 13), "clean_frames": 0},
    "controls alone": {"controls": 1, "size": (48, 112, 5), "guidance_scale": 1.0, "control_guidance": 3.0},
    "fewer tokens than ranks": {"controls": 1, "size": (16, 32, 5), "clean_frames": 0},
}


def check(mesh: RankMesh, model: dict[str, Any], run: dict[str, Any], most: float = 1e-5) -> None:
    """The same latents as diffusers', the same bits on every rank, and the bytes that the plan says."""
    pipeline = tiny_pipeline(seed=5, **model)
    run = {"prompt_ids": PROMPTS, "steps": STEPS, **run}
    guidance, sequence = mesh.comm("cfg").ledger, mesh.comm(SEQUENCE).ledger
    before = guidance.snapshot(), sequence.snapshot()
    own = transfer_latents(ParallelTransferDenoiser(mesh), pipeline, **run)
    cost = cost_of(mesh, pipeline.transformer.config, run)
    assert sent(guidance, before[0]) == cost.step(range(3)).cfg * STEPS
    text = Wire()
    for one in cost.texts:
        text += one.sequence
    assert sent(sequence, before[1]) == text + cost.step(range(3)).sequence * STEPS
    roots = own.clone()
    dist.broadcast(roots, group_src=0, group=mesh.group(REPLICA))
    assert torch.equal(own, roots)
    expected = transfer_latents(None, pipeline, **run)
    assert expected.std() > 0.5
    assert (own - expected).abs().max().item() < most


def guidance_of(run: dict[str, Any]) -> Guidance:
    return Guidance.of_controls(run.get("guidance_scale", 3.0), run.get("control_guidance", 1.5))


def cost_of(mesh: RankMesh, config: Any, run: dict[str, Any]) -> Any:
    height, width, frames = run["size"]
    latent_frames, tokens = (frames - 1) // 4 + 1, -(-height // 32) * -(-width // 32)
    clean = (run.get("clean_frames", 0) + 3) // 4
    target = Stretch("vision", 192, latent_frames, tokens, frozenset(range(clean)))
    control = Stretch("vision", 192, latent_frames, tokens, frozenset(range(latent_frames)))
    passes = [
        PassTokens(
            len(PROMPTS[one.prompt == UNCOND]),
            (*[control] * run["controls"], target) if one.controls else (target,),
            negative=one.prompt == UNCOND,
        )
        for one in guidance_of(run).passes
    ]
    costs = denoise_costs(
        TransformerSize.of(config, latent_channels=48),
        passes=passes,
        cfg=mesh.cfg,
        grid=Grid(mesh.ulysses, *mesh.cp),
        element_bytes=4,
        on_host=True,
        nested=True,
    )
    return costs[mesh.rank("cfg") * mesh.size(SEQUENCE) + mesh.rank(SEQUENCE)]


def in_layout(cfg: int, ulysses: int, model: dict[str, Any]) -> None:
    with joined_world(device="cpu", threads=1):
        mesh = RankMesh.build(cfg=cfg, ulysses=ulysses)
        for run in RUNS.values():
            if len(guidance_of(run).passes) >= cfg:
                check(mesh, model, run)
        check_with_a_cache(mesh, model)


def check_with_a_cache(mesh: RankMesh, model: dict[str, Any]) -> None:
    """The passes that one rank spares are spared on all."""
    pipeline, cache = tiny_pipeline(seed=5, **model), SeaCacheConfig(threshold=2.0)
    run: dict[str, Any] = {"prompt_ids": PROMPTS, "steps": 6, "clean_frames": 1}
    alone, here = PassCounts(), PassCounts()
    expected = transfer_latents(ParallelTransferDenoiser(cache=cache, counts=alone), pipeline, **run)
    own = transfer_latents(ParallelTransferDenoiser(mesh, cache=cache, counts=here), pipeline, **run)
    assert (own - expected).abs().max() < 1e-5
    assert here == alone and here.cached["cond_full"] > 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("cfg", "ulysses", "model"),
    [
        pytest.param(2, 1, {}, id="2 ranks, cfg"),
        pytest.param(1, 2, {}, id="2 ranks, ulysses"),
        pytest.param(1, 3, {"num_attention_heads": 6, "num_key_value_heads": 2}, id="3 ranks, ulysses"),
        pytest.param(2, 2, {}, id="4 ranks, cfg x ulysses"),
        pytest.param(3, 1, {}, id="3 ranks, cfg: one for each pass"),
    ],
)
def test_every_layout_gives_diffusers_latents(cfg: int, ulysses: int, model: dict[str, Any]) -> None:
    run_ranks(in_layout, cfg, ulysses, model, ranks=cfg * ulysses)
