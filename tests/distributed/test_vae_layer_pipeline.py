"""`layer_pipeline` against `replicated` in real ranks: equal bits, and the bytes and memory that it planned."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from vae_models import WAN21, WAN22, make_vae, vae_config, wan_video
from wandering_cuts import wandering

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes
from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_pipeline.vae.program import Program, decoder_program
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.strategy import StrategyError
from cosmos3_plugins.layer_pipeline import LayerPipeline, measured, runner
from cosmos3_plugins.layer_pipeline.balance import Run
from cosmos3_plugins.replicated import Replicated

# name, config, dtype, latent frames, latent rows and columns, batch
CASES = [
    ("wan22", vae_config(WAN22), torch.float32, 5, (5, 3), 1),
    ("wan22 bf16", vae_config(WAN22), torch.bfloat16, 3, (3, 4), 1),
    ("wan22 image", vae_config(WAN22), torch.float32, 1, (7, 5), 1),
    ("wan21 batch", vae_config(WAN21), torch.float32, 4, (2, 5), 2),
    ("wan21 bf16", vae_config(WAN21), torch.bfloat16, 2, (3, 3), 1),
    ("one halving", vae_config(WAN22, temperal_downsample=[False, True, False]), torch.float32, 5, (2, 3), 1),
]


@dataclass
class Wandering(LayerPipeline):
    """The cuts move as they like, whatever it is worth, each in a zone of its own."""

    seed: int = 0

    @property
    def depends_on_clip(self) -> bool:
        return True

    def runs(self, program: Program, shape: LatentShape, ranks: int) -> tuple[Run, ...]:
        chunks = program.chunks(shape)
        edges = [1 + i * (len(program) - 1) // (ranks - 1) for i in range(ranks)]
        cuts = [wandering(program, zone, chunks, self.seed + i) for i, zone in enumerate(pairwise(edges))]
        paths = [[0] * chunks, *cuts, [len(program)] * chunks]
        runs = [tuple(zip(starts, stops, strict=True)) for starts, stops in pairwise(paths)]
        found = [Run((min(a for a, _ in on), max(b for _, b in on)), on) for on in runs]
        return tuple(reversed(found))


def _both_ways(rank: int, ranks: int, strategy: LayerPipeline) -> list[dict[str, Any]]:
    seen = []
    for seed, (name, config, dtype, frames, (rows, cols), batch) in enumerate(CASES):
        model = make_vae(config, seed=seed, dtype=dtype)
        # The reference runs in every rank alone.
        alone = ParallelVAE(model, Replicated(), Replicated())
        piped = ParallelVAE(model, strategy, strategy)
        torch.manual_seed(seed)
        z = torch.randn(batch, config["z_dim"], frames, rows, cols).to(dtype)
        size = piped._bound().program("encode").spatial
        pictures = 1 + (frames - 1) * (4 // piped._bound().program("encode").latents_per_chunk)
        x = (torch.rand(batch, 3, pictures, rows * size, cols * size) * 2 - 1).to(dtype)
        shape = LatentShape(batch, frames, rows, cols, dtype.itemsize)

        picture = alone.decode(z).sample
        assert picture.std() > 0.05
        assert torch.equal(piped.decode(z).sample, picture), name
        moments = alone.encode(x).latent_dist.parameters
        before = piped.ledger.snapshot()
        assert torch.equal(piped.encode(x).latent_dist.parameters, moments), name
        encoded = piped.ledger.since(before)
        decoded = None
        if batch == 1:
            before = piped.ledger.snapshot()
            frames_seen = list(piped.decode_stream(z))
            decoded = piped.ledger.since(before)
            if rank == 0:
                assert torch.equal(torch.cat(frames_seen), torch.cat(list(alone.decode_stream(z)))), name
            else:
                assert frames_seen == []
                list(alone.decode_stream(z))
        plans = {d: piped.plan(d, shape).shares[rank] for d in ("encode", "decode")}
        for ledger, share in ((encoded, plans["encode"]), (decoded, plans["decode"])):
            if ledger is not None:
                assert (ledger.sent_bytes, ledger.sent_messages) == (share.sent_bytes, share.sent_messages), name
        seen.append({"received": decoded.counts["recv"].bytes if decoded and "recv" in decoded.counts else 0})
    return seen


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_replicated_and_to_the_plan(ranks: int) -> None:
    run_on_ranks(_both_ways, ranks, ranks, LayerPipeline(), timeout=90)


@pytest.mark.parametrize(("ranks", "seed"), [(2, 0), (2, 1), (3, 2), (4, 3)])
def test_cuts_that_move_are_equal_to_replicated_and_to_the_plan(ranks: int, seed: int) -> None:
    run_on_ranks(_both_ways, ranks, ranks, Wandering(seed=seed), timeout=90)


def _divided_by(rank: int, path: str, *, alike: bool) -> str | None:
    config = vae_config(WAN22, decoder_base_dim=32)
    model = make_vae(config)
    strategy = LayerPipeline(op_seconds=path)
    vae = ParallelVAE(model, Replicated(), strategy)
    z = torch.randn(1, config["z_dim"], 6, 4, 3, generator=torch.Generator().manual_seed(0))
    if not alike:
        monkeypatch = pytest.MonkeyPatch()
        known = replace(measured.op_seconds(path), digest=f"of rank {rank}")
        monkeypatch.setattr(runner, "op_seconds", lambda path: known)
        with pytest.raises(StrategyError) as error:
            vae.decode(z)
        return str(error.value)
    share = vae.plan("decode", LatentShape(1, 6, 4, 3)).shares[rank]
    assert torch.equal(vae.decode(z).sample, ParallelVAE(model, Replicated(), Replicated()).decode(z).sample)
    before = vae.ledger.snapshot()
    list(vae.decode_stream(z))
    counted = vae.ledger.since(before)
    assert (counted.sent_bytes, counted.sent_messages) == (share.sent_bytes, share.sent_messages)
    return None


@pytest.mark.parametrize("alike", [True, False])
def test_divided_by_measured_seconds_of_ops(tmp_path: Path, *, alike: bool) -> None:
    config = vae_config(WAN22, decoder_base_dim=32)
    program = decoder_program(config)
    ops = [{"name": op.name, "first_s": 0.2, "later_s": 1.0 + number % 3} for number, op in enumerate(program.ops)]
    path = tmp_path / "bench.json"
    case = {"latent_rows": 4, "latent_cols": 3, "alone": ops}
    path.write_text(json.dumps({"vae": config, "costs": {"cases": {"line": case}}}))
    assert LayerPipeline(op_seconds=str(path)).plan(program, LatentShape(1, 6, 4, 3), 3) != (
        LayerPipeline().plan(program, LatentShape(1, 6, 4, 3), 3)
    )
    words = run_on_ranks(partial(_divided_by, alike=alike), 3, str(path))
    assert alike == (words == [None] * 3)
    assert alike or all("copy one to every machine" in text for text in words)


def _two_sizes(rank: int, dtype: torch.dtype) -> list[tuple[tuple[int, int], int]]:
    config = vae_config(WAN22, decoder_base_dim=64)
    model = make_vae(config, dtype=dtype)
    alone = ParallelVAE(model, Replicated(), Replicated())
    piped = ParallelVAE(model, LayerPipeline(), LayerPipeline())
    runs = []
    for rows, cols in ((1, 2), (12, 10), (1, 2)):
        z = torch.randn(1, config["z_dim"], 3, rows, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)
        assert torch.equal(piped.decode(z).sample, alone.decode(z).sample)
        ops, place = piped._runners["decode"]._bound  # type: ignore[attr-defined]
        share = piped.plan("decode", LatentShape(1, 3, rows, cols, dtype.itemsize)).shares[rank]
        assert (ops, place._slice.weight_bytes) == (share.ops, share.weight_bytes)
        runs.append((ops, share.flops // (rows * cols)))
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_picture_is_divided_by_the_weights_too(dtype: torch.dtype) -> None:
    last, first = run_on_ranks(_two_sizes, 2, dtype)
    for runs in (last, first):
        assert runs[0] == runs[2] != runs[1]
    # The early ops have most of the weights, so for few pixels the first stage has fewer of them.
    assert first[0][1] < first[1][1]


def _stream_memory(rank: int) -> list[tuple[int, int]]:
    """Peak bytes, and those planned, of clips of some lengths."""
    config = vae_config(WAN22, base_dim=16, decoder_base_dim=16)
    model = make_vae(config)
    vae = ParallelVAE(model, LayerPipeline(), LayerPipeline())
    peaks = []
    for frames in (9, 9, 17, 64, 128):
        z = torch.randn(1, config["z_dim"], frames, 6, 6)
        with LiveBytes([*model.state_dict().values(), z]) as live:
            for _ in vae.decode_stream(z):
                pass
        peaks.append((live.peak, vae.plan("decode", LatentShape(1, frames, 6, 6)).shares[rank].activation_bytes))
    return peaks[1:]  # the first call binds and reorders weights


@pytest.mark.parametrize("ranks", [2, 3])
def test_stream_memory_is_as_planned_and_does_not_grow(ranks: int) -> None:
    for peaks in run_on_ranks(_stream_memory, ranks, timeout=90):
        assert all(abs(planned / peak - 1) <= 0.15 for peak, planned in peaks)
        # Which ops a rank runs at once depends on the length, but not how many.
        (_, _), (_, _), (few, _), (many, _) = peaks
        assert many <= 1.01 * few


def _encode_memory(rank: int) -> list[tuple[int, int]]:
    """Peak bytes, and those planned, without the moments of the whole clip."""
    config = vae_config(WAN22, base_dim=24, decoder_base_dim=16)
    model = make_vae(config)
    vae = ParallelVAE(model, LayerPipeline(), LayerPipeline())
    peaks = []
    for frames in (9, 9, 17):
        x = torch.rand(1, 3, 4 * frames - 3, 96, 96)
        with vae.comm.run(), LiveBytes([*model.state_dict().values(), x]) as live:
            vae._runner("encode").encode(x)
        peaks.append((live.peak, vae.plan("encode", LatentShape(1, frames, 6, 6)).shares[rank].activation_bytes))
    return peaks[1:]  # the first call binds and reorders weights


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_memory_of_encoding_is_as_planned(ranks: int) -> None:
    for peaks in run_on_ranks(_encode_memory, ranks, timeout=90):
        assert all(abs(planned / peak - 1) <= 0.15 for peak, planned in peaks), peaks


def _held_weights(rank: int) -> tuple[int, int, bool]:
    config = vae_config(WAN22)
    model = make_vae(config)
    z = torch.randn(1, config["z_dim"], 2, 3, 2, generator=torch.Generator().manual_seed(0))
    unsettled = ParallelVAE(model, LayerPipeline(), LayerPipeline())
    before = unsettled.decode(z).sample
    with pytest.raises(StrategyError, match="give the strategy that its settled"):
        unsettled.release("decode")
    settled = LayerPipeline().settled(unsettled._bound().program("decode"), LatentShape(1, 2, 3, 2), 3)
    vae = ParallelVAE(model, settled, settled)
    vae.release("decode")
    left = sum(p.numel() for p in model.parameters() if not p.is_meta)
    same = torch.equal(vae.decode(z).sample, before)
    _, place = vae._runners["decode"]._bound  # type: ignore[attr-defined]
    return place._slice.weight_bytes, left, same


def test_release_leaves_each_rank_its_own_weights() -> None:
    config = vae_config(WAN22)
    model = make_vae(config)
    alone = ParallelVAE(model, Replicated(), Replicated())
    program = alone._bound().program("decode")
    shares = LayerPipeline().plan(program, LatentShape(1, 2, 3, 2), 3).shares
    for share, (held, left, same) in zip(shares, run_on_ranks(_held_weights, 3), strict=True):
        assert held == share.weight_bytes
        assert left == 0
        assert same
    total = sum(p.numel() for part in (model.decoder, model.post_quant_conv) for p in part.parameters())
    twice = [program.weight_elements(below.ops[0], above.ops[1]) for below, above in pairwise(shares)]
    assert sum(share.weight_bytes for share in shares) == 4 * (total + sum(twice))


def _read_weights(rank: int, folder: str) -> tuple[set[str], torch.Tensor]:
    from cosmos3_pipeline.vae.weights import FolderWeights

    names: set[str] = set()
    load = FolderWeights.load

    def recorded(self: Any, wanted: Any, **kwargs: Any) -> Any:
        names.update(wanted)
        return load(self, wanted, **kwargs)

    FolderWeights.load = recorded  # type: ignore[method-assign]
    vae = ParallelVAE.from_folder(folder, LayerPipeline(), LayerPipeline())
    z = torch.randn(1, vae.config.z_dim, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    return names, vae.decode(z).sample


def test_from_a_folder_each_rank_reads_only_its_own(tmp_path: Any) -> None:
    model = make_vae(vae_config(WAN22))
    model.save_pretrained(tmp_path)
    outcomes = run_on_ranks(_read_weights, 2, str(tmp_path))
    decoder = {n for n in model.state_dict() if n.startswith(("decoder", "post_quant"))}
    assert outcomes[0][0] | outcomes[1][0] == decoder
    program = decoder_program(model.config)
    below, above = LayerPipeline().plan(program, LatentShape(1, 2, 3, 2), 2).shares
    both = {weight.name for weight in program.weights(below.ops[0], above.ops[1])}
    assert outcomes[0][0] & outcomes[1][0] == both
    z = torch.randn(1, model.config.z_dim, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = ParallelVAE(model, Replicated(), Replicated()).decode(z).sample
    for _, picture in outcomes:
        assert torch.equal(picture, expected)


def _subgroups(rank: int) -> torch.Tensor:
    import torch.distributed as dist

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    if rank % 2:  # what else a process has set up does not matter
        dist.new_group([rank], use_local_synchronization=True)
    config = vae_config(WAN22)
    z = torch.randn(1, config["z_dim"], 2, 3, 2, generator=torch.Generator().manual_seed(rank // 2))
    vae = ParallelVAE(make_vae(config), LayerPipeline(), LayerPipeline(), group=pairs[rank // 2])
    return vae.decode(z).sample


def test_two_groups_decode_their_own_clips() -> None:
    pictures = run_on_ranks(_subgroups, 4)
    alone = ParallelVAE(make_vae(vae_config(WAN22)), Replicated(), Replicated())
    for rank, picture in enumerate(pictures):
        z = torch.randn(1, WAN22["z_dim"], 2, 3, 2, generator=torch.Generator().manual_seed(rank // 2))
        assert torch.equal(picture, alone.decode(z).sample)


def _pipeline(rank: int) -> torch.Tensor:
    model = make_vae(vae_config(WAN21, z_dim=16))
    return wan_video(ParallelVAE(model, LayerPipeline(), LayerPipeline()))


def test_wan_pipeline_gives_the_same_video_on_two_ranks() -> None:
    model = make_vae(vae_config(WAN21, z_dim=16))
    alone = wan_video(ParallelVAE(model, Replicated(), Replicated()))
    for video in run_on_ranks(_pipeline, 2):
        assert torch.equal(video, alone)


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
