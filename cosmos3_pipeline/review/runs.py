"""Single compositions as sides of a comparison: a saved config.yaml, or a list of overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.plugins import register
from cosmos3_pipeline.config.provenance import trace
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.plan import plan_of
from cosmos3_pipeline.plan.checks import check
from cosmos3_pipeline.review.compare import Side
from cosmos3_pipeline.review.revisions import ReviewError
from cosmos3_pipeline.review.worker import flat

RUN = "the run"


def side_of_overrides(overrides: Sequence[str]) -> Side:
    """The composition of `overrides` with the installed configs. Raises ReviewError when it is refused."""
    register()
    label = " ".join(overrides) or "the default run"
    try:
        cfg = compose(overrides)
        check(cfg)
    except ConfigError as error:
        raise ReviewError(f"{label} is refused:\n{error}") from error

    def where(wanted: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, tuple[str, str]]]:
        traced = trace(overrides, config_dir())
        chains = {key: traced.chain(key) for _, keys in wanted for key in keys}
        return [{key: (c[-1].winner.source, c[-1].key) for key, c in chains.items() if c}] * len(wanted)

    return Side(label, {RUN: _case(cfg, list(overrides))}, where)


def side_of_file(file: Path) -> Side:
    """The config that a run saved as `file`. Raises ReviewError when it is none or is refused."""
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        cfg = OmegaConf.merge(OmegaConf.structured(Config), saved)
        assert isinstance(cfg, DictConfig)
        check(cfg)
    except OSError as error:
        raise ReviewError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise ReviewError(f"{file} is not a config that a run saved: {str(error).splitlines()[0]}") from error
    return Side(str(file), {RUN: _case(cfg, [])}, _nowhere)


def _nowhere(wanted: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, tuple[str, str]]]:
    """A saved config holds values only, not where they came from."""
    return [{} for _ in wanted]


def _case(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    return {"overrides": overrides, "config": flat(cfg), "plan": plan_of(cfg)["summary"]}
