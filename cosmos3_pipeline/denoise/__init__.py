"""Parallel denoising: ranks share guidance passes and the sequence; text is computed once. Imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cosmos3_pipeline.denoise.checks import CfgLayoutError, CpLayoutError, UlyssesLayoutError, check_layout

_TORCH = {"ParallelLoopDenoiser": "denoiser", "ParallelTransformer": "transformer"}
__all__ = [
    "CfgLayoutError",
    "CpLayoutError",
    "ParallelLoopDenoiser",
    "ParallelTransformer",
    "UlyssesLayoutError",
    "check_layout",
]


def __getattr__(name: str) -> Any:
    if name not in _TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_TORCH[name]}"), name)
