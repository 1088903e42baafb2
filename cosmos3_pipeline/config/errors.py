"""Turn the errors of Hydra and OmegaConf while composing into problems that a person can act on."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from cosmos3_pipeline.config.kinds import kind_of
from cosmos3_pipeline.config.mistakes import (
    NO_GROUPS,
    USUAL_FPS,
    Groups,
    as_meant,
    beside,
    cannot_take,
    in_a_shell,
    keys_meant,
    parsed,
    written,
)
from cosmos3_pipeline.config.plugins import STRATEGY_NODES
from cosmos3_pipeline.errors import Problem, did_you_mean, nearest
from cosmos3_pipeline.vae.plugins import REFERENCE, discover

# The packages of Hydra's plugins, by the option that each provides.
PACKAGES = {
    **{"joblib": "hydra-joblib-launcher", "ray": "hydra-ray-launcher", "rq": "hydra-rq-launcher"},
    **{"submitit_local": "hydra-submitit-launcher", "submitit_slurm": "hydra-submitit-launcher"},
    **{"optuna": "hydra-optuna-sweeper", "ax": "hydra-ax-sweeper", "nevergrad": "hydra-nevergrad-sweeper"},
}
# The nodes of Hydra whose keys come with a plugin.
PLUGIN_NODES = ("hydra.launcher", "hydra.sweeper")


def unknown_key(key: str, known: Iterable[str], *, where: str = "", groups: Groups = NO_GROUPS) -> Problem:
    """The problem of a dotted key that the schema does not have. `where` names the file or override with the key.

    The problem suggests the key that is meant (`keys_meant`) or all that the override means, and lists the node's
    keys if neither is known. The search for a strategy's setting looks only in the strategy's settings.
    """
    node, _, leaf = key.rpartition(".")
    override = typed_in(where)
    value = override.partition("=")[2] if override.startswith(f"{key}=") else ""
    if node.partition(".")[0] == "extras":
        return Problem(
            what=f"{key} is not there yet{where}",
            why="extras has the keys that you add, and a plus adds one",
            works=in_a_shell(f"+{key}={value or 'VALUE'}"),
        )
    hydras = node.partition(".")[0] == "hydra"
    known = [k for k in (_hydras_keys() if hydras else known) if not key.startswith(f"{k}.")]
    if node in STRATEGY_NODES:
        known = [k for k in known if k.startswith(f"{node}.")]
    if others := settings_of_others(key):
        group = node.replace(".", "/")
        return Problem(
            what=f"unknown key {key}{where}",
            why=f"{leaf} is a setting of {' and '.join(others)}, and {group} is another option",
            works=f"{' or '.join(f'{group}={name}' for name in others)} beside it",
        )
    siblings = beside(node, known)
    listed = f"the keys of {node} are: {', '.join(siblings)}" if siblings and node else "see --cfg job"
    near, meant = keys_meant(key, known), None if hydras else as_meant(override, groups)
    if meant is None or (near and meant == in_a_shell(f"{near[0]}={value}")):
        near = [k for k in near if not value or not cannot_take(k, value)]
    else:
        near = [meant]
    return Problem(
        what=f"unknown key {key}{where}",
        why="nothing reads it, so it would be ignored",
        works=f"did you mean {' or '.join(near)}?" if near else listed,
    )


def typed_in(where: str) -> str:
    """The override that `where` names, as in ` (from task.promt=kite)`; "" if it names a file or nothing."""
    match = re.search(r"\(from \+*([\w./]+=.*)\)$", where, re.DOTALL)
    return match[1] if match else ""


def settings_of_others(key: str) -> list[str]:
    """The options with the setting in `key`, such as `vae.decode.groups` or `hydra.launcher.n_jobs`.

    None for a key of a node that is no strategy, launcher or sweeper.
    """
    node, _, setting = key.rpartition(".")
    if node in STRATEGY_NODES:
        strategies = discover().strategies.items()
        return [name for name, cls in strategies if setting in {f.name for f in fields(typing.cast(Any, cls))}]
    if node not in PLUGIN_NODES:
        return []
    return [option for option, settings in _of_plugins(node) if setting in settings]


def _of_plugins(node: str) -> Iterator[tuple[str, list[str]]]:
    """The installed options of a node of Hydra's plugins, each with its settings."""
    store, group = ConfigStore.instance(), node.replace(".", "/")
    for name in store.list(group):
        if name.endswith(".yaml"):  # else it is a group below this one
            yield name.removesuffix(".yaml"), [*map(str, store.load(f"{group}/{name}").node)]


