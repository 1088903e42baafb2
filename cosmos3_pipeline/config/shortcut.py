"""Compose many lists of overrides over one folder of configs without Hydra, if the result is surely the same.

A review composes every option of every group, on two sides, and a notebook plans in a loop. Hydra takes 0.2 s for
each composition, mostly to copy nodes and to read files. Here each file is read once, and dicts are merged. This
works for plain files, choices and references. `NotPlain` is raised for everything else, and for values that Hydra
would convert or refuse; then Hydra composes. `tests/unit/test_review_shortcut.py` compares all options with Hydra.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source, importlib_resources_config_source
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.closure import Contents, Loader, contents
from cosmos3_pipeline.config.compose import Composition, compose
from cosmos3_pipeline.config.overrides import check_overrides
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.plugins import SCHEMA_GROUP, register, settings_schema
from cosmos3_pipeline.config.provenance import (
    NESTED,
    Offer,
    Provenance,
    for_people,
    leaves,
    lines_of,
    trace_with,
)
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.config.source import BUILTIN, Source
from cosmos3_pipeline.vae.plugins import REFERENCE

DEEPEST = 20  # a longer chain of references is a circle


class NotPlain(Exception):
    """Raised for a composition that Hydra has to make or to refuse.

    about: the dotted key, or the path of a config such as `task/t2v`, that is not plain; empty if unknown.
    said: what was written for the key.
    """

    def __init__(self, about: str = "", said: object = None) -> None:
        super().__init__(about)
        self.about, self.said = about, said

    def below(self, key: str, said: object) -> NotPlain:
        """The same about `key`, where `said` was written, or about the key below it that `about` names."""
        return NotPlain(f"{key}.{self.about}", self.said) if self.about else NotPlain(key, said)


@dataclass(frozen=True)
class PlainComposition:
    """A composition without Hydra, used like `Composition`. `values` are merged, with their references.

    Names, types and ranges are right, because `config` could not have been made otherwise.
    """

    values: dict[str, Any]
    config: Config
    overrides: Sequence[str]
    made_by: Shortcut

    @property
    def source(self) -> Source:
        """Where the configs are."""
        return self.made_by.source

    def typed(self, changes: Mapping[str, Any] | None = None) -> Config:
        """The same config as `Composition.typed`. Hydra's is asked if `changes` are not plain."""
        if not changes:
            return self.config
        values = _copied(self.values)
        try:
            for key, value in changes.items():
                _set(values, key, value.name if isinstance(value, Enum) else value)
            return _config(values)
        except NotPlain:
            return self._by_hydra.typed(changes)

    def literal(self, key: str) -> Any:
        """The value that was written for the dotted `key`; None if it refers to another key."""
        if not _has(self.values, key):
            return self._by_hydra.literal(key)
        node: Any = self.values
        for part in key.split("."):
            node = node[part]
        return None if _refers(node) else _convert(_hint(key), node)

    @functools.cached_property
    def _by_hydra(self) -> Composition:
        return compose(self.overrides, self.source)

    def merged(self) -> DictConfig:
        """The values as an OmegaConf config, with their references."""
        return OmegaConf.create(self.values)

    def traced(self) -> Provenance | None:
        """The origin of every value. Hydra reads the defaults lists if the files are not plain."""
        try:
            return self.made_by.traced(self.overrides)
        except NotPlain:
            with self.source.opened() as loader:
                return trace_with(loader, self.overrides, self.source.name, self.merged())


# How a run is asked for: overrides as on the command line, a checked config, or a config that Hydra composed.
Asked = Sequence[str] | Config | DictConfig


def composition_of(asked: Asked) -> Composition | PlainComposition:
    """The composition of `asked`. Overrides are composed without Hydra if the result is surely the same.

    Raises ConfigError as `compose` does.
    """
    if isinstance(asked, Config):
        return Composition.of_saved(asked)
    if isinstance(asked, DictConfig):
        return Composition(asked, None)
    check_overrides(asked, BUILTIN.groups())
    try:
        return _builtin().compose(asked)
    except (NotPlain, HydraException):
        return compose(asked)


