"""Which file or override set a value, and which earlier values it replaced. Imports no torch.

Hydra merges the files of the defaults list in order, then the overrides. The last to offer a key wins. Here the
same list is read without merging. This module imports nothing from the rest of the library, so a review can trace
the configs of another revision with it.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
NESTED = re.compile(r"\$\{([^${}]+)\}")


@contextmanager
def beside_a_running_hydra() -> Iterator[None]:
    """Allow composing inside a job that Hydra itself runs: its one global instance is set aside meanwhile."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        # `hydra.initialize` leaves a copy in the place of the previous instance, so that instance is set again.
        GlobalHydra.instance().hydra = running


@dataclass(frozen=True)
class Offer:
    """One value for a key, from a file (`line` from 1, 0 if unknown), an override, or the schema.

    `because` tells why the file was read: the override, or the file whose defaults list names it.
    """

    value: Any
    source: str
    line: int = 0
    because: str = ""

    @property
    def place(self) -> str:
        """`conf/model/toy.yaml:27`, or the override as it was written."""
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Link:
    """One step to the origin of a value: a key, and its offers in the order of merging."""

    key: str
    offers: tuple[Offer, ...]

    @property
    def winner(self) -> Offer:
        return self.offers[-1]


class Provenance:
    """Every offer of a composition, by dotted key."""

    def __init__(self, offers: dict[str, list[Offer]], cfg: DictConfig) -> None:
        self._offers = offers
        self._cfg = cfg

    def offers(self, key: str) -> tuple[Offer, ...]:
        """The offers for `key`, the winner last; empty for a key that nothing set."""
        return tuple(self._offers.get(key, ()))

    def chain(self, key: str) -> list[Link]:
        """`key`, then each key that its value refers to: `sampler.steps`, `model.recommended.video.steps`."""
        links: list[Link] = []
        while (offers := self.offers(key)) and all(link.key != key for link in links):
            links.append(Link(key, offers))
            target = self._reference(offers[-1].value)
            if target is None:
                break
            key = target
        return links

    def source(self, key: str) -> str:
        """Where the value of `key` was written, after following references; empty for a key that nothing set."""
        chain = self.chain(key)
        return chain[-1].winner.place if chain else ""

    def value(self, key: str) -> Any:
        """The value of `key` as plain values, after following references."""
        value = OmegaConf.select(self._cfg, key)
        return OmegaConf.to_container(value, enum_to_str=True) if OmegaConf.is_config(value) else value

    @property
    def keys(self) -> list[str]:
        """The keys that something set, sorted."""
        return sorted(self._offers)

    def _reference(self, value: Any) -> str | None:
        """The key that a value such as `${model.recommended.${task.modality}.steps}` refers to, or None."""
        if not isinstance(value, str):
            return None
        while match := NESTED.search(value):
            if match.span() == (0, len(value)):
                break
            value = value.replace(match.group(0), str(OmegaConf.select(self._cfg, match.group(1))))
        found = REFERENCE.fullmatch(value)
        return found.group(1) if found else None


def trace(
    overrides: Sequence[str], conf: Path, *, config_name: str = "config", cfg: DictConfig | None = None
) -> Provenance:
    """Compose `overrides` over the folder `conf`, and record where each value came from.

    `cfg` is the composed config if it is known already. Hydra must accept the composition; its errors pass.
    """
    with beside_a_running_hydra(), hydra.initialize_config_dir(str(conf), version_base="1.3"):
        if cfg is None:
            cfg = hydra.compose(config_name, overrides=list(overrides))
        return trace_with(GlobalHydra.instance().config_loader(), overrides, config_name, cfg)


def trace_with(loader: ConfigLoader, overrides: Sequence[str], config_name: str, cfg: DictConfig) -> Provenance:
    """As `trace`, with any search path: `loader` of Hydra's global instance has composed `cfg`."""
    assert isinstance(loader, ConfigLoaderImpl)
    offers: dict[str, list[Offer]] = {}
    # The repository includes the folders that the primary config adds to the search path.
    parsed, repository = loader._parse_overrides_and_create_caching_repo(config_name, list(overrides))
    defaults = create_defaults_list(
        repo=repository, config_name=config_name, overrides_list=parsed, prepend_hydra=True, skip_missing=False
    )
    for default in defaults.defaults:
        if default.config_path is None or default.config_path.startswith("hydra/"):
            continue
        loaded = loader._load_single_config(default, repository)
        source, lines = _origin(default.config_path, default.package or "", repository)
        because = _because(default, defaults, repository)
        for key, value in leaves(OmegaConf.to_container(loaded.config, enum_to_str=True), ""):
            if not key.startswith("hydra."):
                offers.setdefault(key, []).append(Offer(value, source, lines.get(key, 0), because))
    for override in defaults.config_overrides:
        if override.is_hydra_override() or override.is_delete():
            continue
        assert override.input_line is not None
        for key, value in leaves(override.value(), override.key_or_group):
            offers.setdefault(key, []).append(Offer(value, override.input_line))
    return Provenance(offers, cfg)


