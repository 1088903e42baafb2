"""Differences between two folders of configs that the files alone show: renames, new options, `hydra`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos3_pipeline.config.closure import Contents, chosen_as, defaults, first_line, named
from cosmos3_pipeline.review.renames import alike, best_matches
from cosmos3_pipeline.review.report import ABSENT, Change


@dataclass(frozen=True)
class FileChanges:
    """The differences between the files of two revisions.

    renamed: options with another name or group, `task=t2i` -> `task=image`.
    groups: groups of which every option has moved under its own name, `weights` -> `placement`, or
        `placement@weights` if the defaults list of the primary config says so.
    still: for a renamed option, the files of the head whose defaults lists still say the old name.
    gone, new: options of Hydra's own groups that are there on one side. No case of a survey chooses them.
    abouts: when to choose a new option: the first comment line of its file.
    hydra: changes in the node `hydra` and in the headers with a file's package, which no case of a survey has.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    still: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    abouts: Mapping[str, str] = field(default_factory=dict)
    hydra: tuple[Change, ...] = ()

    @property
    def renames(self) -> dict[str, str]:
        """Every rename once: of a whole group, or of an option."""
        own = {a: b for a, b in self.renamed.items() if a.partition("=")[0] not in self.groups}
        return {**self.groups, **own}

    def problem_of(self, option: str) -> dict[str, str]:
        """Why `option`, such as `task=t2i`, is refused now: it is renamed, or deleted."""
        group, _, name = option.partition("=")
        now = self.renamed.get(option)
        if now is None:
            return {
                "what": f"{option} does not exist",
                "why": f"{group} has no option {name} any more",
                "works": "another option",
            }
        words = f"{option} is renamed: {now} now"
        said, instead = option, now
        if group in self.groups:
            words = f"the group {group} is renamed: {self.groups[group]} now"
            said, instead = f"{group}=OPTION", f"{self.groups[group]}=OPTION"
        still = dict.fromkeys(
            file
            for old, files in self.still.items()
            for file in files
            if old == option or (group in self.groups and old.startswith(f"{group}="))
        )
        return {
            "what": words,
            "why": f"command lines and downstream files that say {said} are refused from now on",
            "works": f"{instead}, also in {', '.join(still)}" if still else instead,
        }


def compared(old: Contents, new: Contents, conf: Path, shown: str, primary: str) -> FileChanges:
    """The differences from the configs `old` to `new`, which are in the folder `conf`.

    `shown` is that folder's path for people, and `primary` the name of the primary config.
    """
    gone = [path for path in old if "/" in path and path not in new]
    came = [path for path in new if "/" in path and path not in old]
    moved = best_matches(
        (alike(_leaves_of(old[a]), _leaves_of(new[b])), a, b)
        for a in gone
        for b in came
        if a.rpartition("/")[0] == b.rpartition("/")[0] or a.rpartition("/")[2] == b.rpartition("/")[2]
    )
    before, now = (chosen_as(known, primary) for known in (old, new))
    renamed = {_option(a, before): _option(b, now) for a, b in moved.items()}
    added = [path for path in came if path not in moved.values()]
    return FileChanges(
        renamed=renamed,
        groups=_groups(old, new, moved, now),
        still={_option(path, before): files for path in moved if (files := tuple(_naming(path, new, shown)))},
        gone=tuple(_option(path, before) for path in gone if path.startswith("hydra/")),
        new=tuple(_option(path, now) for path in added if path.startswith("hydra/")),
        abouts={_option(path, now): first_line(conf / f"{path}.yaml") for path in added},
        hydra=tuple(_hydra(old, new, moved, shown, primary)),
    )


def _option(path: str, chosen: Mapping[str, str]) -> str:
    group, _, name = path.rpartition("/")
    return f"{chosen.get(group, group)}={name}"


def _groups(old: Contents, new: Contents, moved: Mapping[str, str], chosen: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for group in {path.rpartition("/")[0] for path in moved}:
        options = [path.removeprefix(f"{group}/") for path in old if path.rpartition("/")[0] == group]
        to = {moved.get(f"{group}/{option}", "").removesuffix(f"/{option}") for option in options}
        if len(to) == 1 and to != {group} and not any(path.startswith(f"{group}/") for path in new):
            found[group] = to.pop()
    return {group: chosen.get(to, to) for group, to in found.items() if to}


def _naming(path: str, known: Contents, shown: str) -> Iterator[str]:
    """The files whose defaults lists say the config at `path`."""
    for other, content in known.items():
        folder = other.rpartition("/")[0]
        if any(path in named(entry, folder, {}) for entry in defaults(content)):
            yield f"{shown}/{other}.yaml"


def _hydra(old: Contents, new: Contents, moved: Mapping[str, str], shown: str, primary: str) -> Iterator[Change]:
    """The changes below `hydra`, in the files of both revisions."""
    for was, path in {**{path: path for path in new if path in old}, **moved}.items():
        if old[was] == new[path] or not isinstance(old[was], list) or not isinstance(new[path], list):
            continue
        before, after = _hydra_leaves(was, old[was]), _hydra_leaves(path, new[path])
        for key in sorted({*before, *after}):
            values = before.get(key, ABSENT), after.get(key, ABSENT)
            if values[0] != values[1]:
                places = (f"{shown}/{was}.yaml",), (f"{shown}/{path}.yaml",)
                runs = "every run" if path == primary else f"runs with {_option(path, chosen_as(new, primary))}"
                yield Change(0, key, "", *values, places, (), (), runs)


def _hydra_leaves(path: str, content: Any) -> dict[str, Any]:
    """Hydra's settings in the config at `path`: keys below `hydra`, choices of Hydra's options, its package."""
    header, body = content if isinstance(content, list) else ([], None)
    if not isinstance(body, dict):
        return {}
    found = {}
    for entry in defaults(content):
        for words, option in entry.items() if isinstance(entry, dict) else ():
            group = str(words).split()[-1].lstrip("/")
            if group.startswith("hydra/"):
                found[group] = option
    if header:  # where Hydra puts all that the file says
        found["@package"] = header[-1].split()[-1]
    own = {key: value for key, value in body.items() if key != "defaults"}
    if path.startswith("hydra/"):
        package = header[-1].split()[-1] if header else path.rpartition("/")[0].replace("/", ".")
        own = own if package == "_global_" else {package: own}
    return found | {key: value for key, value in _leaves(own, "") if key.startswith("hydra.")}


def _leaves_of(content: Any) -> set[str]:
    """A file's content as a set of texts: its keys with their values, and the entries of its defaults list."""
    if not isinstance(content, list):
        return set(str(content).splitlines())
    header, body = content
    said = {key: value for key, value in body.items() if key != "defaults"} if isinstance(body, dict) else body
    return {*header, *map(repr, defaults(content)), *(f"{key}={value!r}" for key, value in _leaves(said, ""))}


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and (node or not key):
        for name, inner in node.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, node
