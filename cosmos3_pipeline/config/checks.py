"""Checks of a composition that need no arithmetic: keys, missing values, ranges, and classes to be built.

Hydra checks names and types while it composes, but it accepts `+key=value` and checks no ranges. So the tree is
compared with the dataclasses once more. The checks that need geometry are in `planning/`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosmos3_pipeline.config.compose import Composition
from cosmos3_pipeline.config.errors import divides_nothing, unknown_key
from cosmos3_pipeline.config.kinds import kind_of, schema_keys
from cosmos3_pipeline.config.plugins import STRATEGY_NODES, settings_schema, unowned
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import Problem, did_you_mean, nearest
from cosmos3_pipeline.vae.plugins import REFERENCE, Plugins, discover

TARGET = "_target_"


def problems(composition: Composition) -> list[Problem]:
    """Every structural problem of `composition`, in the order of its keys."""
    cfg = composition.cfg
    with composition.hydra_known():
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
        elif wrong := [*_reference(node, str(name), key)]:
            yield from wrong
        elif dataclasses.is_dataclass(hints[str(name)]):
            yield from _walk(node[name], typing.cast(type, hints[str(name)]), f"{key}.")
        else:
            wrong = [*_value(node, str(name), key, fields[str(name)].metadata)]
            yield from wrong
            item = next(iter(typing.get_args(hints[str(name)])), None)
            if dataclasses.is_dataclass(item) and not wrong:
                for place, inner in enumerate(node[name]):
                    yield from _walk(inner, typing.cast(type, item), f"{key}[{place}].")


def _leaves(node: DictConfig, name: str, key: str) -> Iterator[str]:
    """The dotted keys at and below `name` of `node` that hold a value; `key` is the dotted key of `name`."""
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


def _reference(node: DictConfig | ListConfig, name: Any, key: str) -> Iterator[Problem]:
    """A problem if a value, or an item of a list, refers to a key that does not exist or holds another kind."""
    try:
        value = node[name]
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0][:300]
        missing = re.search(r"Interpolation key '([^']+)' not found", why)
        near = nearest(missing.group(1), schema_keys()) if missing else None
        works = f"did you mean ${{{near}}}?" if near else "see --cfg job for what there is to refer to"
        yield Problem(what=f"{key} cannot be resolved", why=why, works=works)
        return
    # OmegaConf compares the kinds of plain values, but not of lists and nodes.
    if OmegaConf.is_interpolation(node, name) and value is not None and (kind := kind_of(key)) is not None:
        is_list, is_dict = (typing.get_origin(kind.hint) is each for each in (list, dict))
        wanted = ListConfig if is_list else DictConfig if is_dict or kind.is_node else object
        if not isinstance(value, wanted):
            works = f"{key}={kind.example}" if kind.example else f"no {key}"
            yield Problem(what=f"{key} refers to {_said(value)}", why=f"it must be {kind}", works=works)
            return
    if isinstance(value, ListConfig):
        for place in range(len(value)):
            if not OmegaConf.is_missing(value, place):
                yield from _reference(value, place, f"{key}[{place}]")


def _value(node: DictConfig, name: str, key: str, limits: typing.Mapping[str, Any]) -> Iterator[Problem]:
    value = node[name]
    if value is None or isinstance(value, Enum):
        return
    if "one_of" in limits:
        if value not in limits["one_of"]:
            yield Problem(
                what=f"{key}={value} does not exist",
                why=f"the values of {key} are: {', '.join(limits['one_of'])}",
                works=did_you_mean(str(value), limits["one_of"], otherwise=f"{key}={limits['one_of'][0]}"),
            )
        return
    if isinstance(value, ListConfig):
        yield from _list(value, key, limits)
    else:
        yield from _range(value, key, limits)


def _list(values: ListConfig, key: str, limits: typing.Mapping[str, Any]) -> Iterator[Problem]:
    fewest, most = limits.get("items", (0, len(values)))
    if not fewest <= len(values) <= most:
        count = str(most) if fewest == most else f"{fewest} to {most}"
        yield Problem(
            what=f"{key}={_said(values)} has {len(values)} value{'s' * (len(values) != 1)}",
            why=f"it must have {count}",
            works=f"{key} with {count} values, such as those that --cfg job shows without this one",
        )
    for place in range(len(values)):
        if OmegaConf.is_missing(values, place):
            yield _missing(f"{key}[{place}]")
        else:
            yield from _range(values[place], f"{key}[{place}]", limits)
            if "matching" in limits:
                yield from _form(values[place], f"{key}[{place}]", *limits["matching"])


def _form(value: Any, key: str, pattern: str, example: str) -> Iterator[Problem]:
    if not re.fullmatch(pattern, str(value)):
        yield Problem(
            what=f"{key}={_said(value)}",
            why=f"it must be like {example}",
            works=f"{key.partition('[')[0]}=[{example}]",
        )


def _range(value: Any, key: str, limits: typing.Mapping[str, Any]) -> Iterator[Problem]:
    if not isinstance(value, int | float):
        return
    low, high, step = limits.get("at_least"), limits.get("at_most"), limits.get("multiple_of")
    bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
    bounds += [f"a multiple of {step}"] * (step is not None)
    if isinstance(value, float) and not math.isfinite(value):
        limit = high if value > 0 else low
        yield Problem(
            what=f"{key}={value} is no finite number",
            why="nothing can be computed with it" + (f"; it must be {' and '.join(bounds)}" if bounds else ""),
            works=_typed(key, 1 if limit is None else limit),
        )
        return
    if (low is None or value >= low) and (high is None or value <= high) and (step is None or value % step == 0):
        return
    yield Problem(
        what=f"{key}={_said(value)} is out of range",
        why=f"it must be {' and '.join(bounds)}",
        works=_typed(key, _nearest(value, low, high, step)),
    )


def _typed(key: str, value: float) -> str:
    """The override to type for `key`. One item of a list cannot be set alone, so its place is told."""
    name, bracket, place = key.partition("[")
    return f"{name} with {value} in the place of [{place}" if bracket else f"{key}={value}"


def _said(value: Any) -> str:
    """`value` as text, cut if it is long."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _nearest(value: float, low: float | None, high: float | None, step: int | None) -> float:
    clipped = max(value, low) if low is not None else value
    clipped = min(clipped, high) if high is not None else clipped
    return clipped if step is None else max(round(clipped / step), 1) * step


def _strategies(cfg: DictConfig, plugins: Plugins) -> Iterator[Problem]:
    """Problems of strategy nodes: no installed plugin owns the `_target_`, or it lacks a setting."""
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
        if cls is plugins.strategies.get(REFERENCE):
            yield divides_nothing(f"vae.{direction}.{TARGET}={target}", direction)
            continue
        known = {f.name: f.default for f in dataclasses.fields(settings_schema(cls))}
        for name in node:
            key = f"vae.{direction}.{name!s}"
            if name not in known:
                yield unknown_key(key, [f"vae.{direction}.{k}" for k in known])
            elif OmegaConf.is_missing(node, name):
                yield _missing(key)
            elif wrong := [*_reference(node, str(name), key)]:
                yield from wrong
            elif (
                OmegaConf.is_interpolation(node, name) or node[name] != known[str(name)]
            ):  # defaults may be infinite
                yield from _value(node, str(name), key, {})


def _targets(node: Any, key: str) -> Iterator[Problem]:
    """Problems of `_target_` in any node but a strategy's. The node `hydra` is Hydra's, so it is left out."""
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
