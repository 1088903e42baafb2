"""`spatial_shard` in real ranks: diffusers' picture up to rounding, with the planned bytes and memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_vae_faults import _break, _outcome
from vae_models import WAN21, WAN22, make_vae, vae_config

from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes
from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_pipeline.vae.pixels import to_uint8
from cosmos3_pipeline.vae.program import encoder_program
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.strategy import Strategy, StrategyError
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard

# config, dtype, latent frames, latent rows and columns, batch
Case = tuple[dict[str, Any], torch.dtype, int, tuple[int, int], int]
CASES: dict[str, Case] = {
    "wan22": (vae_config(WAN22), torch.float32, 3, (5, 4), 1),
    "wan22 image": (vae_config(WAN22, patch_size=4, in_channels=48, out_channels=48), torch.float32, 1, (7, 5), 1),
    "wan22 bf16": (vae_config(WAN22), torch.bfloat16, 2, (4, 5), 1),
    "wan21": (vae_config(WAN21, temperal_downsample=[True, False, True]), torch.float32, 3, (6, 7), 1),
    "wan21 batch": (vae_config(WAN21), torch.float32, 2, (5, 4), 2),
    "wan21 bf16": (vae_config(WAN21), torch.bfloat16, 2, (4, 4), 1),
    # So large that convolutions make two frames at a time, on slabs of different heights.
    "wan22 pairs": (vae_config(WAN22, base_dim=24, decoder_base_dim=24), torch.float32, 3, (13, 6), 1),
}


@cache
def inputs_of(name: str) -> tuple[Any, torch.Tensor, torch.Tensor, LatentShape]:
    """A random model, a latent, a picture, and the shape of both."""
    config, dtype, frames, (rows, cols), batch = CASES[name]
    seed = list(CASES).index(name)
    model = make_vae(config, seed=seed, dtype=dtype)
    program = encoder_program(config)
    torch.manual_seed(seed)
    z = torch.randn(batch, config["z_dim"], frames, rows, cols).to(dtype)
    pictures = 1 + (frames - 1) * 4 // program.latents_per_chunk
    x = (torch.rand(batch, 3, pictures, rows * program.spatial, cols * program.spatial) * 2 - 1).to(dtype)
    return model, z, x, LatentShape(batch, frames, rows, cols, dtype.itemsize)


def plain(tensor: torch.Tensor) -> Any:
    """As a float array, which may leave the process before the process ends."""
    return tensor.float().numpy()


def both_ways(rank: int, strategy: Strategy, names: list[str]) -> list[dict[str, Any]]:
    """Each case decoded, streamed and encoded; what was sent equals the plan on this rank."""
    results = []
    for name in names:
        model, z, x, shape = inputs_of(name)
        vae = ParallelVAE(model, strategy, strategy)
        picture = vae.decode(z).sample
        before = vae.ledger.snapshot()
        moments = vae.encode(x).latent_dist.parameters
        used = {"encode": vae.ledger.since(before)}
        if shape.batch == 1:
            before = vae.ledger.snapshot()
            chunks = list(vae.decode_stream(z))
            used["decode"] = vae.ledger.since(before)
            if rank == 0:
                assert len(chunks[0]) == 1 and len(chunks) >= shape.frames
                assert torch.equal(torch.cat(chunks), to_uint8(picture)[0])
            else:
                assert chunks == []
        for direction, ledger in used.items():
            share = vae.plan(direction, shape).shares[rank]  # type: ignore[arg-type]
            assert (ledger.sent_bytes, ledger.sent_messages) == (share.sent_bytes, share.sent_messages), name
        results.append({"picture": plain(picture), "moments": plain(moments)})
    return results


@cache
def expected_of(name: str, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers gives, in float32 and in the case's dtype."""
    model, z, x, _ = inputs_of(name)
    exact = make_vae(CASES[name][0], seed=list(CASES).index(name))
    if direction == "decode":
        return exact.decode(z.float()).sample, model.decode(z).sample
    return exact.encode(x.float()).latent_dist.parameters, model.encode(x).latent_dist.parameters


def squared_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).pow(2).mean())