def _hydras_keys() -> list[str]:
    """The dotted keys of Hydra's own node, and those of the plugins that are installed."""
    own = _keys_below("hydra", OmegaConf.to_container(OmegaConf.structured(HydraConf)))
    others = (f"{node}.{key}" for node in PLUGIN_NODES for _, keys in _of_plugins(node) for key in keys)
    return sorted({*own, *others})


def _keys_below(path: str, value: object) -> Iterator[str]:
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield f"{path}.{name}"
        yield from _keys_below(f"{path}.{name}", inner)


# The Python type of a value that could not be converted, in OmegaConf's messages about it, and in our words.
_TYPE_TOLD = re.compile(r"(?:of type '|\(type |assigned: |\S \((?=\w+\) is not a valid))(\w+)")
_IN_WORDS = {
    **{"bool": "a truth value", "int": "a whole number", "float": "a number with a fraction", "str": "a text"},
    **{"list": "a list", "dict": "a node with keys"},
    **{"ListConfig": "a list", "DictConfig": "a node with keys"},
}
# Hydra could not merge a value and does not say why.
_NOT_MERGED = re.compile(r"Error merging override \+*([\w.]+)=(.*)")


def wrong_kind(key: str, wrong: str, where: str, usual: Usual, cause: str = "") -> Problem:
    """The problem of a value of the wrong kind for `key`. `wrong` tells the value, `cause` is OmegaConf's message.

    A duration in place of a number of frames needs the usual frame rate. For a number that nobody can guess the
    usual one is proposed.
    """
    kind = kind_of(key)
    said = typed_in(where).partition("=")[2]
    rate = (usual(key, "task.fps") or USUAL_FPS) if key == "task.num_frames" else USUAL_FPS
    works = f"a value of the type that --cfg {'hydra' if key.startswith('hydra.') else 'job'} shows for {key}"
    if kind is None:
        return Problem(f"{key} {wrong}{where}", cause or "the key has another type", works)
    typed = said and written(kind, said, key, rate)
    if not typed and kind.hint in (int, float) and (number := usual(key, key)) is not None:
        typed = str(number)
    typed = typed or kind.example
    if "[" in key:
        works = f"{key.partition('[')[0]}=[...] with such values"
    elif typed is not None:
        works = in_a_shell(typed) if typed.startswith(f"{key}=") else f"{key}={typed}"
    elif kind.is_node:
        works = f"a key of it, as in {key}.KEY=VALUE"
    elif typing.get_origin(kind.hint) is dict:
        works = f"a key of your own in it, as in +{key}.KEY=VALUE"
    why, found = f"{key} is {kind}", _type_of(key, where, cause)
    if found is not None and not (found == "a text" and kind.names):  # a wrong name is a text, too
        why = f"that is {found}, and {why}"
    return Problem(f"{key} {wrong}{where}", why, works)


def _type_of(key: str, where: str, cause: str) -> str | None:
    """In words, the type of a value that `where` or `cause` tells."""
    if match := _TYPE_TOLD.search(cause):
        return _IN_WORDS.get(match[1])
    override = parsed(typed_in(where))
    if override is None or override.key_or_group != key or override.is_sweep_override():
        return None
    value = override.value()
    return _IN_WORDS.get("str" if isinstance(value, str) else type(value).__name__)


# (a key with a wrong value, a key) -> the second key's value without the first key's override; None if unknown.
Usual = Callable[[str, str], Any]
# (path of a config such as `task/t2v`, dotted key) -> the file and line for people: `conf/task/t2v.yaml:14`.
Place = Callable[[str, str], str]


