"""NVIDIA Cosmos3 video generation on many devices, from configuration.

    from cosmos3_pipeline import compose, plan, run

    print(plan(["topology=cpu_x2"]))
    made = run(["topology=cpu_x2", "task.prompt='A red circle moves up over a white background.'"])
    made.picture, made.metrics["seconds"]

None of these functions imports torch before a run starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos3_pipeline.config.schema import Config
    from cosmos3_pipeline.jobs.notebook import plan, run

__version__ = "0.1.0"
__all__ = ["compose", "plan", "run"]


def compose(overrides: Sequence[str] = ()) -> Config:
    """Compose `overrides` (as on the command line) on top of the default run, and check the result.

    Returns the config as dataclasses, enums and lists: `compose(["task=i2v"]).sampler.steps`.
    Raises `cosmos3_pipeline.errors.ConfigError` (a ValueError) with every problem found.
    Imports no torch and reads no weight.
    """
    from cosmos3_pipeline.config.shortcut import composition_of
    from cosmos3_pipeline.planning.checks import check_composition

    return check_composition(composition_of(overrides)).config


def __getattr__(name: str) -> Any:
    if name in ("run", "plan"):
        return getattr(import_module("cosmos3_pipeline.jobs.notebook"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
