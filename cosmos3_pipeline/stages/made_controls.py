"""Control pictures that OpenCV makes from the frames of a clip: edges and blur. Imports no torch.

Source of every number: vllm-omni `vllm_omni/diffusion/models/cosmos3/transfer.py` (EDGE_PRESETS, BLUR_PRESETS,
BILATERAL_*), ported there from the augmentors that NVIDIA trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cosmos3_pipeline.config.schema import TaskConfig
from cosmos3_pipeline.errors import Problem, Refusal

# Canny's two thresholds: a gradient below the first is no edge, a gradient above the second is an edge. Higher
# thresholds leave fewer edges.
EDGE_THRESHOLDS = {
    "very_low": (20, 50),
    "low": (50, 100),
    "medium": (100, 200),
    "high": (200, 300),
    "very_high": (300, 400),
}


class Blur(NamedTuple):
    """How many times smaller a frame is made: `filtered` before the filter, `shrunk` after it."""

    filtered: int
    shrunk: int


BLUR_STRENGTHS = {
    "very_low": Blur(filtered=1, shrunk=4),
    "low": Blur(filtered=4, shrunk=4),
    "medium": Blur(filtered=2, shrunk=10),
    "high": Blur(filtered=1, shrunk=16),
    "very_high": Blur(filtered=4, shrunk=16),
}
# The bilateral filter for a picture whose longer side has REFERENCE_SIDE pixels. It is scaled for other sizes.
REFERENCE_SIDE = 720
DIAMETER, SIGMA_COLOUR, SIGMA_SPACE = 30, 150, 100

Frame = NDArray[np.uint8]


def missing_opencv(key: str) -> Problem | None:
    """The reason why the control `key` cannot be made from a clip, or None if it can."""
    if find_spec("cv2") is not None:
        return None
    return Problem(
        what=f"{key}=from_video without OpenCV",
        why="OpenCV makes edges and blur of a clip, and it is not installed with the rest",
        works=f"pip install 'cosmos3-pipeline[transfer]', or a clip of your own: {key}=FILE",
    )


def maker(name: str, task: TaskConfig) -> Callable[[Image.Image], Image.Image]:
    """The function that makes the control `name`, edge or blur, from a frame.

    Raises:
        Refusal: OpenCV is not installed.
    """
    if problem := missing_opencv(f"task.controls.{name}"):
        raise Refusal(problem.what, problem.why, problem.works)
    import cv2

    if name == "edge":
        assert task.edge_threshold is not None
        thresholds = EDGE_THRESHOLDS[task.edge_threshold]
        return lambda picture: Image.fromarray(_edges(cv2, np.asarray(picture), thresholds))
    assert task.blur_strength is not None
    strength = BLUR_STRENGTHS[task.blur_strength]
    return lambda picture: Image.fromarray(_blurred(cv2, np.asarray(picture), strength))


def _edges(cv2: Any, frame: Frame, thresholds: tuple[int, int]) -> Frame:
    """White edges on black, uint8 [H, W, 3]."""
    edges: Frame = cv2.Canny(frame, *thresholds)
    return np.repeat(edges[..., None], 3, axis=2)


def _blurred(cv2: Any, frame: Frame, strength: Blur) -> Frame:
    """`frame` [H, W, 3] without its texture: filtered within its edges, shrunk and enlarged."""
    height, width = frame.shape[:2]

    def smaller(times: int) -> tuple[int, int]:
        return max(width // times, 1), max(height // times, 1)

    if strength.filtered > 1:
        frame = cv2.resize(frame, smaller(strength.filtered), interpolation=cv2.INTER_AREA)
    scale = max(frame.shape[:2]) / REFERENCE_SIDE
    diameter = max(round(DIAMETER * scale), 1)
    frame = cv2.bilateralFilter(
        frame, diameter + 1 - diameter % 2, max(SIGMA_COLOUR * scale, 1.0), max(SIGMA_SPACE * scale, 1.0)
    )
    if strength.filtered > 1:
        frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
    frame = cv2.resize(frame, smaller(strength.shrunk), interpolation=cv2.INTER_CUBIC)
    blurred: Frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC)
    return blurred
