"""Single compositions as sides of a comparison: a saved config.yaml, or a list of overrides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosmos3_pipeline.config.compose import Composition, compose
from cosmos3_pipeline.config.plain import flat
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.planning.checks import Checked, check_composition
from cosmos3_pipeline.planning.plan import as_dict
from cosmos3_pipeline.review.compare import Side
from cosmos3_pipeline.review.revisions import ReviewError

RUN = "the run"


def side_of_overrides(overrides: Sequence[str]) -> Side:
    """The composition of `overrides` with the installed configs. Raises ReviewError if it is refused."""
    label = " ".join(overrides) or "the default run"
    try:
        composition = compose(overrides)
        checked = check_composition(composition)
    except ConfigError as error:
        raise ReviewError(f"{label} is refused:\n{error}") from error

    def where(wanted: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, tuple[str, str]]]:
        traced = composition.traced()
        assert traced is not None
        chains = {key: traced.chain(key) for _, keys in wanted for key in keys}
        return [{key: (c[-1].winner.source, c[-1].key) for key, c in chains.items() if c}] * len(wanted)

    return Side(label, {RUN: _case(checked, list(overrides))}, where)


def measured(old: Path, new: Path) -> dict[str, tuple[Any, Any]]:
    """The measurements of the runs in two folders, by name: (old, new). Empty if a metrics.json is missing."""
    sides = [_metrics(folder / "metrics.json") for folder in (old, new)]
    return {name: (sides[0].get(name), sides[1][name]) for name in sides[1]} if all(sides) else {}


def _metrics(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        found = {"seconds": report["seconds"], "peak_bytes": report["peak_bytes"]}
        found |= {f"seconds.{name}": stage["seconds"] for name, stage in report["stages"].items()}
        return {**found, "frames_sha256": report["frames_sha256"]}
    except (OSError, ValueError, KeyError):
        return {}


def side_of_file(file: Path) -> Side:
    """The config that a run saved as `file`. Raises ReviewError if it is no such config or is refused."""
    try:
        checked = check_composition(Composition.of_file(file))
    except OSError as error:
        raise ReviewError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ReviewError(f"{file} is not a config that a run saved: {str(error).splitlines()[0]}") from error
    return Side(str(file), {RUN: _case(checked, [])}, _nowhere)


def _nowhere(wanted: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, tuple[str, str]]]:
    """No places, because a saved config does not tell where its values came from."""
    return [{} for _ in wanted]


def _case(checked: Checked, overrides: list[str]) -> dict[str, Any]:
    return {"overrides": overrides, "config": flat(checked.config), "plan": as_dict(checked.plan())["summary"]}
