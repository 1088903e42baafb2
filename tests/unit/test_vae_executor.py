"""The executor against `AutoencoderKLWan`, in slices and on slabs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_program import attention_in_encoder
from torch import Tensor
from vae_models import WAN21, WAN22, make_vae, vae_config
from wandering_cuts import wandering

from cosmos3_pipeline.vae import ParallelVAE, footprint
from cosmos3_pipeline.vae.executor import Slice
from cosmos3_pipeline.vae.ops import LatentShape, Margins
from cosmos3_pipeline.vae.pixels import latent_chunk, picture_chunk
from cosmos3_pipeline.vae.program import Program, decoder_program, encoder_program
from cosmos3_plugins.layer_pipeline.passing import Passing
from cosmos3_plugins.replicated import Replicated

CONFIGS = {
    "wan22": vae_config(WAN22),
    "wan22 patch 4": vae_config(WAN22, patch_size=4, in_channels=48, out_channels=48, num_res_blocks=2),
    "wan22 time first": vae_config(WAN22, temperal_downsample=[True, True, False], decoder_base_dim=12),
    "wan21": vae_config(WAN21),
    "wan21 attention": vae_config(WAN21, attn_scales=[0.5], temperal_downsample=[True, False, False]),
    "wan21 two levels": vae_config(WAN21, dim_mult=[1, 2], temperal_downsample=[True]),
}


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels on [-1, 1]."""
    return float(10 * torch.log10(4 / (a.double() - b.double()).pow(2).mean()))


def spatial(vae: Any) -> int:
    return decoder_program(vae.config).spatial


def picture_of(
    vae: Any, *, frames: int = 9, rows: int = 3, cols: int = 2, batch: int = 1, seed: int = 0
) -> Tensor:
    scale = spatial(vae)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, rows * scale, cols * scale, generator=generator) * 2 - 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("seed", "frames", "rows", "cols", "batch"), [(0, 4, 5, 3, 1), (1, 1, 2, 7, 2)])
def test_decode_is_that_of_diffusers(name: str, seed: int, frames: int, rows: int, cols: int, batch: int) -> None:
    vae = make_vae(CONFIGS[name], seed=seed)
    torch.manual_seed(seed)
    z = torch.randn(batch, vae.config.z_dim, frames, rows, cols)
    expected = vae.decode(z).sample
    ours = ParallelVAE(vae, Replicated(), Replicated()).decode(z).sample
    assert expected.std() > 0.2
    assert (expected.abs() >= 1).float().mean() < 0.1
    assert (ours - expected).abs().max() <= 1e-5
    assert psnr(ours, expected) >= 100


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_what_crosses_a_cut_can_be_sent(name: str, direction: str) -> None:
    vae = make_vae(CONFIGS[name])
    program = (decoder_program if direction == "decode" else encoder_program)(vae.config)
    z, x = torch.randn(2, program.z_dim, 2, 3, 2), picture_of(vae, frames=5, batch=2)
    for cut in range(1, len(program)):
        part = Slice(program, 0, cut, vae.state_dict())
        state = part.state(2)
        for index in range(2):
            given = latent_chunk(z, index) if direction == "decode" else picture_chunk(x, index)
            for portion in part.portions([[given]], state):
                assert all(tensor.is_contiguous() for tensor in portion), program.ops[cut - 1].name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("seed", "frames"), [(0, 9), (1, 1)])
def test_encode_is_that_of_diffusers(name: str, seed: int, frames: int) -> None:
    vae = make_vae(CONFIGS[name], seed=seed)
    x = picture_of(vae, frames=frames, batch=2, seed=seed)
    with attention_in_encoder():
        expected = vae.encode(x).latent_dist
    ours = ParallelVAE(vae, Replicated(), Replicated()).encode(x).latent_dist
    assert expected.mean.std() > 0.1
    assert (ours.mode() - expected.mode()).abs().max() <= 1e-5
    assert (ours.logvar - expected.logvar).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["wan22", "wan21"])
