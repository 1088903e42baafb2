"""The convolution that every op runs: against PyTorch's in float64, one frame and two at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vae_models import WAN22, vae_config

from cosmos3_pipeline.vae import blocking, bound_ops, convolution
from cosmos3_pipeline.vae.bound_ops import Flow
from cosmos3_pipeline.vae.convolution import Convolution
from cosmos3_pipeline.vae.frames import Arrival, Frames
from cosmos3_pipeline.vae.ops import Conv, Margins
from cosmos3_pipeline.vae.program import decoder_program

IN_PAIRS = {"first", "sum", "difference", "last"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def always_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frames at a time however little there is to compute."""
    monkeypatch.setattr(blocking, "_PAIR_FLOPS", 0)
    monkeypatch.setattr(blocking, "_PAIR_PIXELS", 0)


def exact(weight: Tensor, bias: Tensor, x: Tensor, padding: tuple[int, int]) -> Tensor:
    """PyTorch's convolution of [B, T, H, W, I] in float64."""
    frames = x.double().permute(0, 4, 1, 2, 3)
    return F.conv3d(frames, weight.double(), bias.double(), padding=(0, *padding)).permute(0, 2, 3, 4, 1)


def made_of(convolution: Convolution, x: Tensor, **options: Any) -> Tensor:
    """The result for frames x [B, T + 2, H, W, I]. A convolution of pairs gets the first two frames separately."""
    if not options.get("taps") and convolution.makes_pairs(x[:, 2:].shape, x):
        return convolution(x[:, 2:], before=x[:, :2], **options)
    return convolution(x, **options)


def reordered(convolution: Convolution) -> set[str]:
    return {name for name, _ in convolution._packed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_convolution_adds_in_place(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(5, 4, 3, 3, 3).to(dtype), torch.randn(5).to(dtype)
    x, kept = torch.randn(2, 4, 6, 5, 4).to(dtype), torch.randn(2, 2, 6, 5, 5).to(dtype)
    conv, onto = Convolution(weight, bias), kept.clone()
    assert conv(x, padding=(1, 1), onto=onto) is onto
    convolved = conv(x, padding=(1, 1)).double()
    expected = convolved + kept.double()
    # Both round: the one its sum, the other the convolution before that. Each is at most half a unit in the last
    # place of bfloat16's eight bits away.
    allowed = (convolved.abs() + expected.abs()) * 2**-8 if dtype == torch.bfloat16 else torch.tensor(1e-5)
    assert ((onto.double() - expected).abs() <= allowed).all()


def test_a_convolution_serves_clips_of_any_size_one_after_the_other() -> None:
    weight, bias = torch.randn(24, 16, 3, 3, 3) / 20, torch.randn(24)
    convolution = Convolution(weight, bias)
    for frames, rows, taps in [
        (1, 5, 1),
        (3, 5, 0),
        (1, 9, 1),
        (6, 9, 0),
        (1, 5, 1),
        (1, 7, 1),
        (3, 4, 0),
        (4, 9, 0),
    ]:
        x = torch.randn(1, frames, rows, 6, 16)
        expected = F.conv3d(x.permute(0, 4, 1, 2, 3), weight[:, :, -taps:], bias, padding=(0, 1, 1))
        made = convolution(x, padding=(1, 1), taps=taps)
        assert torch.allclose(made.permute(0, 4, 1, 2, 3), expected, atol=1e-5)
    # The weight is held in oneDNN's order, and of its copies for other shapes the last two.
    assert convolution._given is None and len(convolution._packed) == 2


@given(data=st.data())
def test_two_frames_at_a_time_are_the_convolution(data: st.DataObject) -> None:
    def drawn(most: int, least: int = 1) -> int:
        return data.draw(st.integers(least, most))

    inputs, outputs, rows, cols, band = drawn(20), drawn(20), drawn(9), drawn(9), drawn(10)
    frames, padding = 2 * drawn(3), (drawn(1, 0), drawn(1, 0))
    generator = torch.Generator().manual_seed(drawn(1000))
    weight = torch.randn(outputs, inputs, 3, 3, 3, generator=generator) / (27 * inputs) ** 0.5
    bias = torch.randn(outputs, generator=generator)
    size = (rows + 2 - 2 * padding[0], cols + 2 - 2 * padding[1])
    x = torch.randn(1, frames + 2, *size, inputs, generator=generator)
    kept = torch.randn(1, frames, rows, cols, outputs, generator=generator)
    expected = exact(weight, bias, x, padding)
    convolution, onto = Convolution(weight, bias), kept.clone()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocking, "_PAIR_FLOPS", 0)
        patched.setattr(blocking, "_PAIR_PIXELS", 0)
        patched.setattr(blocking, "_BAND_ELEMENTS", band * cols * max(inputs, outputs))
        made = made_of(convolution, x, padding=padding)
        assert made_of(convolution, x, padding=padding, onto=onto) is onto
    assert reordered(convolution) == IN_PAIRS
    assert made.is_contiguous() and made.shape == expected.shape
    assert (made - expected).abs().max() <= 1e-5
    assert (onto - kept - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "cols"), [(48, 48, 40, 40), (160, 96, 16, 24), (640, 640, 7, 8)]
)
def test_large_ones_are_made_in_pairs_and_round_much_as_one_frame_does(
    inputs: int, outputs: int, rows: int, cols: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, 3, 3, 3, generator=generator) / (27 * inputs) ** 0.5
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(1, 6, rows, cols, inputs, generator=generator)
    expected = exact(weight, bias, x, (1, 1))
    pairs, one = Convolution(weight, bias), Convolution(weight, bias)
    made = made_of(pairs, x, padding=(1, 1))
    frame_by_frame = torch.cat([one(x[:, t : t + 3].clone(), padding=(1, 1)) for t in range(4)], dim=1)
    assert reordered(pairs) == IN_PAIRS and reordered(one) == {"whole"}
    errors = [(found - expected).pow(2).mean().sqrt() for found in (made, frame_by_frame)]
    assert 0 < errors[0] <= 1.5 * errors[1]