def not_yaml(place: str, error: MarkedYAMLError) -> Problem:
    """The problem of a file that cannot be parsed. `place` is its path for people.

    A bracket or a quote without its end is shown where it begins, because the parser only notices it further down.
    """
    begins = error.context_mark if re.search("flow|quoted", error.context or "") else None
    mark = begins or error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    noticed = error.problem_mark
    words = f", noticed in line {noticed.line + 1}" if begins and noticed and noticed.line + 1 != line else ""
    return Problem(
        what=f"{place}:{line}:{column} is not valid YAML",
        why=" ".join(filter(None, [error.context, error.problem])) + words,
        works=f"mending line {line}, column {column} of {place}",
    )


def explain(
    error: Exception,
    keys: Iterable[str],
    overrides: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    place: Place = lambda path, _: f"{path}.yaml",
    usual: Usual = lambda wrong, key: None,
) -> Problem | None:
    """The problem behind an error of Hydra or OmegaConf while composing; None for an error of anything else.

    `keys` are all dotted keys of the schema, and `groups` the options of every group. Both are for "did you mean".
    `usual` composes the command line without one of its overrides.
    """
    if isinstance(error, MissingConfigException):
        return _missing_option(error, groups, overrides, place)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = str(error)
    cause = f"{text}\n{error.__cause__ or ''}"
    full_key = match.group(1) if (match := re.search(r"full_key: (\S+)", cause)) else ""
    where = _where(text, overrides, full_key, place)
    if match := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        group = match.group(1).split("@")[0]
        return Problem(
            what=f"unknown key or group {group}{where}",
            why="no config group and no key has this name",
            works=did_you_mean(group, [*keys, *_groups(keys)], otherwise="see --help for the groups"),
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        if full_key.startswith(f"{key}."):  # the key is in a node, as in task={promt:kite}
            key = full_key
        elif full_key not in key:  # the key is in a node of a list
            key = f"{key}[...].{full_key}"
        return unknown_key(key, keys, where=where, groups=groups)
    if "missing mandatory value" in cause:
        return Problem(
            what=f"{full_key} is not set{where}", why="it has no default", works=f"a value for {full_key}"
        )
    if match := re.search(r"Key '[^']+' not in|Key '[^']+' is not in struct", cause):
        return unknown_key(full_key or match.group(0), keys, where=where, groups=groups)
    if match := re.search(r"(Value .+? (?:of type .+? )?(?:could not be|is not).+|Invalid value .+)", cause):
        return wrong_kind(
            full_key or "a key", "has a value of the wrong type", where, usual, match.group(1).rstrip(".")
        )
    if (match := _NOT_MERGED.search(text)) and (full_key or match.group(1)):
        key, value = match.groups()
        return wrong_kind(
            full_key if full_key.startswith(key) else key, f"is given {value or 'nothing'}", where, usual
        )
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.+)'", text):
        key, value = match.groups()
        return Problem(
            what=f"{key} has a comma in it",
            why="outside -m a comma could mean a list, a sweep or a text",
            works=f"quoted twice, once for the shell: '{key}=\"{value}\"'",
        )
    if match := re.search(r"BasicSweeper does not support sweep type : (\w+?)_SWEEP", text):
        return Problem(
            what=f"{match.group(1).lower()}() in a sweep",
            why="Hydra's own sweeper tries values that are given, and an interval has no last one",
            works="values with commas, range(1,4), or hydra/sweeper=optuna, which draws from intervals",
        )
    if match := re.search(r"Error resolving interpolation '([^']+)', possible interpolation keys: ([^\n]+)", text):
        return Problem(
            what=f"{match.group(1)} as the choice of a group{where}",
            why=f"a choice may refer to those of other groups, which are {match.group(2)}",
            works="the name of an option; see --help",
        )
    if match := re.search(r"Error merging override ~(\S+)", text):
        return Problem(
            what=f"~{match.group(1)} deletes a key",
            why="every key of the schema is read by something",
            works=f"{match.group(1)}=... with another value",
        )
    if isinstance(error, ConfigCompositionException | HydraException):
        first, _, rest = text.partition("\n")
        return Problem(
            what=first + where,
            why=" ".join(rest.split("See https")[0].split()) or "Hydra cannot compose it",
            works="key=value or group=option; see --help",
        )
    return Problem(what=text, why="the value cannot be resolved", works="see --cfg job for what it refers to")


