"""PSNR and SSIM against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos3_pipeline.stages.likeness import WINDOW, likeness, ssim


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 24, 31, 3), dtype=np.uint8)


def test_equal_frames(frames: np.ndarray) -> None:
    result = likeness(frames, frames)
    assert result.identical and result.psnr_db is None and result.max_levels == 0
    assert result.ssim == pytest.approx(1.0)


def test_psnr_of_a_known_error(frames: np.ndarray) -> None:
    other = np.where(frames < 128, frames + 3, frames - 3).astype(np.uint8)
    result = likeness(frames, other)
    assert result.psnr_db == pytest.approx(10 * np.log10(255**2 / 9))
    assert result.max_levels == 3 and not result.identical


def test_ssim_is_the_mean_over_windows(frames: np.ndarray) -> None:
    other = np.clip(frames[0].astype(int) + np.random.default_rng(1).integers(-40, 40, frames[0].shape), 0, 255)
    x, y = frames[0].astype(float), other.astype(np.uint8).astype(float)
    values = []
    for row in range(x.shape[0] - WINDOW + 1):
        for col in range(x.shape[1] - WINDOW + 1):
            for channel in range(3):
                a, b = (p[row : row + WINDOW, col : col + WINDOW, channel].ravel() for p in (x, y))
                cov = np.cov(a, b)
                c1, c2 = 2.55**2, 7.65**2
                values.append(
                    (2 * a.mean() * b.mean() + c1)
                    * (2 * cov[0, 1] + c2)
                    / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2))
                )
    assert ssim(frames[0], other.astype(np.uint8)) == pytest.approx(np.mean(values))


def test_clips_of_different_lengths_are_not_compared(frames: np.ndarray) -> None:
    assert likeness(frames, frames[:2]) is None and likeness(frames[:2], frames) is None