def test_bfloat16_is_no_further_from_float32_than_diffusers(name: str) -> None:
    """Over several models and inputs: which of two roundings is nearer in one of them is chance."""
    ours, theirs = {"decode": 0.0, "encode": 0.0}, {"decode": 0.0, "encode": 0.0}
    for seed in range(4):
        exact = make_vae(CONFIGS[name], seed=seed)
        torch.manual_seed(seed)
        z, x = torch.randn(2, exact.config.z_dim, 4, 5, 3), picture_of(exact, seed=seed)
        picture, moments = exact.decode(z).sample, exact.encode(x).latent_dist.parameters
        vae = make_vae(CONFIGS[name], seed=seed, dtype=torch.bfloat16)
        parallel = ParallelVAE(vae, Replicated(), Replicated())
        for model, total in ((parallel, ours), (vae, theirs)):
            total["decode"] += float((model.decode(z.bfloat16()).sample - picture).pow(2).mean())
            total["encode"] += float((model.encode(x.bfloat16()).latent_dist.parameters - moments).pow(2).mean())
    assert ours["decode"] <= theirs["decode"]
    assert ours["encode"] <= theirs["encode"]


def chunks_of(program: Program, vae: Any, chunks: int = 3) -> list[Tensor]:
    if program.direction == "decode":
        z = torch.randn(1, vae.config.z_dim, chunks, 4, 3, generator=torch.Generator().manual_seed(3))
        return [latent_chunk(z, i) for i in range(chunks)]
    x = picture_of(vae, frames=1 + 4 * (chunks - 1), rows=4, cols=3, seed=3)
    return [picture_chunk(x, i) for i in range(chunks)]


