"""Composing: a list of overrides in, a typed config out. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.errors import STRATEGY_NODES, explain
from cosmos3_pipeline.config.plugins import register
from cosmos3_pipeline.config.provenance import beside_a_running_hydra
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import ConfigError, Problem

VERSION_BASE = "1.3"


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose `overrides` on top of conf/config.yaml: names and types are checked, values are not yet.

    Returns the config, typed by `schema.Config`, with interpolations that resolve on access.
    Raises ConfigError for an unknown key, option or type and for a doubled group choice.
    """
    register()
    try:
        refuse_doubled_choices(overrides)
        with beside_a_running_hydra(), hydra.initialize_config_dir(str(config_dir()), version_base=VERSION_BASE):
            return hydra.compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
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
        return strategy_keys(compose(choices))
    except ConfigError:
        return []


def strategy_keys(cfg: DictConfig) -> list[str]:
    """The dotted keys of the settings that the strategies of `cfg` have."""
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


def group_names() -> list[str]:
    """The config groups: the folders of conf/, as in `vae` and `vae/decode`."""
    root = config_dir()
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_dir())


def refuse_doubled_choices(overrides: Sequence[str]) -> None:
    """Refuse `vae=[a,b]` and `vae=a vae=b`: Hydra would merge the two options, or keep the last, silently."""
    problems: list[Problem] = []
    chosen: dict[str, str] = {}
    groups = group_names()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group = override.key_or_group
        if group not in groups or override.is_hydra_override():
            continue
        value = override.value()
        if isinstance(value, list):
            names = [str(v) for v in value]
            problems.append(
                Problem(
                    what=f"{override.input_line} chooses {len(names)} options of the group {group}",
                    why="a group has one option at a time; two would be merged key by key into neither",
                    works=" or ".join(f"{group}={n}" for n in names)
                    + "; to try each: -m "
                    + f"{group}={','.join(names)}",
                )
            )
        elif group in chosen:
            problems.append(
                Problem(
                    what=f"the group {group} is chosen twice: {chosen[group]} and {override.input_line}",
                    why="a group has one option at a time; the first choice would be dropped",
                    works=f"{chosen[group]} or {override.input_line}",
                )
            )
        chosen[group] = override.input_line or group
    if problems:
        raise ConfigError(problems)