@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 4),
    frames=st.sampled_from([1, 2, 3, 4]),
    margins=st.builds(Margins, *[st.integers(0, 2)] * 2, *[st.integers(0, 1)] * 2),
    band=st.integers(1, 6),
    adds=st.booleans(),
)
def test_what_is_on_its_way_is_waited_for_once_and_not_before_it_must_be(
    rows: int, cols: int, frames: int, margins: Margins, band: int, adds: bool
) -> None:
    weight, bias = torch.randn(6, 4, 3, 3, 3), torch.randn(6)
    height, width = margins.top + rows + margins.bottom, margins.left + cols + margins.right
    x = torch.randn(1, frames + 2, height, width, 4)
    late = x.clone()
    late[:, :, : margins.top] = late[:, :, height - margins.bottom :] = torch.nan
    late[:, :, :, : margins.left] = late[:, :, :, width - margins.right :] = torch.nan
    kept = torch.randn(1, frames, height, width, 6) if adds else None
    bands: list[slice] = []
    made_before: list[int] = []

    def wait() -> None:
        made_before.append(len(bands))
        late.copy_(x)

    make = convolution._Pairs.make

    def made(pairs: convolution._Pairs, one: convolution._Band) -> None:
        bands.append(one.made)
        make(pairs, one)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_PAIR_FLOPS", 0), ("_PAIR_PIXELS", 0), ("_BAND_ELEMENTS", band * width * 6)):
            patch.setattr(blocking, name, value)
        onto = None if kept is None else kept.clone()
        expected = made_of(Convolution(weight, bias), x, padding=(1, 1), onto=onto)
        patch.setattr(convolution._Pairs, "make", made)
        arrival = Arrival(margins, wait)
        found = made_of(Convolution(weight, bias), late, padding=(1, 1), onto=kept, arrival=arrival)
    assert torch.equal(found, expected)
    outer = {*range(margins.top), *range(height - margins.bottom, height)}
    inside = [one for one in bands if not outer & {*range(one.start - 1, one.stop + 1)}]
    assert made_before == [0 if margins.left or margins.right else len(inside)]


def test_only_float32_by_itself_and_an_even_number_of_frames_are_made_in_pairs(always_in_pairs: None) -> None:
    weight, bias = torch.randn(8, 8, 3, 3, 3) / 15, torch.randn(8)
    for x in (torch.randn(1, 5, 4, 4, 8), torch.randn(2, 4, 4, 4, 8), torch.randn(1, 4, 4, 4, 8).bfloat16()):
        convolution = Convolution(weight.to(x.dtype), bias.to(x.dtype))
        made = made_of(convolution, x, padding=(1, 1))
        assert reordered(convolution) == {"whole"}
        assert made.dtype == x.dtype
        assert (made - exact(weight, bias, x, (1, 1))).abs().max() <= (1e-5 if x.dtype == torch.float32 else 0.1)


