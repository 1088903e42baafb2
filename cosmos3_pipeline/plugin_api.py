"""The public API for strategy packages. Names are not removed. Imports no torch.

A strategy returns an `Assignment` of `Block`s for a `Program` and a clip of `LatentShape`; see docs/plugins.md.
`OwnRunner` is for a strategy whose work cannot be described by blocks. The names that its runner needs import
torch when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cosmos3_pipeline.vae.account import account
from cosmos3_pipeline.vae.assignment import EVERY, Assignment, Block, Rect
from cosmos3_pipeline.vae.clock import Link
from cosmos3_pipeline.vae.costs import ChunkCosts, RooflineCosts, op_costs, slab_costs
from cosmos3_pipeline.vae.line_cuts import LineCuts, line_cuts
from cosmos3_pipeline.vae.line_times import LineTimes
from cosmos3_pipeline.vae.lowering import Lowered, lower
from cosmos3_pipeline.vae.measured import op_seconds
from cosmos3_pipeline.vae.ops import LatentShape, Op
from cosmos3_pipeline.vae.plugins import discover
from cosmos3_pipeline.vae.program import Direction, Program
from cosmos3_pipeline.vae.rates import Rates
from cosmos3_pipeline.vae.search import Found, search
from cosmos3_pipeline.vae.strategy import (
    Exactness,
    OwnRunner,
    RankShare,
    Runner,
    Strategy,
    StrategyError,
    StrategyPlan,
)

if TYPE_CHECKING:
    from cosmos3_pipeline.distributed.comm import Comm, Pending
    from cosmos3_pipeline.vae.bound_ops import Flow
    from cosmos3_pipeline.vae.execute import Execution
    from cosmos3_pipeline.vae.frames import Frames
    from cosmos3_pipeline.vae.inputs import latent_shape
    from cosmos3_pipeline.vae.pixels import Pixels, as_pixels, latent_chunk, picture_chunk
    from cosmos3_pipeline.vae.weights import BoundVae

# Names for runners, from modules that import torch.
_RUNNING = {
    "BoundVae": "vae.weights",
    "Comm": "distributed.comm",
    "Execution": "vae.execute",
    "Flow": "vae.bound_ops",
    "Frames": "vae.frames",
    "Pending": "distributed.comm",
    "Pixels": "vae.pixels",
    "as_pixels": "vae.pixels",
    "latent_chunk": "vae.pixels",
    "latent_shape": "vae.inputs",
    "picture_chunk": "vae.pixels",
}

__all__ = [
    "EVERY",
    "Assignment",
    "Block",
    "BoundVae",
    "ChunkCosts",
    "Comm",
    "Direction",
    "Exactness",
    "Execution",
    "Flow",
    "Found",
    "Frames",
    "LatentShape",
    "LineCuts",
    "LineTimes",
    "Link",
    "Lowered",
    "Op",
    "OwnRunner",
    "Pending",
    "Pixels",
    "Program",
    "RankShare",
    "Rates",
    "Rect",
    "RooflineCosts",
    "Runner",
    "Strategy",
    "StrategyError",
    "StrategyPlan",
    "account",
    "as_pixels",
    "discover",
    "latent_chunk",
    "latent_shape",
    "line_cuts",
    "lower",
    "op_costs",
    "op_seconds",
    "picture_chunk",
    "search",
    "slab_costs",
]


def __getattr__(name: str) -> Any:
    if name not in _RUNNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"cosmos3_pipeline.{_RUNNING[name]}"), name)
