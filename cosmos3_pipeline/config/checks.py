"""Checks of a composition that need no arithmetic: keys, missing values, ranges, what names code to run.

Hydra checks names and types while it composes, but `+key=value` slips past a schema and ranges are not
checked at all, so the tree is walked against the dataclasses once more. What needs geometry is in `planning/`.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosmos3_pipeline.config.compose import Composition, schema_keys
from cosmos3_pipeline.config.errors import STRATEGY_NODES, unknown_key
from cosmos3_pipeline.config.plugins import settings_schema, unowned
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import Problem, did_you_mean, nearest
from cosmos3_pipeline.vae.plugins import Plugins, discover

TARGET = "_target_"


def problems(composition: Composition) -> list[Problem]:
    """Every structural problem of `composition`, in the order of its keys."""
    cfg = composition.cfg
    return [*_walk(cfg, Config, ""), *_strategies(cfg, discover()), *_targets(cfg, "")]


def _walk(node: DictConfig, schema: type, prefix: str) -> Iterator[Problem]:
    fields = {f.name: f for f in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    for name in node:
        key = f"{prefix}{name!s}"
        if name not in fields:
            if not prefix and name == "hydra":
                continue
            leaves = [leaf for leaf in _leaves(node, str(name), key) if not leaf.endswith(f".{TARGET}")]
            yield from (unknown_key(leaf, schema_keys()) for leaf in leaves)
            continue
        if OmegaConf.is_missing(node, name):
            yield _missing(key)
        elif dataclasses.is_dataclass(hints[str(name)]):
            yield from _walk(node[name], typing.cast(type, hints[str(name)]), f"{key}.")
        else:
            yield from _value(node, str(name), key, fields[str(name)].metadata)


def _leaves(node: DictConfig, name: str, key: str) -> Iterator[str]:
    """The dotted keys at and below `name` of `node` that hold a value; `key` is that of `name` itself."""
    inner = None if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name) else node[name]
    if not isinstance(inner, DictConfig) or not inner:
        yield key
        return
    for other in inner:
        yield from _leaves(inner, str(other), f"{key}.{other!s}")


def _missing(key: str) -> Problem:
    examples = {"task.image": "task.image=photo.jpg", "task.video": "task.video=clip.mp4"}
    return Problem(
        what=f"{key} is not set",
        why="this option cannot run without it",
        works=examples.get(key, f"{key}=..."),
    )


def _value(node: DictConfig, name: str, key: str, limits: typing.Mapping[str, Any]) -> Iterator[Problem]:
    try:
        value = node[name]
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        missing = re.search(r"Interpolation key '([^']+)' not found", why)
        near = nearest(missing.group(1), schema_keys()) if missing else None
        works = f"did you mean ${{{near}}}?" if near else "see --cfg job for what there is to refer to"
        yield Problem(what=f"{key} cannot be resolved", why=why, works=works)
        return
    if value is None or not limits:
        return
    if "one_of" in limits:
        if value not in limits["one_of"]:
            yield Problem(
                what=f"{key}={value} does not exist",
                why=f"the values of {key} are: {', '.join(limits['one_of'])}",
                works=did_you_mean(str(value), limits["one_of"], otherwise=f"{key}={limits['one_of'][0]}"),
            )
        return
    if "length" in limits:
        length, least = limits["length"], limits["at_least"]
        if len(value) != length or any(one < least for one in value):
            yield Problem(
                what=f"{key}=[{','.join(map(str, value))}] is out of range",
                why=f"it must be {length} numbers, each at least {least}",
                works=f"{key}=[{','.join([str(least)] * length)}]",
            )
        return
    low, high, step = limits.get("at_least"), limits.get("at_most"), limits.get("multiple_of")
    if (low is None or value >= low) and (high is None or value <= high) and (step is None or value % step == 0):
        return
    bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
    bounds += [f"a multiple of {step}"] * (step is not None)
    yield Problem(
        what=f"{key}={value} is out of range",
        why=f"it must be {' and '.join(bounds)}",
        works=f"{key}={_nearest(value, low, high, step)}",
    )


def _nearest(value: float, low: float | None, high: float | None, step: int | None) -> float:
    clipped = max(value, low) if low is not None else value
    clipped = min(clipped, high) if high is not None else clipped
    return clipped if step is None else max(round(clipped / step), 1) * step


def _strategies(cfg: DictConfig, plugins: Plugins) -> Iterator[Problem]:
    """A strategy node may be built only from a target that an installed plugin owns, with its own settings."""
    for direction in ("encode", "decode"):
        if OmegaConf.is_missing(cfg.vae, direction):
            yield _missing(f"vae.{direction}")
            continue
        node = cfg.vae[direction]
        target = str(OmegaConf.select(node, TARGET)) if OmegaConf.is_dict(node) else str(node)
        cls = plugins.by_target(target)
        if cls is None:
            yield unowned(target, f"vae.{direction}")
            continue
        known = {f.name for f in dataclasses.fields(settings_schema(cls))}
        for name in node:
            key = f"vae.{direction}.{name!s}"
            if name not in known:
                yield unknown_key(key, [f"vae.{direction}.{k}" for k in known])
            elif OmegaConf.is_missing(node, name):
                yield _missing(key)
            else:
                yield from _value(node, str(name), key, {})


def _targets(node: Any, key: str) -> Iterator[Problem]:
    """No node but a strategy's own may name a class. The node `hydra` is Hydra's own."""
    if isinstance(node, DictConfig):
        names: list[Any] = [name for name in node if key or name != "hydra"]
    elif isinstance(node, ListConfig):
        names = list(range(len(node)))
    else:
        return
    for name in names:
        inner = f"{key}.{name!s}" if key else str(name)
        if name == TARGET and key not in STRATEGY_NODES:
            yield Problem(
                what=f"{inner}={OmegaConf.to_container(node)[name]} names code to run",  # type: ignore[index]
                why="only a strategy of the VAE is built from a class that a composition names",
                works=f"no {inner}; {' and '.join(f'{node}.{TARGET}' for node in STRATEGY_NODES)} name strategies",
            )
        elif not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            yield from _targets(node[name], inner)