def _builtin() -> Shortcut:
    """The shortcut over the library's configs, read again if a file was edited since the last call."""
    files = sorted(config_dir().rglob("*.yaml"))
    return _shortcut_when(tuple((file, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=1)
def _shortcut_when(_changed: tuple[tuple[Path, int], ...]) -> Shortcut:
    register()
    return Shortcut(BUILTIN, contents(config_dir()))


class Shortcut:
    """Composes over the configs of `source`. `known` is the content of its files and its search path's."""

    def __init__(self, source: Source, known: Contents) -> None:
        self.source, self._known = source, known
        self._groups = {path.rpartition("/")[0] for path in known} | {f"vae/{d}" for d in ("encode", "decode")}
        if source.further:
            self._known = {}  # files of another folder are not in `known`

    def compose(self, overrides: Sequence[str]) -> PlainComposition:
        """The composition of `overrides`. Raises NotPlain."""
        files, settings = self._listed(overrides)
        values: dict[str, Any] = {}
        for path, package in files:
            _merge(values, _below(package, self._said(path)))
        for key, value in settings:
            # Hydra refuses a new key without `+`, and decides how an enum is written into words.
            if isinstance(value, dict) or "${" in str(value) or not _has(values, key):
                raise NotPlain
            _set(values, key, value)
        return PlainComposition(values, _config(values), overrides, self)

    def traced(self, overrides: Sequence[str]) -> Provenance:
        """The file and line, or the override, of every value, but not why a file was read. Raises NotPlain."""
        files, settings = self._listed(overrides)
        offers = {key: [Offer(value, "the schema (schema)")] for key, value in _schema_leaves().items()}
        for path, package in files:
            file = Path(self.source.main or "") / f"{path}.yaml"
            own = path in self._known
            if own and not file.is_file():  # it is in another folder of the search path
                raise NotPlain
            source = for_people(file, file.parents[path.count("/")]) if own else f"the schema ({path})"
            lines = lines_of(file, package) if own else {}
            for key, value in leaves(_below(package, self._said(path)), ""):
                offers.setdefault(key, []).append(Offer(value, source, lines.get(key, 0)))
        for (key, value), override in zip(settings, self._setting(overrides), strict=True):
            offers.setdefault(key, []).append(Offer(value, override))
        return Provenance(offers, self.compose(overrides).merged())

    def _setting(self, overrides: Sequence[str]) -> list[str]:
        """The overrides that set a key and choose no option."""
        return [one for one in overrides if one.partition("=")[0].partition("@")[0] not in self._groups]

    def _listed(self, overrides: Sequence[str]) -> tuple[list[tuple[str, str]], list[tuple[str, Any]]]:
        """The configs to merge, each with its package, and the keys that `overrides` set. Raises NotPlain."""
        if self.source.name not in self._known:
            raise NotPlain
        choices: dict[str, Any] = {}
        settings: list[tuple[str, Any]] = []
        for override in _parsed(tuple(overrides)):
            key, value = override.key_or_group, override.value()
            if (
                override.is_delete()
                or override.is_add()
                or override.is_force_add()
                or override.is_sweep_override()
            ):
                raise NotPlain
            if key == "hydra" or key.startswith(("hydra.", "hydra/")):
                raise NotPlain
            if key in self._groups:
                if override.package is not None:
                    key = f"{key}@{override.package}"
                if key in choices:
                    raise NotPlain
                choices[key] = value
            elif override.package is not None:
                raise NotPlain
            else:
                settings.append((key, value))
        return _DefaultsList(self._known, self.source.name, choices).files, settings

    def _said(self, path: str) -> dict[str, Any]:
        """The values of the config at `path`: a file's without its defaults list, or a plugin's settings."""
        if path not in self._known:
            return _settings(path)
        body = _body(path, self._known[path])
        if path != self.source.name and "searchpath" in (body.get("hydra") or {}):
            raise NotPlain
        return {key: value for key, value in body.items() if key not in ("defaults", "hydra")}


@functools.lru_cache(maxsize=4096)
def _parsed(overrides: tuple[str, ...]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _below(package: str, said: Any) -> Any:
    """`said` at the dotted key `package`; "" is the root."""
    for part in reversed(package.split(".") if package else []):
        said = {part: said}
    return said


@functools.cache
def _schema_leaves() -> dict[str, Any]:
    return dict(leaves(OmegaConf.to_container(OmegaConf.structured(Config), enum_to_str=True), ""))


def _body(path: str, content: Any) -> dict[str, Any]:
    """The mapping that the config at `path` holds."""
    if not isinstance(content, list):  # the file cannot be parsed
        raise NotPlain(path)
    body = {} if content[1] is None else content[1]
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise NotPlain(path)
    return body


def _settings(path: str) -> dict[str, Any]:
    """The default settings of the strategy at the option `path`, such as `_strategy/tiled`."""
    group, _, name = path.rpartition("/")
    cls = register().strategies.get(name)
    directions = () if cls is None else tuple(f"vae/{direction}" for direction in cls.directions)
    if cls is None or name == REFERENCE or group not in (SCHEMA_GROUP, *directions):
        raise NotPlain(path)
    made = {}
    for f in dataclasses.fields(settings_schema(cls)):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        made[f.name] = default.name if isinstance(default, Enum) else default
    return made


class _DefaultsList:
    """The configs that are merged, in order, each with the package that it is merged into.

    As in Hydra's `defaults_list.py`, the tree is walked from its end, and the first override of a group wins.
    """

    def __init__(self, known: Contents, primary: str, choices: Mapping[str, Any]) -> None:
        self._known, self._primary = known, primary
        self._choices: dict[str, Any] = dict(choices)
        self._met: set[str] = set()
        self.files = self._walk(primary, "", "")
        if set(self._choices) - self._met or len(set(self.files)) != len(self.files):
            raise NotPlain  # a choice of an unused group, or a file that is merged twice

    def _walk(self, path: str, folder: str, package: str, *, explicit: bool = False) -> list[tuple[str, str]]:
        """The files of the config at `path`. `explicit`: its entry has a package, which wins over its header."""
        content = self._known.get(path)
        if content is None:
            if path == "schema" and not package:
                return []  # the schema has types only, which `_config` checks
            return [(path, package)]  # a plugin's settings
        body, (header, _) = _body(path, content), content
        if header and not explicit:
            said = re.fullmatch(r"# @package (_global_|[a-z]\w*(?:\.[a-z]\w*)*)", header[0])
            if said is None or len(header) > 1 or path == self._primary:
                raise NotPlain(path, header)
            package = said[1].removeprefix("_global_")
        entries = body.get("defaults", [])
        if not entries:
            return [(path, package)]
        if not isinstance(entries, list) or entries.count("_self_") > 1:
            raise NotPlain
        if "_self_" not in entries:
            if path == self._primary:
                raise NotPlain
            entries = [*entries, "_self_"]
        children = self._children(entries, folder, package)
        found = []
        for child in reversed(children):
            found.append([(path, package)] if child is None else self._child(*child))
        return [file for files in reversed(found) for file in files]

    def _child(self, path: str, package: str, group: str | None) -> list[tuple[str, str]]:
        if group is not None:
            option = self._choices.get(group, path)
            self._met.add(group)
            if option is None:
                return []
            if not isinstance(option, str) or "${" in option or "/" in option:
                raise NotPlain
            path = f"{group.partition('@')[0]}/{option}"
        return self._walk(path, path.rpartition("/")[0], package, explicit="@" in (group or ""))

    def _children(self, entries: list[Any], folder: str, package: str) -> list[tuple[Any, str, str | None] | None]:
        """The configs of the entries: None for `_self_`, else path, package, and the group if it is an option."""
        children: list[tuple[Any, str, str | None] | None] = []
        overridden = False
        for entry in entries:
            if entry == "_self_":
                children.append(None)
            elif overridden and isinstance(entry, str):
                raise NotPlain
            elif isinstance(entry, str):
                children.append(self._config(entry, folder, package))
            elif isinstance(entry, dict) and len(entry) == 1:
                ((words, option),) = entry.items()
                kind, _, group = str(words).rpartition(" ")
                if kind == "override":
                    overridden = True
                    self._override(group, option, folder, package)
                elif kind or overridden or group.startswith("/"):
                    raise NotPlain
                else:
                    group, at, where = group.partition("@")
                    name = f"{folder}/{group}" if folder else group
                    below = ".".join([*([package] if package else []), *group.split("/")])
                    if at:
                        if package or not re.fullmatch(r"[a-z]\w*", where) or where == below:
                            raise NotPlain
                        name, below = f"{name}@{where}", where
                    elif below != name.replace("/", "."):
                        raise NotPlain  # the group is chosen by another key
                    children.append((option, below, name))
            else:
                raise NotPlain
        return children

    def _config(self, entry: str, folder: str, package: str) -> tuple[str, str, None]:
        name, at, where = entry.partition("@")
        if "${" in name or (at and where != "_here_") or ("/" in name and not (at and name.startswith("/"))):
            raise NotPlain
        path = name.lstrip("/") if name.startswith("/") or not folder else f"{folder}/{name}"
        return path, package, None

    def _override(self, group: str, option: Any, folder: str, package: str) -> None:
        group, at, where = group.partition("@")
        path = group.lstrip("/") if group.startswith("/") or not folder else f"{folder}/{group}"
        if path.startswith("hydra/"):
            if folder:
                raise NotPlain
            return
        own = path.replace("/", ".")
        below = group.lstrip("/").replace("/", ".")
        if at and package and not where.startswith("_global_."):
            raise NotPlain
        into = where.removeprefix("_global_.") if at else f"{package}.{below}" if package else below
        key = path if into == own else f"{path}@{into}"
        if key in self._met:
            raise NotPlain
        self._choices.setdefault(key, option)


def _merge(into: dict[str, Any], said: Mapping[str, Any]) -> None:
    for key, value in said.items():
        if not isinstance(key, str):
            raise NotPlain
        old = into.get(key)
        if isinstance(value, dict):
            if key == "_target_" or not (old is None or isinstance(old, dict)):
                raise NotPlain(key, value)
            into[key] = old = {} if old is None else old
            try:
                _merge(old, value)
            except NotPlain as error:
                raise error.below(key, value) from None
        elif isinstance(old, dict) or (key == "_target_" and old not in (None, value)):
            raise NotPlain(key, value)
        else:
            into[key] = value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `key` in `values`, as `key=value` on a command line does."""
    node = values
    *above, last = key.split(".")
    for part in above:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise NotPlain
    _merge(node, {last: value})


def _copied(node: Any) -> Any:
    """The nodes of merged values, copied. Nothing changes the values and lists in them."""
    return {key: _copied(inner) for key, inner in node.items()} if isinstance(node, dict) else node


def _refers(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _config(values: dict[str, Any]) -> Config:
    """The typed config of merged `values`. Raises NotPlain for an unknown key or a value of the wrong type."""
    made = _convert(Config, _followed(values, values, 0))
    assert isinstance(made, Config)
    for direction in ("encode", "decode"):
        node = getattr(made.vae, direction)
        cls = register().by_target(node["_target_"]) if isinstance(node, dict) and "_target_" in node else None
        if cls is None or direction not in cls.directions:
            raise NotPlain
        try:
            setattr(made.vae, direction, plain(_convert(settings_schema(cls), node)))
        except NotPlain as error:
            raise error.below(f"vae.{direction}", node) from None
    if _names_code({key: value for key, value in values.items() if key != "vae"}):
        raise NotPlain
    return made


def _names_code(node: Any) -> bool:
    if isinstance(node, dict):
        return "_target_" in node or any(map(_names_code, node.values()))
    return isinstance(node, list) and any(map(_names_code, node))


def _followed(value: Any, root: dict[str, Any], depth: int) -> Any:
    """`value` with each reference replaced by the value that it refers to."""
    if isinstance(value, dict):
        followed = {}
        for key, inner in value.items():
            try:
                followed[key] = _followed(inner, root, depth)
            except NotPlain as error:
                raise error.below(key, inner) from None
        return followed
    if isinstance(value, list):
        return [_followed(inner, root, depth) for inner in value]
    if not _refers(value):
        return value
    while match := NESTED.search(value):
        whole = match.span() == (0, len(value))
        key = match.group(1)
        if not re.fullmatch(r"\w+(\.\w+)+", key) or depth > DEEPEST or "\\" in value:
            raise NotPlain
        node: Any = root
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
            if node is None and not whole:
                raise NotPlain
        if isinstance(node, dict) or (node is None and not _has(root, key)):
            raise NotPlain
        found = _convert(_hint(key), _followed(node, root, depth + 1))
        if whole:
            return plain({"": found})[""]
        if type(found) is not str or _refers(found) or value.count("${", 0, match.start()) == 0:
            raise NotPlain
        value = value[: match.start()] + found + value[match.end() :]
    raise NotPlain


def _has(root: dict[str, Any], key: str) -> bool:
    *above, last = key.split(".")
    for part in above:
        root = root.get(part) or {}
        if not isinstance(root, dict):
            return False
    return last in root


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


@functools.cache
def _fields(schema: type) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(schema)}


@functools.cache
def _hint(key: str) -> Any:
    """The type of a dotted key; raises NotPlain for a key that no dataclass has."""
    hint: Any = Config
    for part in key.split("."):
        if not dataclasses.is_dataclass(hint) or part not in _hints(typing.cast(type, hint)):
            raise NotPlain
        hint = _hints(typing.cast(type, hint))[part]
    return hint


def _convert(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`: enums by name, ints as floats. Raises NotPlain for any other conversion."""
    if hint is Any:
        if "???" in str(value) or (isinstance(value, float) and not math.isfinite(value)):
            raise NotPlain
        return value
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast(type, hint), value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _convert(hint, value)
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], inner) for inner in value]
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], inner) for key, inner in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, str) and value in hint.__members__:
            return hint[value]
        raise NotPlain
    if hint is float and type(value) is int:
        return float(value)
    if value == "???" or type(value) is not hint or value != value:
        raise NotPlain
    return value


