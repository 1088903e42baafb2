"""A typed config as plain values, which are saved, compared and shown. Imports no torch.

This module imports nothing from the rest of the library, so a review can use it on another revision.
"""

from __future__ import annotations

import dataclasses
import re
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf


def plain(node: object) -> dict[str, Any]:
    """A config or a section of it as dicts, lists and JSON values. An enum becomes its name, as in YAML."""
    values = _plain(node)
    assert isinstance(values, dict)
    return values


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.name if isinstance(value, Enum) else value


def as_yaml(config: object) -> str:
    """The text of config.yaml. `Composition.of_file` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(as_said(plain(config))))


def as_said(value: Any) -> Any:
    """`value` with `${` escaped in its texts, because composing has interpolated them already.

    OmegaConf reads `\\${` as `${`, and halves the backslashes before it.
    """
    if isinstance(value, dict):
        return {key: as_said(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_said(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The composed config without Hydra's own node."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def flat(config: object) -> dict[str, Any]:
    """Dotted keys and plain values, sorted; lists stay whole. `config` may also be an OmegaConf config."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    return dict(sorted(_leaves(plain(config), "")))


def _leaves(node: Any, key: str) -> list[tuple[str, Any]]:
    if not (isinstance(node, dict) and (node or not key)):
        return [(key, node)]
    return [leaf for name, inner in node.items() for leaf in _leaves(inner, f"{key}.{name}" if key else str(name))]
