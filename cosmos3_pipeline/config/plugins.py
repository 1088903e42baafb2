"""Finding strategy plugins by name, and giving Hydra their schemas.

A plugin is an installed package that declares an entry point in the group `cosmos3_pipeline.plugins`; the
object behind it is a `cosmos3_pipeline.vae.strategy.Strategy`: a dataclass of its own settings. Its name
becomes an option of the config groups `vae/encode` and `vae/decode`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import traceback
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from hydra.core.config_store import ConfigStore

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import ConfigError, Problem

ENTRY_POINT_GROUP = "cosmos3_pipeline.plugins"
# Options in this hidden group carry a plugin's schema; the YAML files in conf/vae/{encode,decode} extend them.
SCHEMA_GROUP = "_strategy"


@dataclass(frozen=True)
class Plugins:
    """`strategies` maps a plugin's name to its class, `broken` to why it could not be used."""

    strategies: dict[str, type] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def target(self, name: str) -> str:
        """The `_target_` of the strategy `name`."""
        return _path(self.strategies[name])

    def by_target(self, target: str) -> type | None:
        """The strategy class that owns `_target_: target`, or None."""
        return next((cls for cls in self.strategies.values() if _path(cls) == target), None)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def discover() -> Plugins:
    """Load every declared plugin once. One that fails to import is reported by name and does not stop the rest."""
    plugins = Plugins()
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        problem = _load(point, plugins.strategies)
        if problem is not None:
            plugins.broken[point.name] = problem
    return plugins


def _load(point: EntryPoint, into: dict[str, type]) -> str | None:
    try:
        cls = point.load()
    # A third party's module may raise anything at import; it is reported by name, never swallowed.
    except Exception as error:
        return f"importing {point.value} raised {type(error).__name__}: {error}{_where(error)}"
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        return f"{point.value} is not a dataclass of settings"
    into[point.name] = cls
    return None


def _where(error: Exception) -> str:
    """The line of the plugin, or of what it imports, that raised `error`; nothing if no line of it has run."""
    importing = {__file__, metadata.__file__, importlib.__file__}
    lines = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in importing and not frame.filename.startswith("<")  # frozen parts of Python
    ]
    return f" ({lines[-1].filename}, line {lines[-1].lineno})" if lines else ""


@functools.cache
def register() -> Plugins:
    """Store the schemas of the whole surface and of every plugin in Hydra's ConfigStore."""
    plugins = discover()
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, cls in plugins.strategies.items():
        node = settings_schema(cls)
        store.store(group=SCHEMA_GROUP, name=name, node=node)
        for direction in sorted(cls.directions):  # type: ignore[attr-defined]
            if (config_dir() / "vae" / direction / f"{name}.yaml").is_file():
                continue  # that file extends the schema; a second option of its name would shadow it
            store.store(group=f"vae/{direction}", name=name, node=node)
    return plugins


def build_strategy(node: Mapping[str, Any]) -> Any:
    """The strategy of a config node: its `_target_`, which an installed plugin must own, with its settings.

    Raises ConfigError when no installed plugin owns the target, and what the strategy raises for its settings.
    """
    settings = dict(node)
    target = str(settings.pop("_target_"))
    cls = discover().by_target(target)
    if cls is None:
        raise ConfigError([unowned(target, "a strategy")])
    return cls(**settings)


def unowned(target: str, key: str) -> Problem:
    """Why `key` may not be built from `target`."""
    plugins = discover()
    broken = "; ".join(f"{name} is installed but broken: {why}" for name, why in plugins.broken.items())
    return Problem(
        what=f"{key} is built from {target}",
        why=f"no installed strategy plugin owns it{'; ' + broken if broken else ''}",
        works=" or ".join(f"{name} ({plugins.target(name)})" for name in plugins.strategies),
    )


def settings_schema(cls: type) -> type:
    """The dataclass that Hydra checks a strategy's YAML against: its settings plus `_target_`.

    A Literal becomes str, which is what OmegaConf can hold; the strategy itself checks the choice.
    """
    hints = typing.get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = [("_target_", str, field(default=_path(cls)))]
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if typing.get_origin(hint) is Literal:
            hint = str
        if f.default_factory is not dataclasses.MISSING:
            fields.append((f.name, hint, field(default_factory=f.default_factory)))
        else:
            fields.append((f.name, hint, field(default=f.default)))
    return dataclasses.make_dataclass(f"{cls.__name__}Settings", fields)