def _missing_option(
    error: MissingConfigException, groups: Mapping[str, Sequence[str]], overrides: Sequence[str], place: Place
) -> Problem:
    name = error.missing_cfg_file or ""
    group, _, option = name.rpartition("/")
    # `model=nvidia/Cosmos3-Nano` names an option with a slash
    asked = [override.lstrip("+").partition("=") for override in overrides]
    group, option = next(((g, o) for g, _, o in asked if f"{g}/{o}" == name), (group, option))
    # Hydra gives no options if another file's defaults list names the missing one.
    options = [o for o in error.options or groups.get(group, ()) if not o.startswith("_")]
    typed = (group, "=", option) in asked
    # Hydra names the primary config even if the choice comes from elsewhere, so its line is looked for.
    match = None if typed else re.search(r"In '(?!hydra/)([^']+)'", str(error))
    where = place(match.group(1), f"defaults.{option}") if match else ""
    named = f"{where} names it; " if ":" in where else ""
    if group == "_strategy":
        return Problem(
            what=f"the strategy plugin {option} is not available",
            why="no installed package declares it, or it failed to import",
            works="installing the package that provides it; `cosmos3 plugins` lists what is found",
        )
    if name in (f"vae/encode/{REFERENCE}", f"vae/decode/{REFERENCE}"):
        return divides_nothing(name.replace(f"/{option}", f"={option}"), group.removeprefix("vae/"))
    if group in ("hydra/launcher", "hydra/sweeper") and option in PACKAGES:
        return Problem(
            what=f"{group}={option} is not installed",
            why=f"the options of {group} are: {', '.join(options)}",
            works=f"pip install {PACKAGES[option]}",
        )
    if not group:
        what, why = f"--config-name {option}", f"no folder of configs has {option}.yaml"
        return Problem(what, why, "the name of a file in a folder that --info searchpath lists, without .yaml")
    near = nearest(option, options)
    meant = as_meant(f"{group}={option}", groups) or (near and f"{group}={near}")
    otherwise = f"one of {', '.join(options)}" if options else "see --help"
    return Problem(
        what=f"{group}={option} does not exist",
        why=f"{named}the options of {group} are: {', '.join(options)}" if options else f"no file provides {name}",
        works=f"did you mean {meant}?" if meant else otherwise,
    )


def divides_nothing(chosen: str, direction: str) -> Problem:
    """The problem of `chosen`, which asks for the reference as the strategy of `direction`."""
    flag = f"vae.parallel_{direction}"
    return Problem(
        what=f"{chosen} is no way to divide the VAE",
        why=f"{flag} decides whether ranks divide the work, and vae/{direction} only how they divide it",
        works=f"{flag}=false, or vae={REFERENCE} for both directions",
    )


def _where(text: str, overrides: Sequence[str], key: str, place: Place) -> str:
    """` (in conf/model/toy.yaml:7)` or ` (from the override x=y)`, as far as Hydra's message tells."""
    if match := re.search(r"In '([^']+)'", text):
        return f" (in {place(match.group(1), key)})"
    if match := re.search(r"Error merging override (.+)", text):
        return f" (from {match.group(1).strip()})"
    if match := re.search(r"Could not override '([^']+)'", text):
        mine = [o for o in overrides if o.lstrip("+~").startswith(match.group(1))]
        return f" (from {mine[0]})" if mine else ""
    return ""


def _groups(keys: Iterable[str]) -> list[str]:
    return sorted({k.split(".")[0] for k in keys})
