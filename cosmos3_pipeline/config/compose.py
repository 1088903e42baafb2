"""Composing: a list of overrides in, what Hydra makes of them out. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.errors import STRATEGY_NODES, explain
from cosmos3_pipeline.config.overrides import check_overrides, group_names
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.plugins import register
from cosmos3_pipeline.config.provenance import Provenance, beside_a_running_hydra, trace
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import ConfigError

VERSION_BASE = "1.3"
CONFIG_NAME = "config"
JOB_NAME = "launch"


class Composition:
    """What Hydra made of `overrides`, before its values are checked; None: it was read from a file.

    cfg: the nodes of the schema, what `+key` has added to them, and mostly Hydra's own node. loader: what composed
    it, where that was this library.
    """

    def __init__(
        self, cfg: DictConfig, overrides: Sequence[str] | None, loader: ConfigLoader | None = None
    ) -> None:
        self.cfg = cfg
        self.overrides = overrides
        self.loader = loader

    @classmethod
    def of_a_running_job(cls, cfg: DictConfig) -> Composition:
        """Of the job that Hydra itself composed and runs now: a sweep's, or one with configs of its own."""
        return cls(cfg, HydraConfig.get().overrides.task)

    @classmethod
    def of_file(cls, file: Path) -> Composition:
        """Of a config.yaml that a run has left.

        Raises ValueError for a file that is none, OSError for one that cannot be read.
        """
        register()
        try:
            saved = yaml.safe_load(file.read_text(encoding="utf-8"))
            cfg = OmegaConf.merge(OmegaConf.structured(Config), saved)
            if not isinstance(cfg, DictConfig):
                raise ValueError("it holds no keys")
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(str(error).splitlines()[0]) from error
        return cls(cfg, None)

    @property
    def is_sweep(self) -> bool:
        """Whether it asks by `hydra.mode` to be a sweep, which only Hydra can run."""
        return bool(OmegaConf.select(self.cfg, "hydra.mode") == RunMode.MULTIRUN)

    def traced(self) -> Provenance | None:
        """Where its values came from, by composing once more; None where conf/ alone does not make it."""
        try:
            return None if self.overrides is None else trace(self.overrides, config_dir())
        except (HydraException, OmegaConfBaseException):  # a folder of --config-dir has a part of it
            return None

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
            raise as_config_error(error, self.overrides or ()) from error
        finally:
            HydraConfig.instance().cfg = running
        config = Config(**sections)
        config.vae.encode, config.vae.decode = plain(config.vae.encode), plain(config.vae.decode)
        return config


def _object(value: Any) -> Any:
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def compose(overrides: Sequence[str] = ()) -> Composition:
    """Compose `overrides` on top of conf/config.yaml: names and types are checked, values are not yet.

    Raises ConfigError for an unknown key, option or type and for a doubled group choice.
    """
    register()
    conf = str(config_dir())
    try:
        check_overrides(overrides)
        with beside_a_running_hydra(), hydra.initialize_config_dir(conf, JOB_NAME, VERSION_BASE):
            cfg = hydra.compose(CONFIG_NAME, overrides=list(overrides), return_hydra_config=True)
            return Composition(cfg, overrides, GlobalHydra.instance().config_loader())
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise as_config_error(error, overrides) from error


def as_config_error(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """The ConfigError that explains what Hydra raised while composing `overrides`; raises what is not Hydra's."""
    problem = explain(error, [*schema_keys(), *_chosen_settings(overrides)], overrides)
    if problem is None:
        raise error
    return ConfigError([problem])


def _chosen_settings(overrides: Sequence[str]) -> list[str]:
    """The settings of the strategies that `overrides` choose; none where the choices alone cannot be composed."""
    groups = group_names()
    choices = [override for override in overrides if override.partition("=")[0] in groups]
    if choices == list(overrides):
        return []
    try:
        cfg = compose(choices).cfg
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