def _object(schema: type, said: Any) -> Any:
    fields, hints = _fields(schema), _hints(schema)
    if not isinstance(said, dict):
        raise NotPlain
    for name in said:
        if name not in fields:
            raise NotPlain(name, said[name])
    made = {}
    for name, one in fields.items():
        try:
            made[name] = _convert(hints[name], said[name]) if name in said else _default(one, hints[name])
            _in_range(made[name], one.metadata)
        except NotPlain as error:
            raise error.below(name, said.get(name)) from None
    return schema(**made)


def _default(one: dataclasses.Field[Any], hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast(type, hint), {})
    if one.default is not dataclasses.MISSING and one.default != "???":
        return one.default
    if one.default_factory is not dataclasses.MISSING:
        return one.default_factory()
    raise NotPlain


def _in_range(value: Any, limits: Mapping[str, Any]) -> None:
    if value is None or not limits:
        return
    values = value if isinstance(value, list) else [value]
    fewest, most = limits.get("items", (0, len(values)))
    low, high, step = limits.get("at_least"), limits.get("at_most"), limits.get("multiple_of")
    form, _ = limits.get("matching", (None, None))
    for one in values:
        inside = (low is None or one >= low) and (high is None or one <= high) and not (step and one % step)
        if not inside or one not in limits.get("one_of", (one,)) or (form and not re.fullmatch(form, str(one))):
            raise NotPlain
    if not fewest <= len(values) <= most:
        raise NotPlain


def read_each_file_once() -> None:
    """Make Hydra parse each YAML file only once in this process, for the compositions that it still makes."""
    parsed: dict[str, Any] = {}

    class ReadOnce(OmegaConf):
        @staticmethod
        def load(file_: Any) -> Any:
            text = file_.read()
            if text not in parsed:
                parsed[text] = yaml.load(text, Loader)
            return OmegaConf.create({} if parsed[text] is None else parsed[text])

    Plugins.instance()  # discover plugins first, because it runs these modules again
    for source in (file_config_source, importlib_resources_config_source):
        vars(source)["OmegaConf"] = ReadOnce
