"""Checks, before work starts, the inputs that a run with actions needs beside its picture. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import Problem
from cosmos3_pipeline.planning.actions import EMBODIMENTS, action_of


def check_action_inputs(cfg: Config) -> Iterator[Problem]:
    """Missing inputs that a run needs and a plan does not. Yields nothing for a task without actions."""
    task, action = cfg.task, action_of(cfg.task)
    if action is None:
        return
    named = f"task={task.name.value}"
    if action.domain is None:
        yield Problem(
            what=f"task.domain is not set with {named}",
            why=f"each embodiment has columns and weights of its own: {', '.join(EMBODIMENTS)}",
            works="task.domain=bridge_orig_lerobot",
        )
    elif not action.predicts and task.actions is None:
        yield Problem(
            what=f"task.actions is not set with {named}",
            why="the video shows what given actions lead to",
            works="task.actions=actions.json, with one row of numbers for each action",
        )
    if action.shows and task.image is None and task.video is None:
        yield Problem(
            what=f"task.image is not set with {named}",
            why="the actions begin with what a camera shows",
            works="task.image=photo.jpg, or task.video=clip.mp4",
        )