def _origin(config_path: str, package: str, repository: CachingConfigRepository) -> tuple[str, dict[str, int]]:
    """The name of the config at `config_path` for people, and the line of each key if it is a file."""
    file = file_of(config_path, repository)
    if file is None:
        return f"the schema ({config_path})", {}
    return _name(config_path, repository), lines_of(file, package)


def lines_of(file: Path, package: str) -> dict[str, int]:
    """The line of each key of a config's `file`, which is merged into `package`."""
    prefix = "" if package in ("", "_global_") else f"{package}."
    root = yaml.compose(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return dict(_lines(root, prefix)) if root is not None else {}


def file_of(config_path: str, repository: CachingConfigRepository) -> Path | None:
    """The file that the config at `config_path` was read from."""
    loaded = repository.load_config(config_path)
    scheme, _, place = ("" if loaded is None else loaded.path).partition("://")
    if scheme == "pkg":
        folder = Path(str(importlib.resources.files(place.replace("/", "."))))
    elif scheme == "file":
        folder = Path(place)
    else:
        return None
    file = folder / f"{config_path}.yaml"
    return file if file.is_file() else None


def _name(config_path: str, repository: CachingConfigRepository) -> str:
    """The path of a config for people: `conf/model/toy.yaml` in the program's own folder of configs."""
    file, loaded = file_of(config_path, repository), repository.load_config(config_path)
    if file is None or loaded is None:
        return f"the schema ({config_path})"
    if loaded.provider == "main":
        return for_people(file, file.parents[config_path.count("/")])
    if loaded.path.startswith("pkg://"):
        return f"{loaded.path.removeprefix('pkg://').replace('.', '/')}/{config_path}.yaml"
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)


def for_people(file: Path, conf: Path) -> str:
    """The path of a `file` in the program's own folder of configs `conf`: from here if the file is below, but
    `conf/model/toy.yaml` for the library's, which may be installed anywhere.
    """
    here = Path.cwd()
    for one in file.resolve(), file:
        if one.is_relative_to(here) and "site-packages" not in one.parts:
            return one.relative_to(here).as_posix()
    return f"{conf.name}/{file.relative_to(conf).as_posix()}"


def place_of(config_path: str, key: str, repository: CachingConfigRepository) -> str:
    """Where people find `key`: `conf/task/t2v.yaml:14`. There is no line if the file does not have the key.

    `key` may begin with the package of the config. `defaults.t2v` is the entry of the defaults list for `t2v`.
    """
    name, file = _name(config_path, repository), file_of(config_path, repository)
    if file is None:
        return name
    root = yaml.compose(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
    lines = {} if root is None else {**dict(_lines(root, "")), **dict(_chosen(root))}
    fitting = [known for known in lines if key == known or key.endswith(f".{known}")]
    return f"{name}:{lines[max(fitting, key=len)]}" if fitting else name


def _chosen(root: yaml.Node) -> Iterator[tuple[str, int]]:
    """The options that the defaults list of a file names, as `defaults.OPTION`, each with its line."""
    listed = dict((key.value, value) for key, value in root.value).get("defaults")
    for entry in listed.value if isinstance(listed, yaml.SequenceNode) else ():
        for option in [entry] if isinstance(entry, yaml.ScalarNode) else [value for _, value in entry.value]:
            yield f"defaults.{option.value}", option.start_mark.line + 1


def _because(default: ResultDefault, defaults: DefaultsList, repository: CachingConfigRepository) -> str:
    """The override that chose the config of `default`, or else the file whose defaults list names it."""
    for group, option in defaults.overrides.override_choices.items():
        if default.config_path != f"{group.split('@')[0]}/{option}":
            continue
        chosen = defaults.overrides.override_metadata[group]
        if chosen.external_override:
            return f"{group}={option}"
        return _name(chosen.containing_config_path or "", repository)
    return "" if default.parent in (None, "<root>") else _name(default.parent, repository)


def _lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        yield f"{prefix}{key.value}", key.start_mark.line + 1
        yield from _lines(value, f"{prefix}{key.value}.")


def leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and raw values of plain containers: lists whole, `???` and defaults lists left out."""
    if isinstance(node, dict):
        for name, inner in node.items():
            if key or name != "defaults":
                yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif node != MISSING:
        yield key, node