def check_against_diffusers(strategy: Strategy, ranks: int, names: list[str]) -> list[list[dict[str, Any]]]:
    """On every rank: the same result, within 1e-5 and 100 dB in float32, no further than diffusers in bfloat16."""
    by_rank = run_on_ranks(both_ways, ranks, strategy, names, timeout=90)
    for number, name in enumerate(names):
        for direction, kind in (("decode", "picture"), ("encode", "moments")):
            ours = torch.from_numpy(by_rank[0][number][kind])
            exact, theirs = expected_of(name, direction)
            assert exact.std() > 0.1
            if theirs.dtype == torch.bfloat16:
                assert squared_error(ours, exact) <= squared_error(theirs, exact), (name, kind)
            else:
                assert (ours - exact).abs().max() <= 1e-5, (name, kind)
                assert squared_error(ours, exact) <= 4e-10, (name, kind)  # 100 dB on [-1, 1]
            for other in by_rank[1:]:
                assert (other[number][kind] == by_rank[0][number][kind]).all(), (name, kind)
    return by_rank


FULL, SHORT = list(CASES), ["wan22", "wan21 batch", "wan21 bf16"]


@pytest.mark.parametrize(
    ("axis", "ranks", "names"),
    [
        ("height", 1, SHORT),
        ("height", 2, FULL),
        ("height", 3, SHORT),
        ("height", 4, SHORT),
        ("width", 2, SHORT),
        ("width", 4, ["wan21"]),
        ("grid", 4, FULL),
    ],
)
def test_it_is_diffusers_picture_and_the_plan(axis: Any, ranks: int, names: list[str]) -> None:
    check_against_diffusers(SpatialShard(axis), ranks, names)


