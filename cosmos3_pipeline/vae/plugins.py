"""The installed strategies, by name. Imports no torch.

A plugin is an installed package that declares an entry point in the group `cosmos3_pipeline.plugins`. The entry
point names a `Strategy`, which is a dataclass of its settings.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import traceback
from dataclasses import dataclass, field
from importlib import metadata
from importlib.metadata import EntryPoint, entry_points

from cosmos3_pipeline.vae.strategy import Strategy

ENTRY_POINT_GROUP = "cosmos3_pipeline.plugins"
# The strategy of a direction whose flag is off. The flag chooses it, so it is no option of the config groups.
REFERENCE = "replicated"


@dataclass(frozen=True)
class Plugins:
    """`strategies` maps a plugin's name to its class; `broken` maps it to the reason why it cannot be used."""

    strategies: dict[str, type[Strategy]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def target(self, name: str) -> str:
        """The `_target_` of the strategy `name`."""
        return path_of(self.strategies[name])

    def by_target(self, target: str) -> type[Strategy] | None:
        """The strategy class whose path is `target`, or None."""
        return next((cls for cls in self.strategies.values() if path_of(cls) == target), None)


def path_of(cls: type) -> str:
    """The dotted import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def discover() -> Plugins:
    """Load every declared plugin once. A plugin that fails to import is listed in `broken`."""
    plugins = Plugins()
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        problem = _load(point, plugins.strategies)
        if problem is not None:
            plugins.broken[point.name] = problem
    return plugins


def _load(point: EntryPoint, into: dict[str, type[Strategy]]) -> str | None:
    try:
        cls = point.load()
    # A third party's module may raise any exception at import. It is reported under the plugin's name.
    except Exception as error:
        return f"importing {point.value} raised {type(error).__name__}: {error}{_where(error)}"
    if not (isinstance(cls, type) and issubclass(cls, Strategy) and dataclasses.is_dataclass(cls)):
        return f"{point.value} is not a Strategy that is a dataclass of its settings"
    into[point.name] = cls
    return None


def _where(error: Exception) -> str:
    """The line of the plugin, or of its imports, that raised `error`; empty if none of its lines has run."""
    importing = {__file__, metadata.__file__, importlib.__file__}
    lines = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in importing and not frame.filename.startswith("<")  # frozen parts of Python
    ]
    return f" ({lines[-1].filename}, line {lines[-1].lineno})" if lines else ""
