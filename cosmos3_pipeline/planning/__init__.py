"""The plan of a composition: work, memory, messages and time, by arithmetic alone. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos3_pipeline.config.schema import Config

__all__ = ["plan_of"]


def plan_of(cfg: Config) -> dict[str, Any]:
    """The plan of a checked config as plain values, as in plan.json. Reviews of other revisions call it too.

    Raises Refusal if a strategy cannot divide this clip.
    """
    from cosmos3_pipeline.planning.plan import as_dict, make_plan

    return as_dict(make_plan(cfg))
