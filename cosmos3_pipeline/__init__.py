"""NVIDIA Cosmos3 video generation on many devices, from configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

__version__ = "0.1.0"
__all__ = ["compose"]


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose `overrides` (as on the command line) on top of the default run, and check the result.

    Returns the config, typed by `cosmos3_pipeline.config.schema.Config`; interpolations resolve on access.
    Raises `cosmos3_pipeline.errors.ConfigError` (a ValueError) that holds every problem found.
    Imports no torch and reads no weight.
    """
    from cosmos3_pipeline.plan.checks import compose_checked

    return compose_checked(overrides)
