"""`job=plan`: what a composition will do, without doing it. Imports no torch and reads no weight."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from cosmos3_pipeline.config.errors import ConfigError, Refusal
from cosmos3_pipeline.models.checkpoint import inspect_checkpoint, is_hub_id
from cosmos3_pipeline.plan import tables
from cosmos3_pipeline.plan.plan import Plan, as_dict, make_plan
from cosmos3_pipeline.plan.summary import summary_lines
from cosmos3_pipeline.stages.files import write_whole


def plan_job(cfg: DictConfig, output: Path) -> None:
    """Print the plan of a checked config and leave plan.json and plan.md in `output`."""
    plan = as_dict(plan_with_checkpoint(cfg))
    write_plan(plan, output)
    write_whole(output / "plan.md", tables.as_markdown(plan))
    console = Console()
    tables.show(plan, console)
    console.print(f"{output / 'plan.json'}", soft_wrap=True, highlight=False)


def head(cfg: DictConfig, output: Path) -> None:
    """Print the plan in a few lines before a run starts, and leave plan.json in `output`."""
    plan = plan_with_checkpoint(cfg)
    write_plan(as_dict(plan), output)
    console = Console()
    for line in summary_lines(plan):
        console.print(line, highlight=False, soft_wrap=True)


def plan_with_checkpoint(cfg: DictConfig) -> Plan:
    """The plan, with the dimensions of the checkpoint where `model.path` is a folder here.

    Raises ConfigError when that folder holds no Cosmos3 checkpoint.
    """
    path = cfg.model.path
    if path is None or is_hub_id(path):
        return make_plan(cfg)
    try:
        info = inspect_checkpoint(path)
    except Refusal as refusal:
        raise ConfigError([refusal.problem]) from refusal
    return make_plan(cfg, transformer=info.transformer, vae=info.vae)


def write_plan(plan: dict[str, object], output: Path) -> None:
    """Write plan.json."""
    write_whole(output / "plan.json", json.dumps(plan, indent=2))
