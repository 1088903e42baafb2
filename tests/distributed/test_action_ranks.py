"""Tasks with actions on several ranks: latents and actions of one rank, in each layout and with shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from action_runs import Made, asked, in_chunks, ours, write_inputs
from diffusers import AutoencoderKLWan
from ranks import run_on_ranks
from toy_runs import toy_dimensions

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.distributed.mesh import REPLICA, RankMesh
from cosmos3_pipeline.models.loading import open_checkpoint
from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.spatial_shard import SpatialShard


def on_rank(rank: int, overrides: list[str], checkpoint: str, folder: str, cfg: int, ulysses: int) -> Made:
    torch.set_num_threads(1)
    own = Path(folder) / str(rank)
    own.mkdir()
    return ours(overrides, inspect_checkpoint(checkpoint), own, RankMesh.build(cfg=cfg, ulysses=ulysses))


def in_chunks_on_rank(rank: int, overrides: list[str], checkpoint: str, folder: str) -> Made:
    """As `on_rank`, with the VAE over all ranks in both directions."""
    torch.set_num_threads(1)
    topology = compose(overrides).topology
    own, mesh = Path(folder) / str(rank), RankMesh.build(cfg=topology.cfg, ulysses=topology.ulysses)
    own.mkdir()

    def wrap(autoencoder: AutoencoderKLWan) -> ParallelVAE:
        return ParallelVAE(autoencoder, SpatialShard(), LayerPipeline(), mesh.group(REPLICA))

    return ours(overrides, inspect_checkpoint(checkpoint), own, mesh, wrap_vae=wrap)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("task", "cfg", "ulysses", "others"),
    [
        pytest.param("policy", 1, 2, [], marks=pytest.mark.thorough),
        ("forward_dynamics", 2, 1, ["sampler.guidance_scale=3.0", "weights=sharded"]),
        ("inverse_dynamics", 2, 2, ["sampler.guidance_scale=3.0"]),
    ],
    ids=["ulysses", "cfg, sharded", "both"],
)
def test_several_ranks_are_one(task: str, cfg: int, ulysses: int, others: list[str], tmp_path: Path) -> None:
    write_inputs(tmp_path, 100, 133)
    checkpoint = open_checkpoint(None, **toy_dimensions())
    overrides = asked(tmp_path, task, "task.resolution_tier=256", *others)
    layout = [f"topology.ranks_per_node={cfg * ulysses}", f"topology.cfg={cfg}", f"topology.ulysses={ulysses}"]
    given = [*overrides, *layout], str(checkpoint.folder), str(tmp_path), cfg, ulysses
    ranks = run_on_ranks(on_rank, cfg * ulysses, *given)
    alone = [one for one in overrides if not one.startswith("weights")]
    expected = ours(alone, checkpoint, tmp_path)
    assert (ranks[0].latents - expected.latents).abs().max() < 1e-5
    assert all(torch.equal(rank.latents, ranks[0].latents) for rank in ranks)
    assert (expected.actions is None) == (task == "forward_dynamics")
    # Only the root writes them.
    assert [rank.actions is None for rank in ranks] == [expected.actions is None] + [True] * (cfg * ulysses - 1)
    if expected.actions is not None:
        assert (ranks[0].actions - expected.actions).abs().max() < 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize(("cfg", "ulysses"), [(1, 2), (2, 2)], ids=["2 ranks", "4 ranks"])
def test_chunks_on_several_ranks_are_those_of_one(cfg: int, ulysses: int, tmp_path: Path) -> None:
    """Every rank has the root's last frame, so their latents are the same bits.

    Beside one rank a level of that frame may round to the next one, which later chunks go on from.
    """
    write_inputs(tmp_path, 100, 133)
    checkpoint = open_checkpoint(None, **toy_dimensions())
    layout = [f"topology.ranks_per_node={cfg * ulysses}", f"topology.cfg={cfg}", f"topology.ulysses={ulysses}"]
    overrides = in_chunks(tmp_path, "sampler.guidance_scale=3.0", "sampler.steps=1")
    given = [*overrides, *layout], str(checkpoint.folder), str(tmp_path)
    ranks = run_on_ranks(in_chunks_on_rank, cfg * ulysses, *given)
    expected = ours(overrides, checkpoint, tmp_path)
    assert all(torch.equal(rank.latents, ranks[0].latents) for rank in ranks)
    assert (ranks[0].latents[0] - expected.latents[0]).abs().max() < 1e-5
    assert (ranks[0].latents - expected.latents).abs().max() < 0.02
    assert (ranks[0].frames.int() - expected.frames.int()).abs().max() <= 1
    assert [rank.frames is None for rank in ranks] == [False] + [True] * (cfg * ulysses - 1)
