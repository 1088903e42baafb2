"""`ParallelVAE` in real ranks: one rank's result, in the bytes of the plan, with each rank's own weights only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from vae_models import WAN21, WAN22, make_vae, vae_config

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.pixels import to_uint8
from cosmos3_pipeline.vae.program import decoder_program
from cosmos3_pipeline.vae.strategy import Strategy, StrategyError
from cosmos3_pipeline.vae.weights import FolderWeights
from cosmos3_plugins.auto import Auto
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.pipeline_of_shards import PipelineOfShards
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard

pytestmark = pytest.mark.usefixtures("path")
CONFIG = vae_config(WAN22)
# config, dtype, latent frames, rows and columns, batch
CASES = (
    (CONFIG, torch.float32, 5, (5, 3), 1),
    (vae_config(WAN21), torch.float32, 4, (4, 5), 2),
    (CONFIG, torch.bfloat16, 1, (7, 5), 1),
)


def latent(frames: int, rows: int = 3, cols: int = 2, *, batch: int = 1, z_dim: int = 6, seed: int = 0) -> Any:
    return torch.randn(batch, z_dim, frames, rows, cols, generator=torch.Generator().manual_seed(seed))


def alone(model: Any) -> ParallelVAE:
    return ParallelVAE(model, Replicated(), Replicated())


def both_ways(rank: int, strategy: Strategy, *, atol: float) -> None:
    for config, dtype, frames, (rows, cols), batch in CASES:
        model = make_vae(config, dtype=dtype)
        # The reference runs in every rank alone.
        one, vae = alone(model), ParallelVAE(model, strategy, strategy)
        z = latent(frames, rows, cols, batch=batch, z_dim=config["z_dim"]).to(dtype)
        picture = one.decode(z).sample
        assert picture.std() > 0.05
        close = atol if dtype == torch.float32 else 30 * max(atol, 1e-3) * bool(atol)
        assert (vae.decode(z).sample - picture).abs().max() <= close
        before = vae.ledger.snapshot()
        moments = vae.encode(picture).latent_dist.parameters
        used = {"encode": vae.ledger.since(before)}
        assert dtype != torch.float32 or (
            (moments - one.encode(picture).latent_dist.parameters).abs().max() <= 3 * atol
        )
        if batch == 1:
            before = vae.ledger.snapshot()
            chunks = list(vae.decode_stream(z))
            used["decode"] = vae.ledger.since(before)
            assert (chunks == []) == (rank > 0)
            assert rank or (torch.cat(chunks).int() - to_uint8(picture)[0].int()).abs().max() <= (
                1 if close else 0
            )
        shape = LatentShape(batch, frames, rows, cols, dtype.itemsize, on_host=takes_host_path(z))
        for direction, ledger in used.items():
            share = vae.plan(direction, shape).shares[rank]  # type: ignore[arg-type]
            assert (ledger.sent_bytes, ledger.sent_messages) == (share.sent_bytes, share.sent_messages)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("strategy", "ranks", "atol"),
    [
        (LayerPipeline(), 3, 0),
        pytest.param(LayerPipeline(moving_cuts=False), 2, 0, marks=pytest.mark.thorough),
        (Auto(link_gb_per_s=1e6, latency_us=0.0), 2, 0),
        (SpatialShard("grid"), 4, 1e-5),
        pytest.param(PipelineOfShards(), 4, 1e-5, marks=pytest.mark.thorough),
    ],
    ids=["moving cuts", "fixed cuts", "auto", "grid", "shards"],
)
def test_it_is_the_result_of_one_rank_and_the_plan(strategy: Strategy, ranks: int, atol: float) -> None:
    run_on_ranks(both_ways_with, ranks, strategy, atol)


def both_ways_with(rank: int, strategy: Strategy, atol: float) -> None:
    both_ways(rank, strategy, atol=atol)


def released(rank: int) -> tuple[int, int, bool]:
    """Bytes of weights that are bound, elements left in the model, and whether the picture is the same."""
    model, z = make_vae(CONFIG), latent(2)
    shape = LatentShape(1, 2, 3, 2, on_host=takes_host_path(z))
    vae = ParallelVAE(model, LayerPipeline(), LayerPipeline())
    before = vae.decode(z).sample
    vae.release(decode=shape)
    left = sum(p.numel() for p in model.parameters() if not p.is_meta)
    planned = vae.plan("decode", shape).shares[rank].weight_bytes
    return planned, left, torch.equal(vae.decode(z).sample, before)


@pytest.mark.sampled(1)
def test_release_leaves_each_rank_its_own_weights(path: str) -> None:
    # With an accelerator's costs, the last rank has most ops of such a small picture, and so most weights.
    most = 0.7 if path == "host" else 0.96
    for planned, left, same in run_on_ranks(released, 3):
        assert planned < most * 4 * decoder_program(CONFIG).weight_elements()
        assert left == 0 and same


def read_from(rank: int, folder: str) -> tuple[set[str], torch.Tensor]:
    names: set[str] = set()
    load = FolderWeights.load

    def recorded(self: Any, wanted: Any, **how: Any) -> Any:
        names.update(wanted := list(wanted))
        return load(self, wanted, **how)

    FolderWeights.load = recorded  # type: ignore[method-assign]
    vae = ParallelVAE.from_folder(folder, LayerPipeline(), LayerPipeline())
    return names, vae.decode(latent(2)).sample


def test_from_a_folder_each_rank_reads_only_its_own(tmp_path: Any) -> None:
    model = make_vae(CONFIG)
    model.save_pretrained(tmp_path)
    program = decoder_program(CONFIG)
    z = latent(2)
    shares = LayerPipeline().plan(program, LatentShape(1, 2, 3, 2, on_host=takes_host_path(z)), 2).shares
    expected = alone(model).decode(z).sample
    for share, (names, picture) in zip(shares, run_on_ranks(read_from, 2, str(tmp_path)), strict=True):
        assert names == {weight.name for weight in program.weights(*share.ops)}
        assert torch.equal(picture, expected)


def in_pairs(rank: int) -> torch.Tensor:
    import torch.distributed as dist

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    if rank % 2:  # what else a process has set up does not matter
        dist.new_group([rank], use_local_synchronization=True)
    vae = ParallelVAE(make_vae(CONFIG), LayerPipeline(), LayerPipeline(), group=pairs[rank // 2])
    return vae.decode(latent(2, seed=rank // 2)).sample


@pytest.mark.sampled(1)
def test_two_groups_decode_their_own_clips() -> None:
    one = alone(make_vae(CONFIG))
    for rank, picture in enumerate(run_on_ranks(in_pairs, 4)):
        assert torch.equal(picture, one.decode(latent(2, seed=rank // 2)).sample)


def over_too_many(rank: int) -> str:
    vae = ParallelVAE(make_vae(CONFIG), SpatialShard(), SpatialShard("width"))
    with pytest.raises(StrategyError) as refusal:
        vae.decode(latent(2, 5, 2))
    return str(refusal.value)


def test_what_the_strategy_cannot_do_is_refused_on_every_rank() -> None:
    for words in run_on_ranks(over_too_many, 3):
        assert "over 3 ranks on a latent of 5 rows and 2 columns" in words and "use 2 ranks or fewer" in words


def _comm(rank: int) -> None:
    comm = Comm()
    assert (comm.rank, comm.size, comm.is_root) == (rank, 3, rank == 0)
    with comm.run():
        assert comm.agree(rank * 10) == [0, 10, 20]
        mine = torch.full((2, 3), float(rank))
        assert [int(t[0, 0]) for t in comm.all_gather(mine)] == [0, 1, 2]
        received = torch.empty(2, 3)
        comm.exchange([(mine, (rank + 1) % 3)], [(received, (rank - 1) % 3)]).wait()
        assert int(received[0, 0]) == (rank - 1) % 3
        comm.broadcast(mine, source=2)
        assert int(mine[0, 0]) == 2
        with pytest.raises(ValueError, match=r"give tensor\.contiguous"):
            comm.broadcast(mine.t())
        # A message that is sent after a broadcast may be awaited from before it.
        given, late = torch.full((2, 3), 7.0), torch.full((2, 3), 8.0)
        pending = comm.exchange(receives=[(received, 0)]) if rank else None
        comm.broadcast(given if rank == 0 else mine)
        if rank == 0:
            comm.exchange([(late, 1), (late, 2)]).wait()
        elif pending is not None:
            pending.wait()
            assert (int(mine[0, 0]), int(received[0, 0])) == (7, 8)
    counts = comm.ledger.as_dict()
    # Rank 0 has sent twice more, and the others have each received once more.
    assert counts["send"] == ({"calls": 3, "bytes": 72} if rank == 0 else {"calls": 1, "bytes": 24})
    assert counts["recv"] == ({"calls": 1, "bytes": 24} if rank == 0 else {"calls": 2, "bytes": 48})
    assert counts["all_gather"] == {"calls": 1, "bytes": 24}
    assert counts.get("broadcast") == ({"calls": 1, "bytes": 24} if rank in (0, 2) else None)
    assert comm.ledger.sent_bytes == (120, 48, 72)[rank]


def test_comm_moves_and_counts() -> None:
    run_on_ranks(_comm, 3)