@given(data=st.data())
def test_bfloat16_without_instructions_for_it_is_made_in_float32_and_rounded_once(data: st.DataObject) -> None:
    def drawn(most: int, least: int = 1) -> int:
        return data.draw(st.integers(least, most))

    batch, inputs, outputs, rows, cols, size = drawn(2), drawn(9), drawn(9), drawn(9, 2), drawn(9, 2), drawn(9)
    kernel, padding, stride, taps = data.draw(
        st.sampled_from(
            [
                ((3, 3, 3), (1, 1), (1, 1, 1), 0),
                ((3, 3, 3), (0, 1), (1, 1, 1), 1),
                ((1, 2, 2), (1, 0), (1, 1, 1), 0),
                ((1, 3, 3), (1, 1), (1, 2, 2), 0),
                ((3, 1, 1), (0, 0), (2, 1, 1), 0),
            ]
        )
    )
    generator = torch.Generator().manual_seed(drawn(1000))
    weight = torch.randn(outputs, inputs, *kernel, generator=generator).bfloat16()
    bias = torch.randn(outputs, generator=generator).bfloat16()
    height = rows + kernel[1] - 1 - 2 * padding[0]
    width = cols + kernel[2] - 1 - 2 * padding[1]
    x = torch.randn(batch, drawn(3) + kernel[0] - 1, height, width, inputs, generator=generator).bfloat16()
    frames, pad = x.double().permute(0, 4, 1, 2, 3), (0, *padding)
    expected = F.conv3d(frames, weight.double()[:, :, -taps:], bias.double(), stride, pad).permute(0, 2, 3, 4, 1)
    kept = torch.randn(expected.shape, generator=generator).bfloat16()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(convolution, "arithmetic_dtype", lambda dtype, device: torch.float32)
        patched.setattr(convolution, "_WIDE_BY_WEIGHTS", 0)
        patched.setattr(convolution, "_WIDE_ELEMENTS", size * x[:, :, :1].numel() * stride[1])
        without = Convolution(weight, bias)
        made = without(x, padding=padding, stride=stride, taps=taps)
        onto = kept.clone()
        assert without(x, padding=padding, stride=stride, taps=taps, onto=onto) is onto
    assert made.dtype == torch.bfloat16 and made.is_contiguous() and made.shape == expected.shape
    nearest = 2**-8  # of a value, its distance to bfloat16 at most
    for found, exact in ((made, expected), (onto, kept.double() + expected)):
        assert ((found - exact).abs() <= nearest * exact.abs() + 1e-4).all()


def test_the_weight_is_the_same_after_any_clips(always_in_pairs: None) -> None:
    weight, bias = torch.randn(8, 8, 3, 3, 3) / 15, torch.randn(8)
    convolution = Convolution(weight.clone(), bias)
    pairs, one_by_one, first = (4, 0), (3, 0), (1, 1)
    for (frames, taps), rows in [
        (first, 5),
        (pairs, 5),
        (first, 7),
        (pairs, 7),
        (one_by_one, 7),
        (first, 4),
        (first, 3),
        (pairs, 3),
        (one_by_one, 3),
    ]:
        x = torch.randn(1, frames, rows, 6, 8)
        made = made_of(convolution, x, padding=(1, 1), taps=taps)
        assert (made - exact(weight[:, :, -taps:], bias, x, (1, 1))).abs().max() <= 1e-5
        assert torch.equal(convolution._weight(), weight)
        # No more than the four of two shapes, and not beside them what they can be put together to.
        assert len(convolution._packed) <= 8
        assert (convolution._given is None) == (reordered(convolution) != {"last"}), "held twice, or not at all"


def test_a_first_chunk_and_later_ones_share_the_last_tap(always_in_pairs: None) -> None:
    convolution = Convolution(torch.randn(8, 8, 3, 3, 3), torch.randn(8))
    convolution(torch.randn(1, 1, 5, 6, 8), padding=(1, 1), taps=1)
    made_of(convolution, torch.randn(1, 4, 5, 6, 8), padding=(1, 1))
    assert sorted(name for name, _ in convolution._packed) == sorted(IN_PAIRS)


@pytest.mark.parametrize(
    ("frames", "given", "stays"),
    [(2, 2, True), (2, 3, False), (4, 4, False)],
    ids=["as they are", "part of more", "the last of more"],
)
@pytest.mark.parametrize("shortcut", [False, True], ids=["", "which a shortcut has"])
def test_frames_of_pairs_are_kept_without_a_copy_if_nothing_else_would_stay(
    frames: int, given: int, stays: bool, shortcut: bool, always_in_pairs: None
) -> None:
    ops = decoder_program(vae_config(WAN22)).ops
    op = next(op for op in ops if isinstance(op, Conv) and op.cached_frames == 2 and not op.adds_shortcut)
    weights = {w.name: torch.randn(w.shape) / 20 for w in op.weights}
    bound = bound_ops.Conv(0, op, weights)
    x = torch.randn(1, given, 4, 3, op.source.channels)[:, -frames:]
    before = torch.randn(1, 2, 4, 3, op.source.channels)
    old, sides = before.clone(), [x] if shortcut else []
    flow = Flow(Frames(x), sides, {op.name: before}, first=False, exchange=None)
    bound.run(flow)
    kept = flow.cache[op.name]
    assert torch.equal(kept, x[:, -2:]) and kept.untyped_storage().nbytes() == kept.nbytes
    assert (kept.data_ptr() == x.data_ptr()) == (stays and not shortcut)
    expected = exact(*weights.values(), torch.cat([old, x], dim=1), (1, 1))
    assert (flow.at.inner - expected).abs().max() <= 1e-5
    flow = Flow(Frames(x), [], flow.cache, first=False, exchange=None, forgets=frozenset({0}))
    bound.run(flow)
    assert not flow.cache
