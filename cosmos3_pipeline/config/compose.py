"""Compose a list of overrides with Hydra. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
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

from cosmos3_pipeline.config.errors import explain, not_yaml
from cosmos3_pipeline.config.kinds import schema_keys
from cosmos3_pipeline.config.overrides import check_overrides
from cosmos3_pipeline.config.plain import as_said, plain, without_hydra
from cosmos3_pipeline.config.plugins import STRATEGY_NODES, register
from cosmos3_pipeline.config.provenance import Provenance, trace_with
from cosmos3_pipeline.config.schema import Config, TaskConfig
from cosmos3_pipeline.config.source import BUILTIN, Source
from cosmos3_pipeline.errors import ConfigError, Problem

VERSION_BASE = "1.3"


class Composition:
    """The config that Hydra composed, before its values are checked.

    cfg: the nodes of the schema, the keys that `+key` added to them, and mostly Hydra's own node.
    overrides: the overrides that were composed; None for a config that was read from a file.
    loader: Hydra's loader, if this library composed the config.
    source: where the configs are.
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
        """The composition of the job that Hydra itself composed and runs: a sweep's, or one with other configs."""
        job = HydraConfig.get()
        return cls(cfg, job.overrides.task, source=Source.of_a_running_job(job))

    @classmethod
    def of_file(cls, file: Path) -> Composition:
        """The composition in a config.yaml that a run has written.

        Raises ValueError for a file that is no such config, and OSError for a file that cannot be read.
        """
        try:
            return cls.of_saved(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(str(error).splitlines()[0]) from error

    @classmethod
    def of_saved(cls, saved: Any) -> Composition:
        """The composition of a saved config: a typed one, or its values as read from a file."""
        register()
        cfg = OmegaConf.merge(
            OmegaConf.structured(Config), as_said(plain(saved)) if isinstance(saved, Config) else saved
        )
        if not isinstance(cfg, DictConfig):
            raise ValueError("it holds no keys")
        return cls(cfg, None)

    @contextmanager
    def hydra_known(self) -> Iterator[None]:
        """Lets references such as `${hydra:runtime.cwd}` be followed within the block."""
        running = HydraConfig.instance().cfg
        if running is None and "hydra" in self.cfg:
            HydraConfig.instance().cfg = cast(Any, self.cfg)  # `set_config` would lock it
        try:
            yield
        finally:
            HydraConfig.instance().cfg = running

    @property
    def is_sweep(self) -> bool:
        """Whether `hydra.mode` asks for a sweep, which only Hydra can run."""
        return bool(OmegaConf.select(self.cfg, "hydra.mode") == RunMode.MULTIRUN)

    def traced(self) -> Provenance | None:
        """The origin of every value, by reading the defaults once more; None for a config read from a file."""
        if self.overrides is None:
            return None
        with self.source.opened() as loader:
            return trace_with(loader, self.overrides, self.source.name, self.cfg)

    def literal(self, key: str) -> Any:
        """The value that was written for the dotted `key`; None if it refers to another key."""
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(self.cfg, parent)
        if OmegaConf.is_interpolation(node, name):
            return None
        value = node[name]
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

    def typed(self, changes: Mapping[str, Any] | None = None) -> Config:
        """The config: dataclasses, enums and lists, with every interpolation followed.

        `changes` maps dotted keys to new values. Values that refer to such a key change with it. The composition
        must have no structural problem (see `checks.problems`). Raises ConfigError for a problem inside a list.
        """
        cfg = self.cfg
        try:
            with self.hydra_known():
                if changes:
                    cfg = OmegaConf.create(cfg)  # a copy, because Hydra shows and saves the original
                    for key, value in changes.items():
                        OmegaConf.update(cfg, key, value)
                sections = {f.name: _object(cfg[f.name]) for f in dataclasses.fields(Config)}
        except OmegaConfBaseException as error:
            raise as_config_error(error, self.overrides or (), self.source) from error
        config = Config(**sections)
        config.vae.encode, config.vae.decode = plain(config.vae.encode), plain(config.vae.decode)
        return config


def _typed(cfg: DictConfig) -> DictConfig:
    """`cfg` with the schema's types. A config.yaml that a run has saved has none.

    Raises OmegaConfBaseException for a value of the wrong type.
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
    """Compose `overrides` on top of a primary config. Names and types are checked, values are not.

    Raises ConfigError for an unknown key or option, a wrong type, or a group that is chosen twice.
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
    """Refuse a choice in a group that `source` lacks: a config that a run has saved has values only."""
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
    """The ConfigError that explains Hydra's `error` while composing. Raises an error that is not Hydra's."""
    if isinstance(error, yaml.YAMLError):
        found = [not_yaml(place, one) for place, one in source.unreadable()]
        if not found:
            raise error
        return ConfigError(found)
    keys = [*schema_keys(), *_chosen_settings(overrides, source)]
    problem = explain(error, keys, overrides, source.groups(), source.place, partial(_usual, overrides, source))
    if problem is None:
        raise error
    return ConfigError([problem])


def _usual(overrides: Sequence[str], source: Source, wrong: str, key: str) -> Any:
    """The value of `key` where no override sets `wrong`; None if it has none, or if a file sets `wrong`."""
    others = [override for override in overrides if override.lstrip("+").partition("=")[0] != wrong]
    if others == list(overrides):
        return None  # composing would fail with the same error
    try:
        return OmegaConf.select(compose(others, source).cfg, key, throw_on_missing=False)
    except (ConfigError, OmegaConfBaseException):
        return None


def _chosen_settings(overrides: Sequence[str], source: Source) -> list[str]:
    """The settings of the strategies that `overrides` choose; none if the choices alone cannot be composed."""
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
