"""Give Hydra the schemas of the installed strategies.

A strategy becomes an option of the config groups `vae/encode` and `vae/decode`, if it can run the direction. The
reference is no option, because the flags `vae.parallel_encode` and `vae.parallel_decode` choose it.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from hydra.core.config_store import ConfigStore

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import ConfigError, Problem
from cosmos3_pipeline.vae.plugins import REFERENCE, Plugins, discover, path_of

# Options in this hidden group carry a plugin's schema; the YAML files in conf/vae/{encode,decode} extend them.
SCHEMA_GROUP = "_strategy"
# The nodes that hold a strategy's settings, which the schema does not list.
STRATEGY_NODES = ("vae.encode", "vae.decode")


@functools.cache
def register() -> Plugins:
    """Store the schema of the whole config and the schema of every plugin in Hydra's ConfigStore."""
    plugins = discover()
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, cls in plugins.strategies.items():
        if name == REFERENCE:
            continue
        node = settings_schema(cls)
        store.store(group=SCHEMA_GROUP, name=name, node=node)
        for direction in sorted(cls.directions):
            if (config_dir() / "vae" / direction / f"{name}.yaml").is_file():
                continue  # this file extends the schema; an option of the same name would shadow it
            store.store(group=f"vae/{direction}", name=name, node=node)
    return plugins


def build_strategy(node: Mapping[str, Any]) -> Any:
    """Build the strategy of a config node from `_target_`, which an installed plugin must own, and its settings.

    Raises ConfigError if no installed plugin owns the target. Errors of the strategy about its settings pass.
    """
    settings = dict(node)
    target = str(settings.pop("_target_"))
    cls = discover().by_target(target)
    if cls is None:
        raise ConfigError([unowned(target, "a strategy")])
    return cls(**settings)


def unowned(target: str, key: str) -> Problem:
    """The problem of a `target` that no installed plugin owns, at `key`."""
    plugins = discover()
    broken = "; ".join(f"{name} is installed but broken: {why}" for name, why in plugins.broken.items())
    return Problem(
        what=f"{key} is built from {target}",
        why=f"no installed strategy plugin owns it{'; ' + broken if broken else ''}",
        works=" or ".join(f"{name} ({plugins.target(name)})" for name in plugins.strategies)
        + f"; or pip install again the package that has {target.partition('.')[0]}, if its entry point is new",
    )


@functools.cache
def settings_schema(cls: type) -> type:
    """The dataclass that Hydra checks a strategy's YAML against: its settings plus `_target_`.

    A Literal becomes str because OmegaConf cannot hold it; the strategy itself checks the choice. The dataclass is
    an attribute of this module (`__getattr__`) because launchers send compositions to other processes.
    """
    hints = typing.get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = [("_target_", str, field(default=path_of(cls)))]
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if typing.get_origin(hint) is Literal:
            hint = str
        if f.default_factory is not dataclasses.MISSING:
            fields.append((f.name, hint, field(default_factory=f.default_factory)))
        else:
            fields.append((f.name, hint, field(default=f.default)))
    name = f"{cls.__module__}_{cls.__name__}Settings".replace(".", "_")
    return dataclasses.make_dataclass(name, fields, namespace={"__module__": __name__})


def __getattr__(name: str) -> type:
    for schema in map(settings_schema, discover().strategies.values()):
        if schema.__name__ == name:
            return schema
    raise AttributeError(f"module {__name__} has no attribute {name}")
