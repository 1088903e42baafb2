"""Composing: a list of overrides in, what Hydra makes of them out. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cosmos3_pipeline.config.errors import STRATEGY_NODES, explain
from cosmos3_pipeline.config.overrides import check_overrides
from cosmos3_pipeline.config.plain import as_said, plain, without_hydra
from cosmos3_pipeline.config.plugins import register
from cosmos3_pipeline.config.provenance import Provenance, trace_with
from cosmos3_pipeline.config.schema import Config, TaskConfig
from cosmos3_pipeline.config.source import BUILTIN, Source
from cosmos3_pipeline.errors import ConfigError, Problem

VERSION_BASE = "1.3"


class Composition:
    """What Hydra made of `overrides`, before its values are checked; None: it was read from a file.

    cfg: the nodes of the schema, what `+key` has added to them, and mostly Hydra's own node. loader: what composed
    it, where that was this library. source: where the configs are.
    """

    def __init__(
        self,
        cfg: DictConfig,
        overrides: Sequence[str] | None,
        loader: ConfigLoader | None = None,
        source: Source = BUILTIN,
    ) -> None:
        self.cfg = _typed(cfg)
        self.overrides = overrides
        self.loader = loader
        self.source = source

    @classmethod
    def of_a_running_job(cls, cfg: DictConfig) -> Composition:
        """Of the job that Hydra itself composed and runs now: a sweep's, or one with configs of its own."""
        job = HydraConfig.get()
        return cls(cfg, job.overrides.task, source=Source.of_a_running_job(job))

    @classmethod
    def of_file(cls, file: Path) -> Composition:
        """Of a config.yaml that a run has left.

        Raises ValueError for a file that is none, OSError for one that cannot be read.
        """
        try:
            return cls.of_saved(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(str(error).splitlines()[0]) from error

    @classmethod
    def of_saved(cls, saved: Any) -> Composition:
        """Of a config that was composed before: one with types, or its values as read from a file."""
        register()
        cfg = OmegaConf.merge(
            OmegaConf.structured(Config), as_said(plain(saved)) if isinstance(saved, Config) else saved
        )
        if not isinstance(cfg, DictConfig):
            raise ValueError("it holds no keys")
        return cls(cfg, None)

    @property
    def is_sweep(self) -> bool:
        """Whether it asks by `hydra.mode` to be a sweep, which only Hydra can run."""
        return bool(OmegaConf.select(self.cfg, "hydra.mode") == RunMode.MULTIRUN)

    def traced(self) -> Provenance | None:
        """Where its values came from, by walking its defaults once more; None for what was read from a file."""
        if self.overrides is None:
            return None
        with self.source.opened() as loader:
            return trace_with(loader, self.overrides, self.source.name, self.cfg)

    def literal(self, key: str) -> Any:
        """The value that the dotted `key` was given itself; None where it refers to another key."""
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(self.cfg, parent)
        if OmegaConf.is_interpolation(node, name):
            return None
        value = node[name]
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

    def typed(self, changes: Mapping[str, Any] | None = None) -> Config:
        """The config: dataclasses, enums and lists, with every interpolation followed.

        `changes` are dotted keys and other values for them; what refers to such a key follows. The composition
        must have no structural problem (see `checks.problems`). Raises ConfigError for a problem inside a list.
        """
        cfg = self.cfg
        running = HydraConfig.instance().cfg
        if running is None and "hydra" in cfg:  # what `${hydra:runtime.cwd}` and the like refer to
            HydraConfig.instance().cfg = cast(Any, cfg)  # `set_config` would lock it
        try:
            if changes:
                cfg = OmegaConf.create(cfg)  # a copy: what is shown and saved by Hydra is what was composed
                for key, value in changes.items():
                    OmegaConf.update(cfg, key, value)
            sections = {f.name: _object(cfg[f.name]) for f in dataclasses.fields(Config)}
        except OmegaConfBaseException as error:
            raise as_config_error(error, self.overrides or (), self.source) from error
        finally:
            HydraConfig.instance().cfg = running
        config = Config(**sections)
        config.vae.encode, config.vae.decode = plain(config.vae.encode), plain(config.vae.decode)
        return config


def _typed(cfg: DictConfig) -> DictConfig:
    """`cfg` with the schema's types, which a config.yaml that a run has saved does not have.

    Raises OmegaConfBaseException for what is not of its type.
    """
    if "task" not in cfg or OmegaConf.get_type(cfg, "task") is TaskConfig:
        return cfg
    hydra_node = {"hydra": cfg.hydra} if "hydra" in cfg else {}
    typed = OmegaConf.merge(OmegaConf.structured(Config), without_hydra(cfg))
    with open_dict(typed):
        typed.update(hydra_node)
    assert isinstance(typed, DictConfig)
    return typed


def _object(value: Any) -> Any:
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def compose(overrides: Sequence[str] = (), source: Source = BUILTIN) -> Composition:
    """Compose `overrides` on top of a primary config: names and types are checked, values are not yet.

    Raises ConfigError for an unknown key, option or type and for a doubled group choice.
    """
    register()
    try:
        check_overrides(overrides, source.groups())
        _has_groups(overrides, source)
        with source.opened() as loader:
            cfg = hydra.compose(source.name, overrides=list(overrides), return_hydra_config=True)
            return Composition(cfg, overrides, loader, source)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise as_config_error(error, overrides, source) from error


def _has_groups(overrides: Sequence[str], source: Source) -> None:
    """Refuse a choice in a group that `source` does not have: a config that a run has saved is values only."""
    found = [
        Problem(
            what=f"{override} with the configs in {source.main}",
            why=f"they have no options of {group}: a config that a run has saved is values only",
            works="a key of theirs, such as sampler.steps=4; or the run's command line (metrics.json) and this",
        )
        for override in overrides
        if (group := override.partition("=")[0]) in BUILTIN.groups() and group not in source.groups()
    ]
    if found:
        raise ConfigError(found)


def as_config_error(error: Exception, overrides: Sequence[str], source: Source = BUILTIN) -> ConfigError:
    """The ConfigError that explains what Hydra raised while composing `overrides`; raises what is not Hydra's."""
    problem = explain(error, [*schema_keys(), *_chosen_settings(overrides, source)], overrides, source.groups())
    if problem is None:
        raise error
    return ConfigError([problem])


def _chosen_settings(overrides: Sequence[str], source: Source) -> list[str]:
    """The settings of the strategies that `overrides` choose; none where the choices alone cannot be composed."""
    groups = source.groups()
    choices = [override for override in overrides if override.partition("=")[0] in groups]
    if choices == list(overrides):
        return []
    return _settings_with(tuple(choices), source)


@cache
def _settings_with(choices: tuple[str, ...], source: Source) -> list[str]:
    try:
        cfg = compose(choices, source).cfg
    except ConfigError:
        return []
    return [f"{node}.{key}" for node in STRATEGY_NODES for key in OmegaConf.select(cfg, node) if key != "_target_"]


def schema_keys() -> list[str]:
    """All dotted keys of the surface, groups and leaves."""
    return sorted(_keys(OmegaConf.structured(Config), ""))


def _keys(node: DictConfig, prefix: str) -> list[str]:
    found = []
    for key in node:
        dotted = f"{prefix}{key!s}"
        found.append(dotted)
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            found.extend(_keys(node[key], f"{dotted}."))
    return found
