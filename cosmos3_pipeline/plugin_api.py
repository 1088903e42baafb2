"""All that a strategy package imports from this library; what is here stays. Imports no torch.

A strategy returns an `Assignment` of `Block`s for a `Program` and a clip of `LatentShape`; docs/plugins.md teaches
it. `OwnRunner` is for one whose work no blocks describe.
"""

from __future__ import annotations

from cosmos3_pipeline.vae.assignment import EVERY, Assignment, Block, Rect
from cosmos3_pipeline.vae.clock import Link
from cosmos3_pipeline.vae.costs import ChunkCosts, RooflineCosts, op_costs
from cosmos3_pipeline.vae.line_times import LineTimes
from cosmos3_pipeline.vae.measured import op_seconds
from cosmos3_pipeline.vae.ops import LatentShape, Op
from cosmos3_pipeline.vae.plugins import discover
from cosmos3_pipeline.vae.program import Direction, Program
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

__all__ = [
    "EVERY",
    "Assignment",
    "Block",
    "ChunkCosts",
    "Direction",
    "Exactness",
    "Found",
    "LatentShape",
    "LineTimes",
    "Link",
    "Op",
    "OwnRunner",
    "Program",
    "RankShare",
    "Rect",
    "RooflineCosts",
    "Runner",
    "Strategy",
    "StrategyError",
    "StrategyPlan",
    "discover",
    "op_costs",
    "op_seconds",
    "search",
]
