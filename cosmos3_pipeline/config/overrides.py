"""Checks of the overrides as typed, before Hydra composes them. The answer to a mistake is what to type.

Most people first type a sentence, the prompt, but Hydra's grammar reads its commas and quotes as syntax.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from cosmos3_pipeline.config.errors import STRATEGY_NODES
from cosmos3_pipeline.config.kinds import kind_of
from cosmos3_pipeline.errors import ConfigError, Problem, nearest

# Characters that a shell changes inside double quotes.
_OF_THE_SHELL = re.compile(r"[$`\\!]")
_SWEEPS = re.compile(r"^(glob|choice|range|interval|shuffle|sort)\(.*\)$")


# The options of every config group, see `Source.groups`.
Groups = Mapping[str, Sequence[str]]


def check_overrides(overrides: Sequence[str], groups: Groups, *, sweep: bool = False) -> None:
    """Refuse words that are no override, and wrong choices of `groups`. `sweep` is whether -m was given.

    Raises ConfigError with every problem found.
    """
    problems: list[Problem] = []
    chosen: dict[str, str] = {}
    for first, words in _together(overrides):
        if words:
            problems.append(_unquoted(first, words))
            continue
        try:
            override = OverridesParser.create().parse_override(first)
        except HydraException:
            problems.append(_no_override(first))
            continue
        problems += [*_sweep_alone(override, sweep), *_group_as_key(override, groups)]
        problems += [*_no_option(override, groups), *_nothing_set(override), *_no_truth(override)]
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


def asks_for_sweep(overrides: Sequence[str]) -> bool:
    """Whether `hydra.mode=MULTIRUN`, which does the same as -m, is among the overrides."""
    return any(override.partition("=")[::2] == ("hydra.mode", "MULTIRUN") for override in overrides)


def as_typed(key: str, value: str) -> str:
    """The argument to type in a shell so that `key` gets the text `value`, whatever characters it has."""
    # Inside Hydra's quotes a backslash is literal unless a quote follows it. An escaped ${ is no reference.
    inner = re.sub(r'(\\*)"', lambda found: 2 * found[1] + '\\"', value.replace("${", "\\${"))
    inner = re.sub(r"\\+$", lambda found: 2 * found[0], inner)
    argument = f'{key}="{inner}"'
    if "'" not in argument:
        return f"'{argument}'"
    if not _OF_THE_SHELL.search(value) and '"' not in value:
        return f'"{key}=\\"{value}\\""'
    return shlex.quote(argument)


def _together(overrides: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each override, with the following words that are no override: a shell has cut them off its value."""
    found: list[tuple[str, list[str]]] = []
    for override in overrides:
        if found and "=" in found[-1][0] and "=" not in override and not override.startswith(("~", "-")):
            found[-1][1].append(override)
        else:
            found.append((override, []))
    return iter(found)


def _unquoted(first: str, words: Sequence[str]) -> Problem:
    key, _, value = first.partition("=")
    sentence = " ".join([value, *words])
    return Problem(
        what=f"{first} {' '.join(words)}",
        why=f"a shell ends a value at a space, so {words[0]!r} stands alone and is no key=value",
        works=as_typed(key, sentence),
    )


def _no_override(text: str) -> Problem:
    key, equals, value = text.partition("=")
    if not equals:
        words = "key=value or group=option"
        colon, _, said = text.partition(":")
        if " " in text.strip():
            words = as_typed("task.prompt", text)
        elif said and re.fullmatch(r"[\w./]+", colon):
            words = f"{colon}={said}"
        return Problem(what=f"{text} is no key=value", why="nothing is set by it", works=words)
    return Problem(
        what=f"the value of {key} cannot be read: {value}",
        why="brackets, quotes, colons and commas have a meaning of their own in a value, unless it is quoted",
        works=as_typed(key, value),
    )


def _sweep_alone(override: Override, sweep: bool) -> Iterator[Problem]:
    """A problem of a comma or a sweep function without -m."""
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
    yield Problem(
        what=f"{key} has a comma in it",
        why="outside -m a comma could mean a list, a sweep or a text",
        works=f"{as_typed(key, value)}, or with -m to try each"
        if " " in value
        else f"-m {shlex.quote(override.input_line)} to try each, or {as_typed(key, value)} for a text",
    )


def _group_as_key(override: Override, groups: Groups) -> Iterator[Problem]:
    """A problem of a group written as a key: `vae.decode=tiled` or `decode=tiled` for `vae/decode=tiled`."""
    key, value = override.key_or_group, override.value()
    if not isinstance(value, str) or key in groups:
        return
    meant = [
        group for group in groups if "/" in group and key in (group.replace("/", "."), group.rpartition("/")[2])
    ]
    meant = [group for group in meant if value in groups[group]] or meant
    if meant and (key in STRATEGY_NODES or "." not in key):
        yield Problem(
            what=f"{override.input_line} sets a whole node",
            why=f"{' and '.join(meant)} is a group of options, which are chosen with a slash",
            works=" or ".join(_choices(group, groups[group], value) for group in meant),
        )


def _no_option(override: Override, groups: Groups) -> Iterator[Problem]:
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
        unset = f", or ~{group} for none" if None in values else ""
        yield Problem(
            what=f"{override.input_line} is no option of the group {group}",
            why="an option is chosen by its name, and its name is never a number, true, false or null",
            works=(" or ".join(f"{group}={option}" for option in near) or f"{group}=NAME, see --info") + unset,
        )


def _nothing_set(override: Override) -> Iterator[Problem]:
    """A problem of `task={}`: Hydra would merge it, and nothing would change."""
    key = override.key_or_group
    if override.value() == {} and (kind := kind_of(key)) is not None and kind.is_node:
        yield Problem(
            what=f"{override.input_line} sets nothing",
            why=f"{key} is {kind}, and its other keys stay as they are, so it would be ignored",
            works=f"a key of it, as in {key}.KEY=VALUE",
        )


def _no_truth(override: Override) -> Iterator[Problem]:
    """A problem of `output.sound=7`: OmegaConf would take it for true."""
    key, value = override.key_or_group, override.value()
    if type(value) is int and value not in (0, 1) and (kind := kind_of(key)) is not None and kind.hint is bool:
        yield Problem(
            what=f"{override.input_line} is neither true nor false",
            why=f"{key} is {kind}",
            works=f"{key}=true or {key}=false",
        )


def _choices(group: str, options: Sequence[str], value: str) -> str:
    """The choice of the option of `group` that is nearest to `value`, or of every option if none is near."""
    near = nearest(value, options)
    return " or ".join(f"{group}={option}" for option in ([near] if near else options))


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