def test_bands_of_rows_of_narrow_models_equal_one_rank_in_every_bit() -> None:
    """Observed, not promised: oneDNN blocks by the slab's shape, which shows in wide models and in columns."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("the convolutions are not oneDNN's")
    names = ["wan22", "wan21"]
    ((sharded, _), (replicated,)) = (
        run_on_ranks(both_ways, ranks, strategy, names)
        for ranks, strategy in ((2, SpatialShard()), (1, Replicated()))
    )
    for ours, alone in zip(sharded, replicated, strict=True):
        assert (ours["picture"] == alone["picture"]).all()
        assert (ours["moments"] == alone["moments"]).all()


def _encoded(rank: int, strategy: Strategy) -> Any:
    config = vae_config(WAN22)
    torch.manual_seed(11)
    x = torch.rand(1, 3, 5, 11 * 16, 3 * 16) * 2 - 1
    return plain(ParallelVAE(make_vae(config), strategy, strategy).encode(x).latent_dist.mode())


@pytest.mark.parametrize("ranks", [2, 3])
def test_encoding_11_latent_rows_over_ranks_that_do_not_divide_them_changes_nothing(ranks: int) -> None:
    (expected,) = run_on_ranks(_encoded, 1, Replicated())
    for ours in run_on_ranks(_encoded, ranks, SpatialShard()):
        worst = abs(ours - expected).max(axis=(0, 1, 2, 4))  # per latent row
        assert worst.shape == (11,)
        assert worst.max() <= 1e-5


def _over_too_many(rank: int) -> str:
    vae = ParallelVAE(make_vae(vae_config(WAN22)), SpatialShard(), SpatialShard("width"))
    try:
        vae.decode(torch.zeros(1, WAN22["z_dim"], 2, 5, 2))
    except StrategyError as error:
        assert not vae._runners  # nothing was bound
        return str(error)
    raise AssertionError("not refused")


def test_more_ranks_than_columns_are_refused_on_every_rank() -> None:
    for message in run_on_ranks(_over_too_many, 3):
        assert "over 3 ranks on a latent of 5 rows and 2 columns" in message
        assert "use 2 ranks or fewer, or axis=height" in message


def _faulty(rank: int, broken: int, way: str) -> tuple[Any, Any]:
    from cosmos3_pipeline.vae.executor import Slice

    model, z, x, _ = inputs_of("wan22")
    vae, run = ParallelVAE(model, SpatialShard(), SpatialShard()), Slice.portions
    if rank == broken:
        _break(1, lambda: (_ for _ in ()).throw(MemoryError("no memory for chunk")))
        if way == "close":
            Slice.portions = run  # type: ignore[method-assign]

    def close() -> None:
        stream = vae.decode_stream(z)
        next(stream, None)
        if rank:
            list(stream)
        stream.close()  # type: ignore[attr-defined]

    calls = {"stream": lambda: list(vae.decode_stream(z)), "encode": lambda: vae.encode(x), "close": close}
    failed = _outcome(calls[way])
    Slice.portions = run  # type: ignore[method-assign]
    return failed, plain(vae.decode(z).sample)


@pytest.mark.parametrize(("broken", "way"), [(0, "stream"), (1, "stream"), (1, "encode"), (0, "close")])
def test_a_rank_that_fails_or_stops_in_mid_stream_holds_nobody_up(broken: int, way: str) -> None:
    outcomes = run_on_ranks(_faulty, 2, broken, way)
    for rank, ((error, _, seconds), again) in enumerate(outcomes):
        expected = "MemoryError" if rank == broken else "PeerFailed"
        assert error == ("" if way == "close" else expected)
        assert seconds < 15
        assert abs(again - plain(expected_of("wan22", "decode")[0])).max() <= 1e-5


def _sizes(rank: int) -> list[float]:
    """How far two ranks are from one, clip after clip of other sizes with the same VAE."""
    config = vae_config(WAN22)
    model = make_vae(config)
    vae, alone = ParallelVAE(model, SpatialShard(), SpatialShard()), ParallelVAE(model, Replicated(), Replicated())
    found = []
    for rows, cols in ((4, 3), (4, 5), (7, 3), (4, 3)):
        z = torch.randn(1, config["z_dim"], 2, rows, cols, generator=torch.Generator().manual_seed(cols))
        x = alone.decode(z).sample
        found.append(float((vae.decode(z).sample - x).abs().max()))
        moments = alone.encode(x).latent_dist.parameters
        found.append(float((vae.encode(x).latent_dist.parameters - moments).abs().max()))
    return found


def test_one_vae_serves_clips_of_any_size() -> None:
    for distances in run_on_ranks(_sizes, 2):
        assert max(distances) <= 1e-5


def peak_bytes(rank: int, strategy: Strategy, rows: int, cols: int, frames: int) -> list[tuple[int, int]]:
    """(planned, alive at once) of decoding a stream and of encoding, without the check of the input."""
    config = vae_config(WAN22, base_dim=24, decoder_base_dim=24)
    model = make_vae(config)
    vae = ParallelVAE(model, strategy, strategy)
    z = torch.randn(1, config["z_dim"], frames, rows, cols)
    x = torch.rand(1, 3, 4 * frames - 3, 16 * rows, 16 * cols)
    decoder, encoder = vae._runner("decode"), vae._runner("encode")

    def stream() -> None:
        for _ in decoder.stream(z, pixels="uint8"):
            pass

    seen = []
    for direction, call in (("decode", stream), ("encode", lambda: encoder.encode(x))):
        for _ in range(2):  # the first time reorders weights, which are not activations
            with vae.comm.run(), LiveBytes([*model.state_dict().values(), z, x]) as live:
                call()
        share = vae.plan(direction, LatentShape(1, frames, rows, cols)).shares[rank]  # type: ignore[arg-type]
        seen.append((share.activation_bytes, live.peak))
    return seen


@pytest.mark.parametrize(("axis", "rows", "cols"), [("height", 11, 6), ("grid", 7, 8)])
def test_planned_activations_are_within_15_percent(axis: Any, rows: int, cols: int) -> None:
    for seen in run_on_ranks(peak_bytes, 4, SpatialShard(axis), rows, cols, 3):
        for planned, peak in seen:
            assert abs(planned / peak - 1) <= 0.15, (planned, peak)


def test_decoding_a_longer_clip_takes_no_more_memory() -> None:
    short, long = (run_on_ranks(peak_bytes, 2, SpatialShard(), 2, 1, frames)[0][0] for frames in (6, 24))
    assert long == pytest.approx(short, rel=0.05)
