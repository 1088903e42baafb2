"""Tasks with actions on several ranks: latents, actions and frames of one rank, in every layout and placement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from action_runs import asked, ours, write_inputs
from ranks import run_on_ranks
from toy_runs import toy_dimensions

from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.models.loading import open_checkpoint


def on_rank(rank: int, overrides: list[str], checkpoint: str, folder: str, cfg: int, ulysses: int) -> None:
    """Actions and latents are those of one rank below 1e-5, and the same bits on every rank."""
    torch.set_num_threads(1)
    own = Path(folder) / str(rank)
    own.mkdir()
    info, mesh = inspect_checkpoint(checkpoint), RankMesh.build(cfg=cfg, ulysses=ulysses)
    layout = [f"topology.ranks_per_node={cfg * ulysses}", f"topology.cfg={cfg}", f"topology.ulysses={ulysses}"]
    found = ours([*overrides, *layout], info, own, mesh)
    latents = found.latents.clone()
    torch.distributed.broadcast(latents, src=0)
    assert torch.equal(latents, found.latents), f"rank {rank} differs from its root"
    assert (found.actions is not None) == (rank == 0 and "task=forward_dynamics" not in overrides)
    if rank == 0:
        alone = [one for one in overrides if not one.startswith("weights")]
        expected = ours(alone, info, own)
        assert (found.latents - expected.latents).abs().max() < 1e-5
        if found.actions is not None and expected.actions is not None:
            assert (found.actions - expected.actions).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("task", "cfg", "ulysses", "others"),
    [
        ("policy", 1, 2, []),
        ("forward_dynamics", 2, 1, ["sampler.guidance_scale=3.0", "weights=sharded"]),
        ("inverse_dynamics", 2, 2, ["sampler.guidance_scale=3.0"]),
    ],
    ids=["ulysses", "cfg, sharded", "both"],
)
def test_several_ranks_are_one(task: str, cfg: int, ulysses: int, others: list[str], tmp_path: Path) -> None:
    write_inputs(tmp_path, 100, 133)
    checkpoint = open_checkpoint(None, **toy_dimensions()).folder
    overrides = asked(tmp_path, task, "task.resolution_tier=256", *others)
    run_on_ranks(on_rank, cfg * ulysses, overrides, str(checkpoint), str(tmp_path), cfg, ulysses)
