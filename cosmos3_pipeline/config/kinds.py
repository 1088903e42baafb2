"""The kind of value that each key of the schema takes, in words for the message that refuses another kind."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any

from cosmos3_pipeline.config.plugins import settings_schema
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.vae.plugins import discover


@dataclasses.dataclass(frozen=True)
class Kind:
    """The type of a key, whether it may be null, and the limits that the schema gives it."""

    hint: Any
    optional: bool
    limits: Mapping[str, Any]

    def __str__(self) -> str:
        """Such as `a whole number from 1 to 64, or null`."""
        return _words(self.hint, self.limits) + (", or null" if self.optional else "")

    @property
    def example(self) -> str | None:
        """A value that may be typed for the key; None if it depends on the rest of the composition."""
        return _example(self.hint, self.limits)

    @property
    def is_node(self) -> bool:
        """Whether the value is a node with keys."""
        return dataclasses.is_dataclass(self.hint)

    @property
    def names(self) -> Sequence[str]:
        """The names that the key takes; none if it takes other values."""
        if isinstance(self.hint, type) and issubclass(self.hint, Enum):
            return list(self.hint.__members__)
        found: Sequence[str] = self.limits.get("one_of", ())
        return found


@cache
def schema_keys() -> list[str]:
    """All dotted keys of the schema, nodes and leaves."""
    return sorted(_keys(Config, ""))


def _keys(node: Any, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(node)
    for field in dataclasses.fields(node):
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")


def kind_of(key: str) -> Kind | None:
    """The kind of a dotted key, such as `task.fps` or `model.lora[0].weight`; None if there is no such key."""
    kind = Kind(Config, False, {})
    for part in re.findall(r"[^.\[\]]+", key):
        inner = _inner(kind, part)
        if inner is None:
            return _of_a_strategy(key)
        kind = inner
    return kind


def _inner(kind: Kind, part: str) -> Kind | None:
    if part.isdecimal() and typing.get_origin(kind.hint) is list:
        hint, optional = _without_null(typing.get_args(kind.hint)[0])
        return Kind(hint, optional, kind.limits)
    if not dataclasses.is_dataclass(kind.hint):
        return None
    hints = typing.get_type_hints(kind.hint)
    for field in dataclasses.fields(kind.hint):
        if field.name == part:
            return Kind(*_without_null(hints[part]), field.metadata)
    return None


def _of_a_strategy(key: str) -> Kind | None:
    node, _, setting = key.rpartition(".")
    if node not in ("vae.encode", "vae.decode"):
        return None
    found = (_inner(Kind(settings_schema(cls), False, {}), setting) for cls in discover().strategies.values())
    return next(filter(None, found), None)


def _without_null(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    others = [one for one in typing.get_args(hint) if one is not type(None)]
    return (others[0] if len(others) == 1 else Any), len(others) < len(typing.get_args(hint))


def _words(hint: Any, limits: Mapping[str, Any]) -> str:
    if "one_of" in limits:
        return f"one of {', '.join(limits['one_of'])}"
    if dataclasses.is_dataclass(hint):
        return f"a node with the keys {', '.join(field.name for field in dataclasses.fields(hint))}"
    if typing.get_origin(hint) is list:
        return f"a list, of which each value is {_words(typing.get_args(hint)[0], limits)}"
    if typing.get_origin(hint) is dict:
        return "a node with keys of your own"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(one.name for one in hint)}"
    low, high, step = limits.get("at_least"), limits.get("at_most"), limits.get("multiple_of")
    ends = f" from {low} to {high}" if low is not None and high is not None else ""
    ends = f" of at least {low}" if low is not None and high is None else ends
    ends += f" that {step} divides" if step is not None else ""
    names = {bool: "true or false", int: f"a whole number{ends}", float: f"a number{ends}", str: "a text"}
    return names.get(hint, "a value")


def _example(hint: Any, limits: Mapping[str, Any]) -> str | None:
    if "one_of" in limits:
        return str(limits["one_of"][0])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next(iter(hint)).name
    if hint is bool:
        return "true"
    if hint in (int, float):
        low = limits.get("at_least", 1)
        step = limits.get("multiple_of", 1)
        return str(max(low, step) if hint is int else float(max(low, min(1, limits.get("at_most", 1)))))
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        if dataclasses.is_dataclass(item):
            first = dataclasses.fields(item)[0]
            return f"[{{{first.name}:{_example(typing.get_type_hints(item)[first.name], first.metadata)}}}]"
        inner = _example(item, limits)
        return None if inner is None else f"[{inner}]"
    return "TEXT" if hint is str else None
