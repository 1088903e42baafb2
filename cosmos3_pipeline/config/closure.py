"""The files that a composition can be made of, read from the defaults lists alone.

Composing with Hydra takes 0.2 s, and reading the lists takes almost no time. So a review composes only the
cases that a change can touch. A file that may not be needed is included. This module imports nothing from the rest
of the library, so a review can use it on the configs of another revision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

Contents = Mapping[str, Any]  # by the path of a config without its .yaml: `model/toy`


class Loader(yaml.CSafeLoader):
    """libyaml's parser with OmegaConf's rules: `1e-6` is a number, a key stands once. It is ten times as fast."""

    yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        said = super().construct_mapping(node, deep)
        if len(said) != len(node.value):
            keys = [key.value for key, _ in node.value]
            again = next((key for at, (key, _) in enumerate(node.value) if key.value in keys[:at]), node)
            raise yaml.constructor.ConstructorError(None, None, f"{again.value} stands twice", again.start_mark)
        return said


def contents_around(conf: Path, config_name: str = "config") -> Contents:
    """The `contents` of `conf`, and of the folders that its primary config adds to the search path.

    An entry without a local folder is left out, because Hydra reports it when it composes.
    """
    found = contents(conf)
    for place in search_path(found, config_name):
        folder = folder_of(place)
        found = {**(contents(folder) if folder is not None else {}), **found}
    return found


def search_path(known: Contents, config_name: str) -> list[str]:
    """The places that the primary config adds to the search path, such as `pkg://cosmos3_pipeline.conf`."""
    primary = known.get(config_name)
    own = primary[1].get("hydra") if isinstance(primary, list) and isinstance(primary[1], dict) else None
    places = own.get("searchpath") if isinstance(own, dict) else None
    return [str(place) for place in places] if isinstance(places, list) else []


def folder_of(place: str) -> Path | None:
    """The folder of an entry of a search path."""
    scheme, _, name = place.partition("://")
    try:
        folder = Path(str(files(name))) if scheme == "pkg" else Path(name or place)
    except (ImportError, TypeError, ValueError):
        return None
    return folder if folder.is_dir() else None


def contents(conf: Path) -> Contents:
    """The parsed content of every file in the folder `conf`, without comments and the order of keys.

    A file that cannot be parsed is represented by its text.
    """
    found: dict[str, Any] = {}
    for file in sorted(conf.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        # Hydra's header ends with the first line that is neither empty nor a directive.
        lines = takewhile(re.compile(r"\s*(#\s*@|$)").match, text.splitlines())
        header = [line.strip() for line in lines if "@package" in line]
        try:
            found[file.relative_to(conf).with_suffix("").as_posix()] = [header, yaml.load(text, Loader)]
        except yaml.YAMLError:
            found[file.relative_to(conf).with_suffix("").as_posix()] = text
    return found


def first_line(file: Path | None) -> str:
    """The first comment line of an option's `file`, which says when to choose it."""
    if file is None:  # the option is a strategy's class, not a file
        return ""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line[2:] for line in lines if line.startswith("# ") and "@package" not in line), "")


def files_of(overrides: Sequence[str], known: Contents, config_name: str = "config") -> set[str]:
    """The configs that a composition of `overrides` may read, whether or not their files exist."""
    said = (override.lstrip("+").partition("=") for override in overrides)
    chosen = {group.partition("@")[0]: option for group, _, option in said}
    found: set[str] = set()
    waiting = [config_name]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for entry in defaults(known.get(path)):
            waiting += named(entry, path.rpartition("/")[0], chosen)
    return found


def defaults(content: Any) -> list[Any]:
    """The entries of the defaults list of a file's content."""
    body = content[1] if isinstance(content, list) else None
    listed = body.get("defaults") if isinstance(body, dict) else None
    return listed if isinstance(listed, list) else []


def named(entry: Any, folder: str, chosen: Mapping[str, str]) -> list[str]:
    """The paths of the configs that `entry` refers to. `entry` is from the defaults list of a file in `folder`."""
    if isinstance(entry, str):
        return [] if entry == "_self_" else [_absolute(entry.partition("@")[0], folder)]
    found = []
    for words, option in entry.items() if isinstance(entry, dict) else ():
        group = str(words).split()[-1].partition("@")[0]
        path = _absolute(group, folder)
        name = chosen.get(path, option)  # an override wins over every defaults list
        found += [f"{path}/{name}"] if isinstance(name, str) else []
    return found


def chosen_as(known: Contents, config_name: str) -> dict[str, str]:
    """The words that choose a group of the primary config: its name, or `group@package` if the list says so."""
    entries = [
        str(words).split()[-1] for e in defaults(known.get(config_name)) if isinstance(e, dict) for words in e
    ]
    return {words.partition("@")[0]: words for words in entries}


def _absolute(path: str, folder: str) -> str:
    return path.lstrip("/") if path.startswith("/") or not folder else f"{folder}/{path}"
