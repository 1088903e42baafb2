"""What an op is taken to cost in the simulation: measured at two heights, or estimated from a data sheet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vae_models import WAN22, vae_config

from cosmos3_pipeline.config.schema import Dtype
from cosmos3_pipeline.plan.hardware import Accelerator
from cosmos3_pipeline.plan.op_costs import EstimatedCosts, MeasuredCosts
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.program import decoder_program

DECODER = decoder_program(vae_config(WAN22))
SHAPE = LatentShape(1, 3, 12, 6)


def samples(*heights: int, fixed: float = 3.0, per_row: float = 0.5) -> list[tuple[str, int, float, float]]:
    """Of ops that take as long as their place in the program tells, and twice that after the first chunk."""
    return [
        (op.name, rows, index + fixed + per_row * rows, 2 * (index + fixed + per_row * rows))
        for rows in heights
        for index, op in enumerate(DECODER.ops)
    ]


@pytest.mark.parametrize("rows", [3, 6, 12, 4.5])
def test_measured_costs_are_on_the_line_through_both_heights(rows: float) -> None:
    costs = MeasuredCosts(DECODER, samples(12, 6))
    assert costs.seconds(0, rows, True) == pytest.approx(3 + 0.5 * rows)
    assert costs.seconds(63, rows, False) == pytest.approx(2 * (63 + 3 + 0.5 * rows))


def test_measured_costs_of_one_height_are_in_proportion() -> None:
    assert MeasuredCosts(DECODER, samples(12)).seconds(0, 6, True) == pytest.approx((3 + 6) / 2)


@given(small=st.floats(0, 10), large=st.floats(0, 10), rows=st.floats(0.1, 100))
def test_measured_costs_are_never_negative(small: float, large: float, rows: float) -> None:
    noisy = [(op.name, height, s, s) for height, s in ((4, small), (8, large)) for op in DECODER.ops]
    costs = MeasuredCosts(DECODER, noisy)
    assert 0 <= costs.seconds(5, rows, True) <= costs.seconds(5, rows + 1, True)
    assert costs.seconds(5, 8, False) == pytest.approx(large)


@pytest.mark.parametrize(
    ("given_samples", "what"),
    [
        (samples(12, 6, 3), "heights of \\[3, 6, 12\\] latent rows"),
        ([], "heights of \\[\\] latent rows"),
        (samples(0, 6), "heights of \\[0, 6\\] latent rows"),
        (samples(12)[:-1], "of 63 ops at 12 latent rows"),
        (samples(12)[::-1], "of 64 ops at 12 latent rows"),
    ],
    ids=["three heights", "none", "no rows", "one op missing", "another order"],
)
def test_other_samples_are_refused(given_samples: list[tuple[str, int, float, float]], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        MeasuredCosts(DECODER, given_samples)


def accelerator(flops_per_s: float, bytes_per_s: float) -> Accelerator:
    return Accelerator("", 0.0, {Dtype.float32: flops_per_s}, bytes_per_s, 0.0, 0.0, 0.0, 0.0, {"vae": 0.5})


def test_estimated_costs_are_the_longer_of_arithmetic_and_traffic() -> None:
    op = DECODER.ops[1]
    computing = EstimatedCosts(DECODER, SHAPE, accelerator(2.0, 1e30), Dtype.float32)
    assert computing.seconds(1, 12, False) == op.flops(SHAPE, first=False)
    assert computing.seconds(1, 3, True) == op.flops(SHAPE, first=True) / 4
    moving = EstimatedCosts(DECODER, SHAPE, accelerator(1e30, 4.0), Dtype.float32)
    elements = op.source.elements(SHAPE, first=False) + op.target.elements(SHAPE, first=False)
    assert moving.seconds(1, 12, False) == elements


def test_a_fixed_share_does_not_shrink_with_the_slab() -> None:
    def seconds(rows: float, fixed_share: float) -> float:
        costs = EstimatedCosts(DECODER, SHAPE, accelerator(1.0, 1.0), Dtype.float32, fixed_share=fixed_share)
        return costs.seconds(1, rows, False)

    assert seconds(12, 0.25) == pytest.approx(seconds(12, 0.0))
    assert seconds(3, 0.25) == pytest.approx((0.25 + 0.75 / 4) * seconds(12, 0.0))


def test_costs_are_scaled_to_a_total() -> None:
    costs = MeasuredCosts(DECODER, samples(12, 6))
    scaled = costs.scaled_to(8.93, SHAPE)
    assert scaled.clip_seconds(SHAPE) == pytest.approx(8.93)
    ratio = scaled.seconds(7, 5, False) / costs.seconds(7, 5, False)
    assert scaled.seconds(40, 2, True) / costs.seconds(40, 2, True) == pytest.approx(ratio)
