"""Checks of the overrides as typed, before Hydra composes them. The answer to a mistake is what to type.

Most people first type a sentence, the prompt, but Hydra's grammar reads its commas and quotes as syntax.
"""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.types import Override, ValueType

from cosmos3_pipeline.config.kinds import Kind, kind_of
from cosmos3_pipeline.config.mistakes import (
    ALONE_WHY,
    DASHES,
    SPACE,
    SYNTAX,
    Groups,
    Reading,
    as_typed,
    in_a_shell,
    key_meant,
    parsed,
    read,
)
from cosmos3_pipeline.config.plugins import STRATEGY_NODES
from cosmos3_pipeline.config.tasks import WORDS
from cosmos3_pipeline.errors import ConfigError, Problem

_SWEEPS = re.compile(r"^(glob|choice|range|interval|shuffle|sort)\(.*\)$")
# Sweeps whose values stand in the override as they were typed.
_CHOICES_SWEPT = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP)
# Hydra's own texts, with which a run names its folder: `hydra.run.dir=2026_12_02` would be the folder 20261202.
_HYDRAS_TEXTS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name")
_HYDRAS_FOLDERS = _HYDRAS_TEXTS[:2]
_HYDRAS_TEXT = Kind(str, False, {})
# A quoted text, or what stands between the brackets, commas and colons of a value.
_PIECE = re.compile(r"""'[^']*'|"[^"]*"|[^\[\](){},:'"]+""")


def check_overrides(overrides: Sequence[str], groups: Groups, *, sweep: bool = False) -> None:
    """Refuse words that are no override, and wrong choices of `groups`. `sweep` is whether -m was given.

    Raises ConfigError with every problem found.
    """
    problems: list[Problem] = []
    chosen: dict[str, str] = {}
    for reading in read(overrides, groups, flags={}, sweep=sweep):
        override = parsed(reading.typed[0]) if len(reading.typed) == 1 else None
        if reading.why or override is None:
            problems.append(mistaken(reading if reading.why else replace(reading, why=SYNTAX)))
            continue
        means = None if reading.means == reading.typed else reading.means
        problems += [*_sweep_alone(override, sweep, means), *_group_as_key(override, groups, means)]
        problems += [*_no_option(override, groups, means), *_nothing_set(override), *_no_truth(override)]
        problems += [*_other_text(override), *_no_words(override)]
        if override.key_or_group in groups and not override.is_hydra_override():
            problems += _doubled(override, chosen)
    if problems:
        raise ConfigError(problems)


def check_no_sweep(overrides: Sequence[str]) -> None:
    """Refuse keys that only a sweep reads, because this run is none. Raises ConfigError."""
    found = [
        Problem(
            what=f"{override} without -m",
            why="only a sweep reads it, so it would be ignored",
            works=f"-m {override} with the values to sweep over, or no {override.partition('=')[0].lstrip('+')}",
        )
        for override in overrides
        if override.lstrip("+").startswith("sweep.")
    ]
    if found:
        raise ConfigError(found)