@pytest.mark.parametrize("make_program", [decoder_program, encoder_program])
@pytest.mark.parametrize("name", ["wan22", "wan21"])
def test_any_cut_gives_the_same_bits(name: str, make_program: Callable[..., Program], bands: None) -> None:
    vae = make_vae(CONFIGS[name])
    program = make_program(vae.config)
    weights = vae.state_dict()
    chunks = chunks_of(program, vae)
    whole = Slice(program, 0, len(program), weights)
    state = whole.state(3)
    expected = [whole.run([chunk.clone()], state)[0] for chunk in chunks]
    closing = {number for number, op in enumerate(program.ops) if op.closes}
    for cut in sorted({*range(1, len(program), 3)} | closing):
        own = {w.name for w in program.weights(cut)}
        parts = [
            Slice(program, 0, cut, {k: v for k, v in weights.items() if k not in own}),
            Slice(program, cut, len(program), {k: weights[k] for k in own}),
        ]
        states = [part.state(3) for part in parts]
        for i, chunk in enumerate(chunks):
            crossing = list(parts[0].portions([[chunk.clone()]], states[0]))
            shape = crossing[0][0].shape
            scale = program.carried(cut)[0].scale
            latent = LatentShape(1, 3, shape[2] // scale, shape[3] // scale)
            assert len(crossing) == program.portions_at(cut, first=i == 0)
            for tensors in crossing:
                shapes = [tuple(t.shape) for t in tensors]
                assert shapes == list(program.carried_shapes(cut, latent, first=i == 0)), cut
            # As from another rank, or as they are, two of them perhaps in the same memory.
            given = [[t.clone() if cut % 2 else t for t in tensors] for tensors in crossing]
            results = list(parts[1].portions(given, states[1]))
            result = torch.cat([picture for (picture,) in results], dim=2 if program.direction == "decode" else 1)
            assert torch.equal(result, expected[i]), (cut, i)


@pytest.mark.parametrize("make_program", [decoder_program, encoder_program])
@pytest.mark.parametrize("name", ["wan22", "wan21"])
def test_a_cut_that_moves_gives_the_same_bits(
    name: str, make_program: Callable[..., Program], bands: None
) -> None:
    vae = make_vae(CONFIGS[name])
    program, weights = make_program(vae.config), vae.state_dict()
    chunks = chunks_of(program, vae, 6)
    whole = Slice(program, 0, len(program), weights)
    state = whole.state(6)
    expected = [whole.run([chunk.clone()], state)[0] for chunk in chunks]
    moved: Counter[str] = Counter()
    for seed in range(24):
        first = 1 + seed * (len(program) - 12) // 23
        path = wandering(program, (first, first + 11), 6, seed)
        above = Slice(program, 0, max(path), weights)
        below = Slice(program, min(path), len(program), weights)
        states = above.state(6), below.state(6)
        latent = LatentShape(1, 6, 4, 3)
        sent: list[tuple[Tensor, Tensor]] = []
        leaving = Passing(program, latent, [(0, cut) for cut in path])
        coming = Passing(program, latent, [(cut, len(program)) for cut in path])
        for i, (chunk, cut) in enumerate(zip(chunks, path, strict=True)):
            for op in coming.handed_back(i):
                below.forget(op, states[1])
                moved["on"] += 1
            assert leaving.handed_over(i) == coming.taken_over(i)
            for op in leaving.handed_over(i):
                kept = above.kept(op, states[0])
                assert tuple(kept.shape) == program.kept_shape(op, latent)
                below.keep(op, states[1], kept.clone())
                if op != cut or not leaving.keeps_passed(i):
                    above.forget(op, states[0])
                moved["back"] += 1
            keeps = leaving.keeps_passed(i)
            crossing = list(above.portions([[chunk.clone()]], states[0], run=(0, cut), keeps_passed=keeps))
            assert len(crossing) == program.portions_at(cut, first=i == 0)
            # What may still be on its way is not written to.
            assert all(torch.equal(tensor, before) for tensor, before in sent)
            sent = [(tensor, tensor.clone()) for tensors in crossing for tensor in tensors]
            given = [[before.clone() for before in tensors] for tensors in crossing]
            results = list(below.portions(given, states[1], run=(cut, len(program))))
            result = torch.cat([picture for (picture,) in results], dim=2 if program.direction == "decode" else 1)
            assert torch.equal(result, expected[i]), (path, i)
    assert min(moved["on"], moved["back"]) >= 20


@pytest.mark.parametrize("batch", [1, 2])
def test_whole_chunks_pass_any_cut_as_well(batch: int) -> None:
    vae = make_vae(CONFIGS["wan22"])
    program, weights = decoder_program(vae.config), vae.state_dict()
    z = torch.randn(batch, vae.config.z_dim, 3, 4, 3, generator=torch.Generator().manual_seed(3))
    whole = Slice(program, 0, len(program), weights)
    state = whole.state(3)
    expected = [whole.run([latent_chunk(z, i)], state)[0] for i in range(3)]
    for cut in (program.portions_from - 1, program.portions_from, program.portions_from + 3, len(program) - 1):
        parts = [Slice(program, 0, cut, weights), Slice(program, cut, len(program), weights)]
        states = [part.state(3) for part in parts]
        for i in range(3):
            (result,) = parts[1].run(parts[0].run([latent_chunk(z, i)], states[0]), states[1])
            assert torch.equal(result, expected[i]), (cut, i)


class ThreadSlabs:
    """Slabs of rows in threads: an exchange that hands rows over in memory. Each thread has its own `side`."""

    def __init__(self, edges: list[int], *, axis: str) -> None:
        self.edges = edges
        self.count = len(edges) - 1
        self.axis = axis
        self.barrier = threading.Barrier(self.count, timeout=30)
        self.slots: list[Any] = [None] * self.count

    def side(self, index: int) -> _Side:
        return _Side(self, index)

    def share(self, index: int, value: Any) -> list[Any]:
        self.barrier.wait()
        self.slots[index] = value
        self.barrier.wait()
        return list(self.slots)


class _Side:
    def __init__(self, slabs: ThreadSlabs, index: int) -> None:
        self.slabs, self.index = slabs, index
        self.rows, self.cols = slabs.axis == "rows", slabs.axis == "cols"

    def coming(self, margins: Margins) -> Margins:
        before, after = self.index > 0, self.index + 1 < self.slabs.count
        return margins.on(before, after, False, False) if self.rows else margins.on(False, False, before, after)

    def start(self, padded: Tensor, margins: Margins) -> Callable[[], None]:
        dim = 2 if self.rows else 3
        before, after = (margins.top, margins.bottom) if self.rows else (margins.left, margins.right)
        size = padded.shape[dim]
        inner = padded.narrow(dim, before, size - before - after)
        coming = self.coming(margins)
        # What is read too early spoils the picture.
        if coming.top or coming.left:
            padded.narrow(dim, 0, before).fill_(torch.nan)
        if coming.bottom or coming.right:
            padded.narrow(dim, size - after, after).fill_(torch.nan)
        everyone = self.slabs.share(self.index, inner)

        def fill() -> None:
            if before and self.index:
                above = everyone[self.index - 1]
                padded.narrow(dim, 0, before).copy_(above.narrow(dim, above.shape[dim] - before, before))
            if after and self.index + 1 < self.slabs.count:
                below = everyone[self.index + 1]
                padded.narrow(dim, size - after, after).copy_(below.narrow(dim, 0, after))
            self.slabs.barrier.wait()

        return fill

    def gather(self, slab: Tensor) -> Tensor:
        return torch.cat(self.slabs.share(self.index, slab), dim=2 if self.rows else 3)


@pytest.fixture(params=["frame by frame", "pairs in bands"])
def bands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small convolutions as they are, and as large ones do their work: two frames at a time, in bands of rows."""
    if request.param == "pairs in bands":
        for name, value in (("_PAIR_FLOPS", 0), ("_PAIR_PIXELS", 0), ("_BAND_ELEMENTS", 1 << 12)):
            monkeypatch.setattr(footprint, name, value)


@pytest.mark.parametrize("axis", ["rows", "cols"])
@pytest.mark.parametrize("edges", [[0, 3, 5], [0, 1, 2, 5]])
@pytest.mark.parametrize("make_program", [decoder_program, encoder_program])
@pytest.mark.parametrize("name", ["wan22", "wan21 attention"])
def test_slabs_make_the_same_picture(
    name: str, make_program: Callable[..., Program], edges: list[int], axis: str, bands: None
) -> None:
    vae = make_vae(CONFIGS[name])
    program = make_program(vae.config)
    rows, cols = (5, 3) if axis == "rows" else (3, 5)
    if program.direction == "decode":
        z = torch.randn(1, vae.config.z_dim, 3, rows, cols, generator=torch.Generator().manual_seed(5))
        chunks, dim, scale = [latent_chunk(z, i) for i in range(3)], 2, 1
    else:
        x = picture_of(vae, rows=rows, cols=cols, seed=5)
        chunks, dim, scale = [picture_chunk(x, i) for i in range(3)], 3, program.spatial
    dim += axis == "cols"
    whole = Slice(program, 0, len(program), vae.state_dict())
    state = whole.state(3)
    expected = [whole.run([chunk.clone()], state)[0] for chunk in chunks]

    slabs = ThreadSlabs(edges, axis=axis)
    results: list[Any] = [None] * slabs.count

    def work(index: int) -> None:
        part = Slice(program, 0, len(program), vae.state_dict())
        own = part.state(3)
        low, high = edges[index] * scale, edges[index + 1] * scale
        results[index] = [
            part.run([chunk.narrow(dim, low, high - low).contiguous()], own, slabs.side(index))[0]
            for chunk in chunks
        ]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(slabs.count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    out_dim = (3 if program.direction == "decode" else 2) + (axis == "cols")
    for i in range(3):
        joined = torch.cat([result[i] for result in results], dim=out_dim)
        assert (joined - expected[i]).abs().max() <= 1e-5
