"""What makes a review of many compositions quick.

Which files of a folder of configs a list of overrides can be made of is read from the defaults lists alone.
Composing takes a tenth of a second, this next to nothing: so a review composes only what a change can touch. It
says a file too many rather than one too few. Nothing is taken from the rest of the library, so a review can ask it
about the configs of another revision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source, importlib_resources_config_source
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

Contents = Mapping[str, Any]  # by the path of a config without its .yaml: `model/toy`


def contents(conf: Path) -> Contents:
    """What every file of the folder `conf` says; comments and the order of keys are no part of it.

    A file that cannot be parsed is its text.
    """
    found: dict[str, Any] = {}
    for file in sorted(conf.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        header = [line for line in text.splitlines()[:5] if re.match(r"#\s*@package", line)]
        try:
            found[file.relative_to(conf).with_suffix("").as_posix()] = [header, yaml.load(text, yaml.CSafeLoader)]
        except yaml.YAMLError:
            found[file.relative_to(conf).with_suffix("").as_posix()] = text
    return found


def files_of(overrides: Sequence[str], known: Contents, config_name: str = "config") -> set[str]:
    """The configs that `overrides` may be composed of, whether or not they are there."""
    said = (override.lstrip("+").partition("=") for override in overrides)
    chosen = {group.partition("@")[0]: option for group, _, option in said}
    found: set[str] = set()
    waiting = [config_name]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for entry in _defaults(known.get(path)):
            waiting += _named(entry, path.rpartition("/")[0], chosen)
    return found


def _defaults(content: Any) -> list[Any]:
    body = content[1] if isinstance(content, list) else None
    listed = body.get("defaults") if isinstance(body, dict) else None
    return listed if isinstance(listed, list) else []


def _named(entry: Any, folder: str, chosen: Mapping[str, str]) -> list[str]:
    """The configs that an entry of a defaults list in `folder` names."""
    if isinstance(entry, str):
        return [] if entry == "_self_" else [_absolute(entry.partition("@")[0], folder)]
    found = []
    for words, option in entry.items() if isinstance(entry, dict) else ():
        group = str(words).split()[-1].partition("@")[0]
        path = _absolute(group, folder)
        name = chosen.get(path, option)  # what is typed wins over every defaults list
        found += [f"{path}/{name}"] if isinstance(name, str) else []
    return found


def _absolute(path: str, folder: str) -> str:
    return path.lstrip("/") if path.startswith("/") or not folder else f"{folder}/{path}"


def read_each_file_once() -> None:
    """Let Hydra parse each YAML file once in this process: parsing takes longer than composing."""
    parsed: dict[str, Any] = {}

    class ReadOnce(OmegaConf):
        @staticmethod
        def load(file_: Any) -> Any:
            text = file_.read()
            if text not in parsed:
                parsed[text] = yaml.load(text, Loader=get_yaml_loader())
            return OmegaConf.create({} if parsed[text] is None else parsed[text])

    Plugins.instance()  # looking for plugins runs these modules once more
    for source in (file_config_source, importlib_resources_config_source):
        vars(source)["OmegaConf"] = ReadOnce


def without_hydra(cfg: DictConfig) -> DictConfig:
    """What was composed, but for Hydra's own node."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