def typed_settings(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides by the dotted keys, or the groups, that they set. A node is set by the keys in it."""
    found = dict[str, str]()
    for override in filter(None, map(parsed, overrides)):
        if not override.is_delete() and override.input_line is not None:
            leaves = _leaves(override.key_or_group, override.value())
            found |= {key: override.input_line.lstrip("+") for key, _ in leaves}
    return found


def _leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    """The dotted keys that `key=value` sets, with their values. A list, or an empty node, is one value."""
    if not isinstance(value, dict) or not value:
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _single(key: str, value: object) -> Iterator[tuple[str, object]]:
    """As `_leaves`, but with each item of a list by itself, as in `model.lora[0].path`."""
    for leaf, inner in _leaves(key, value):
        if not isinstance(inner, list):
            yield leaf, inner
            continue
        for place, item in enumerate(inner):
            yield from _single(f"{leaf}[{place}]", item)


def asks_for_sweep(overrides: Sequence[str]) -> bool:
    """Whether `hydra.mode=MULTIRUN`, which does the same as -m, is among the overrides."""
    return any(override.partition("=")[::2] == ("hydra.mode", "MULTIRUN") for override in overrides)


def mistaken(reading: Reading) -> Problem:
    """The problem of words that Hydra cannot read."""
    first, *words = reading.typed
    works = " ".join(in_a_shell(argument) for argument in reading.means or ())
    why = reading.why
    if words and why == SPACE:
        why = f"{SPACE}, so {words[0]!r} stands alone and is no key=value"
    if not works:
        bare = first.lstrip("-~")
        named = bare.startswith("hydra.") or bare.replace("/", ".") in STRATEGY_NODES
        key = bare if named else key_meant(bare)
        works = f"{key}=VALUE" if key is not None else "key=value or group=option; see --help"
        if reading.means == ():
            works = f"the command without {first}" + (f", or {key}=VALUE" if key is not None else "")
    what = " ".join(reading.typed)
    if why == SYNTAX:
        key, _, value = first.partition("=")
        what = f"the value of {key} cannot be read: {value}"
    elif why == DASHES:
        what = f"{what} begins with a dash"
    elif why == ALONE_WHY:
        what = f"{what} is no key=value"
    return Problem(what=what, why=why, works=works)


def _sweep_alone(override: Override, sweep: bool, means: Sequence[str] | None) -> Iterator[Problem]:
    """A problem of a comma or a sweep function without -m. `means` is how a value with this comma is written."""
    if sweep or not override.is_sweep_override() or override.input_line is None:
        return
    key, _, value = override.input_line.partition("=")
    if _SWEEPS.match(value):
        yield Problem(
            what=override.input_line,
            why="it stands for several values",
            works=f"-m {shlex.quote(override.input_line)}",
        )
        return
    kind = kind_of(key)
    said = " ".join(in_a_shell(argument) for argument in means or ())
    swept = f"-m {shlex.quote(override.input_line)} to try each"
    works = f"{said}, or {swept}" if said and "-m" not in (means or ()) else swept
    if kind is not None and kind.hint is str:
        works = f"{as_typed(key, value)}, or with -m to try each"
    yield Problem(
        what=f"{key} has a comma in it", why="outside -m a comma could mean a list, a sweep or a text", works=works
    )


def _group_as_key(override: Override, groups: Groups, means: Sequence[str] | None) -> Iterator[Problem]:
    """A problem of a group written as a key: `vae.decode=tiled` or `decode=tiled` for `vae/decode=tiled`."""
    key, value = override.key_or_group, override.value()
    if isinstance(value, dict) or key in groups or override.is_delete():
        return
    meant = [
        group for group in groups if "/" in group and key in (group.replace("/", "."), group.rpartition("/")[2])
    ]
    meant = [group for group in meant if value in groups[group]] or meant
    if meant and (key.replace(".", "/") in groups or "." not in key):
        yield Problem(
            what=f"{override.input_line} sets a whole node",
            why=f"{' and '.join(meant)} is a group of options, which are chosen with a slash",
            works=" ".join(means or ()) or " or ".join(_choices(group, groups[group]) for group in meant),
        )


def _no_option(override: Override, groups: Groups, means: Sequence[str] | None) -> Iterator[Problem]:
    """A problem of a number, true, false or null as an option's name, also among several names."""
    group = override.key_or_group
    is_group = group in groups or (override.is_hydra_override() and "/" in group)
    if override.is_delete() or not is_group:
        return
    values: list[object]
    if not override.is_sweep_override():
        values = [override.value()]
    elif override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP:
        values = list(override.sweep_iterator())
    else:
        return  # glob(*) finds existing names, and an interval is refused elsewhere
    if any(value is None or isinstance(value, int | float) for value in values):
        text = (override.input_line or group).partition("=")[2]
        options = groups.get(group, [])
        near = [option for option in options if text in option] or options
        needed = group.replace("/", ".") in STRATEGY_NODES
        unset = f", or ~{group} for none" if None in values and not needed else ""
        yield Problem(
            what=f"{override.input_line} is no option of the group {group}",
            why="an option is chosen by its name, and its name is never a number, true, false or null",
            works=(" ".join(means or ()) or _choices(group, near) or f"{group}=NAME, see --info") + unset,
        )


def _nothing_set(override: Override) -> Iterator[Problem]:
    """A problem of `task={}`, also inside another value: Hydra would merge it, and nothing would change."""
    for key, value in _leaves(override.key_or_group, override.value()):
        kind = kind_of(key)
        if value != {} or kind is None:
            continue
        if kind.is_node or key in STRATEGY_NODES or typing.get_origin(kind.hint) is dict:
            yield Problem(
                what=f"{override.input_line} sets nothing",
                why=f"{key} is {'a node with keys' if kind.hint is Any else kind}; {{}} has none, and those "
                "that are set stay as they are, so it would be ignored",
                works=f"a key of it, as in {key}.KEY=VALUE, or the command without it",
            )


def _other_text(override: Override) -> Iterator[Problem]:
    """A problem of `task.prompt=true`: Hydra reads a truth value or a number, and its text is another, `True`."""
    if override.is_delete() or override.input_line is None:
        return
    typed = override.input_line.partition("=")[2]
    values = [override.value()]
    if override.is_sweep_override():
        values = [*override.sweep_iterator()] if override.value_type in _CHOICES_SWEPT else []
    pieces = {piece.strip() for piece in _PIECE.findall(typed)}
    for key, value in (leaf for each in values for leaf in _single(override.key_or_group, each)):
        if not isinstance(value, int | float) or str(value) in pieces:
            continue
        kind = _HYDRAS_TEXT if key in _HYDRAS_TEXTS else kind_of(key)
        if kind is not None and kind.hint is str and "one_of" not in kind.limits:
            yield Problem(
                what=f"{override.input_line} would set the text {value}",
                why=f"{key} is {kind}, but without quotes Hydra reads a truth value or a number here, and writes "
                "it in its own way",
                works=in_a_shell(f"{override.get_key_element()}={_PIECE.sub(_quoted, typed)}"),
            )
            return


def _no_words(override: Override) -> Iterator[Problem]:
    """A problem of `model.path=`, as an empty variable of a shell leaves it. As a path it would be this folder."""
    if override.is_delete() or override.is_sweep_override():
        return
    for key, value in _single(override.key_or_group, override.value()):
        kind = _HYDRAS_TEXT if key in _HYDRAS_TEXTS else kind_of(key)
        if value != "" or kind is None or kind.hint is not str or key.removeprefix("task.") in WORDS:
            continue
        meant = f"{key}=. for this folder" if key in _HYDRAS_FOLDERS else f"{key}=TEXT"
        yield Problem(
            what=f"{override.input_line} sets an empty text",
            why=f"{key} is {kind}; an empty variable of a shell looks like this",
            works=f"{meant}, or the command without {override.key_or_group}",
        )


def _quoted(piece: re.Match[str]) -> str:
    """`piece` of a value in quotes, if Hydra would read something else than its text."""
    override = parsed(f"text={piece[0].strip()}")
    value = None if override is None else override.value()
    is_other = isinstance(value, int | float) and str(value) != piece[0].strip()
    return f'"{piece[0].strip()}"' if is_other else piece[0]


def _no_truth(override: Override) -> Iterator[Problem]:
    """A problem of `output.sound=7`: OmegaConf would take it for true."""
    key, value = override.key_or_group, override.value()
    if type(value) is int and value not in (0, 1) and (kind := kind_of(key)) is not None and kind.hint is bool:
        yield Problem(
            what=f"{override.input_line} is neither true nor false",
            why=f"{key} is {kind}",
            works=f"{key}=true or {key}=false",
        )


def _choices(group: str, options: Sequence[str]) -> str:
    return " or ".join(f"{group}={option}" for option in options)


def _doubled(override: Override, chosen: dict[str, str]) -> Iterator[Problem]:
    """A problem of `vae=[a,b]` and `vae=a vae=b`: Hydra would silently merge both options, or keep the last."""
    group, value = override.key_or_group, override.value()
    if value == []:
        yield Problem(
            what=f"{override.input_line} chooses no option of the group {group}",
            why="a group has one option at a time",
            works=f"{group}=NAME, or no {group} for the one that is chosen already",
        )
    elif isinstance(value, list):
        names = [str(v) for v in value]
        yield Problem(
            what=f"{override.input_line} chooses {len(names)} options of the group {group}",
            why="a group has one option at a time; two would be merged key by key into neither",
            works=" or ".join(f"{group}={n}" for n in names) + f"; to try each: -m {group}={','.join(names)}",
        )
    elif group in chosen:
        yield Problem(
            what=f"the group {group} is chosen twice: {chosen[group]} and {override.input_line}",
            why="a group has one option at a time; the first choice would be dropped",
            works=f"{chosen[group]} or {override.input_line}",
        )
    chosen[group] = override.input_line or group
