"""The plan of a composition: work, memory, messages and time, by arithmetic alone. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos3_pipeline.config.schema import Config
    from cosmos3_pipeline.planning.checks import Checked

__all__ = ["plan_of", "summary_of"]


def plan_of(cfg: Config) -> dict[str, Any]:
    """The plan of a checked config as plain values, as in plan.json. Reviews of other revisions call it too.

    Raises Refusal if a strategy cannot divide this clip.
    """
    from cosmos3_pipeline.planning.plan import as_dict, make_plan

    return as_dict(make_plan(cfg))


def summary_of(checked: Checked) -> dict[str, Any]:
    """The plan's numbers that a review compares, see `planning.summary`. It uses the VAE's plans of the check."""
    from cosmos3_pipeline.planning.summary import summary

    return summary(checked.plan())
