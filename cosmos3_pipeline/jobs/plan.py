"""`job=plan`: what a composition will do, without doing it. Imports no torch and reads no weight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from cosmos3_pipeline.checkpoint.hub import local_folder
from cosmos3_pipeline.errors import ConfigError, Refusal
from cosmos3_pipeline.plan import tables
from cosmos3_pipeline.plan.checkpoint import inspect_checkpoint
from cosmos3_pipeline.plan.plan import Plan, as_dict, make_plan
from cosmos3_pipeline.plan.search import Candidate, search
from cosmos3_pipeline.plan.summary import summary, summary_lines
from cosmos3_pipeline.plan.units import quantity
from cosmos3_pipeline.stages.files import write_whole


def plan_job(cfg: DictConfig, output: Path) -> None:
    """Print the plan of a checked config and leave plan.json and plan.md in `output`; or search its layouts."""
    if cfg.plan.search:
        search_job(cfg, output)
        return
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
    """The plan, with the dimensions of the checkpoint where `model.path` is a folder here or in the hub's cache.

    Nothing is downloaded for a plan: a hub id that is not in the cache is planned with the numbers of the model
    option, and a note of the plan says so. Raises ConfigError when the folder holds no Cosmos3 checkpoint.
    """
    model = cfg.model
    if model.path is None:
        return make_plan(cfg)
    folder = local_folder(model.path, model.commit or model.revision)
    if folder is None:
        plan = make_plan(cfg)
        note = f"{model.path} is not in the hub's cache: planned with the dimensions of model={model.name}"
        return replace(plan, notes=(note, *plan.notes))
    try:
        info = inspect_checkpoint(folder)
    except Refusal as refusal:
        raise ConfigError([refusal.problem]) from refusal
    return make_plan(cfg, transformer=info.transformer, vae=info.vae)


def write_plan(plan: dict[str, object], output: Path) -> None:
    """Write plan.json."""
    write_whole(output / "plan.json", json.dumps(plan, indent=2))


def search_job(cfg: DictConfig, output: Path) -> None:
    """Print the layouts of the topology, best first, and leave search.json in `output`."""
    found = search(cfg)
    rows = [
        {
            "overrides": list(candidate.overrides),
            "refused": candidate.refused or None,
            "plan": None if candidate.plan is None else summary(candidate.plan),
        }
        for candidate in found
    ]
    write_whole(output / "search.json", json.dumps({"schema_version": 1, "layouts": rows}, indent=2))
    table = Table(title=f"{len(found)} layouts of the ranks, best first", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("overrides", overflow="fold")
    for column in ("about", "denoise", "decode", "memory per rank", "exactness"):
        table.add_column(column, justify="right")
    for place, candidate in enumerate(found, 1):
        table.add_row(str(place), " ".join(candidate.overrides), *_search_cells(candidate))
    console = Console()
    console.print(table)
    console.print(f"{output / 'search.json'}", soft_wrap=True, highlight=False)


def _search_cells(candidate: Candidate) -> list[str]:
    plan = candidate.plan
    if plan is None:
        return ["", "", "", f"[red]refused: {candidate.refused}[/red]", ""]
    memory = quantity("bytes", plan.peak_bytes)
    return [
        quantity("seconds", candidate.seconds),
        quantity("seconds", plan.seconds["denoise"]),
        quantity("seconds", plan.seconds["decode"]),
        memory if plan.fits else f"[red]{memory}, too much[/red]",
        ", ".join(dict.fromkeys(plan.exactness.values())),
    ]
