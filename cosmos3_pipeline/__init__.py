"""NVIDIA Cosmos3 video generation on many devices, from configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosmos3_pipeline.config.schema import Config

__version__ = "0.1.0"
__all__ = ["compose"]


def compose(overrides: Sequence[str] = ()) -> Config:
    """Compose `overrides` (as on the command line) on top of the default run, and check the result.

    Returns the config as dataclasses, enums and lists: `compose(["task=i2v"]).sampler.steps`.
    Raises `cosmos3_pipeline.errors.ConfigError` (a ValueError) that holds every problem found.
    Imports no torch and reads no weight.
    """
    from cosmos3_pipeline.config.compose import compose as compose_unchecked
    from cosmos3_pipeline.plan.checks import check_composition

    return check_composition(compose_unchecked(overrides)).config
