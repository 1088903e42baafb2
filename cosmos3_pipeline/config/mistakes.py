"""Finds the command line that a mistyped one most likely means.

`read` takes the words of a command line in order, and says which arguments they mean. The rules hold for every
key, because they know the groups, and the kind of value that each key takes. `other_words` has the words of other
tools. Right arguments stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import re
import shlex
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, lru_cache
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from cosmos3_pipeline.config.kinds import Kind, kind_of, schema_keys
from cosmos3_pipeline.config.other_words import ALONE, FILES, FOLDER, OTHER_NAMES, OTHER_VALUES, SIZES
from cosmos3_pipeline.config.plugins import STRATEGY_NODES
from cosmos3_pipeline.errors import nearest

# The options of every config group, see `Source.groups`.
Groups = Mapping[str, Sequence[str]]

NO_GROUPS: Groups = MappingProxyType({})

USUAL_FPS = 24.0  # of a command line whose own rate is unknown

TYPOGRAPHIC = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"})
_TRUE, _FALSE = ("true", "yes", "on", "y", "enabled", "enable", "1"), ("false", "no", "off", "n", "disabled", "0")
_ASSIGNMENT = re.compile(r"\s*([\[+~]*[\w./@-]+)\s*(?:=+|:=)\s*(.*?)\s*", re.DOTALL)
# Characters that a shell changes inside double quotes.
_OF_THE_SHELL = re.compile(r"[$`\\!]")

PLUS = "a plus adds what is not there yet, and this is there already"
NULL = "no value is written null in Hydra, and None would be a text of four letters"
ONLY_A_NAME = "the key holds a name only, and the other values come with an option of the group"
SPACE = "a shell ends an argument at a space"
EQUALS = "a value follows its key after one =, without spaces"
ALONE_WHY = "a word alone sets nothing"
DASHES = "a key is set without dashes; flags such as --help have them"
QUOTES = "a shell knows no curly quotes and no long dashes"
TILDE = "a shell replaces ~ at the start of an argument only"
SYNTAX = "brackets, quotes, colons and commas have a meaning of their own in a value, unless it is quoted"


@dataclass(frozen=True)
class Reading:
    """The words `typed`, and the arguments that they mean; `means` is None if that is unknown.

    `why` says why Hydra cannot take the words as they are; "" if it can, or if its own refusal says more.
    """

    typed: tuple[str, ...]
    means: tuple[str, ...] | None
    why: str = ""


def read(
    arguments: Sequence[str], groups: Groups, *, flags: Mapping[str, bool], sweep: bool, fps: float = USUAL_FPS
) -> list[Reading]:
    """The arguments of a command line in order, each with what it means.

    `flags` are Hydra's flags, with whether a value follows. `sweep` is whether -m was given. `fps` is the frame
    rate with which a duration in seconds becomes a number of frames.
    """
    reader = _Reader(groups, flags, sweep, fps)
    found, rest = [], list(arguments)
    while rest:
        found.append(reader.first(rest))
        del rest[: len(found[-1].typed)]
    return found


def text_argument(key: str, value: str) -> str:
    """The argument that gives `key` the text `value`, whatever characters it has."""
    # Inside Hydra's quotes a backslash is literal unless a quote follows it. An escaped ${ is no reference.
    inner = re.sub(r'(\\*)"', lambda found: 2 * found[1] + '\\"', value.replace("${", "\\${"))
    return f'{key}="' + re.sub(r"\\+$", lambda found: 2 * found[0], inner) + '"'


def in_a_shell(argument: str) -> str:
    """How `argument` is typed in a shell."""
    if shlex.quote(argument) == argument:
        return argument
    if "'" not in argument:
        return f"'{argument}'"
    if not _OF_THE_SHELL.search(argument):
        return '"' + argument.replace('"', '\\"') + '"'
    return shlex.quote(argument)


def as_meant(override: str, groups: Groups) -> str | None:
    """How the mended `override` is typed in a shell; None if it is right, or if its meaning is unknown."""
    means = read([override], groups, flags={}, sweep=True)[0].means if override else None
    return " ".join(map(in_a_shell, means)) if means and means != (override,) else None


def as_typed(key: str, value: str) -> str:
    """The argument to type in a shell so that `key` gets the text `value`, whatever characters it has."""
    return in_a_shell(text_argument(key, value))


@lru_cache(maxsize=4096)  # reading one takes a millisecond, and a review asks for the same ones again
def parsed(argument: str) -> Override | None:
    """The override that Hydra reads; None if the argument is none."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def key_meant(word: str, groups: Groups = NO_GROUPS) -> str | None:
    """The one group or key of the schema that `word` means; None if none or several are near."""
    if kind_of(word) is not None:
        return word
    found = keys_meant(word, [*groups, *schema_keys()])
    return found[0] if len(found) == 1 else None


def keys_meant(word: str, known: Sequence[str]) -> list[str]:
    """The keys of `known` that `word` means; none if none is near.

    Another spelling of the whole key comes first, then a word of another tool, then the last part alone, which
    finds the least nested keys: `seed` finds `sampler.seed`. After that a similar key is sought in the same node,
    or in the node with the nearest name, and then everywhere: `task.promt` and `taks.prompt` find `task.prompt`.
    """
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word.strip()).replace("-", "_").lower()
    for spelling in (word, snake, snake.replace(".", "/"), snake.replace("/", "."), snake.removesuffix("s")):
        if spelling in known:
            return [spelling]
    node, _, leaf = snake.replace("/", ".").rpartition(".")
    same = _least_nested(leaf, known)
    other = OTHER_NAMES.get(snake) or (None if same else OTHER_NAMES.get(leaf))
    if other is not None:
        return [other] if other in known or other.startswith("hydra.") else []
    nodes = {k.rpartition(".")[0] for k in known}
    meant = node if node in nodes else nearest(node, nodes)
    if nearest(node, known) == "extras":  # its keys are the user's own
        return [f"extras.{leaf}"]
    if (node or not same) and meant is not None and (found := nearest(leaf, beside(meant, known))):
        return [f"{meant}.{found}" if meant else found]
    return same or _least_nested(nearest(leaf, (k.rpartition(".")[2] for k in known)), known)


def beside(node: str, known: Iterable[str]) -> list[str]:
    """The names directly below `node`; "" is the root."""
    return sorted(
        {k[len(node) + 1 if node else 0 :].split(".")[0] for k in known if not node or k.startswith(f"{node}.")}
    )


def _least_nested(leaf: str | None, known: Iterable[str]) -> list[str]:
    """The keys of `known` that end in `leaf` with the fewest nodes before it."""
    found = [key for key in known if key.rpartition(".")[2] == leaf]
    depth = min((key.count(".") for key in found), default=0)
    return [key for key in found if key.count(".") == depth]


def fits(kind: Kind | None, value: object) -> bool:
    """Whether OmegaConf accepts the parsed `value` for a key of this kind. An unknown kind accepts all."""
    if kind is None or kind.hint is Any or (isinstance(value, str) and "${" in value):
        return True
    if value is None:
        return kind.optional
    if "one_of" in kind.limits:
        return str(value) in kind.limits["one_of"]
    if isinstance(kind.hint, type) and issubclass(kind.hint, Enum):
        return str(value) in kind.hint.__members__
    if typing.get_origin(kind.hint) is list:
        return isinstance(value, list)
    if kind.is_node or typing.get_origin(kind.hint) is dict:
        return isinstance(value, dict)
    if kind.hint is bool:
        return str(value).lower() in (*_TRUE[:4], "1", *_FALSE[:4], "0")
    if kind.hint in (int, float):
        return isinstance(value, (int, kind.hint)) and not isinstance(value, bool)
    return not isinstance(value, list | dict)


class _Reader:
    def __init__(self, groups: Groups, flags: Mapping[str, bool], sweep: bool, fps: float) -> None:
        self._groups, self._flags, self._sweep, self._fps = groups, flags, sweep, fps

    def first(self, rest: Sequence[str]) -> Reading:
        """The reading of the words at the start of `rest`."""
        word = re.sub("^[\u2014\u2013]", lambda dash: "--" if len(rest[0]) > 2 else "-", rest[0])
        if word.startswith("-") and word.strip("-"):
            return self._flag(word, rest)
        if _is_bare(word) and rest[1:2] and rest[1].startswith("="):
            count = 2 + (rest[1] == "=" and len(rest) > 2)
            return self._assigned(rest, count, EQUALS)
        if word.endswith("=") and rest[1:2] and _is_bare(rest[1]) and not re.match("--?[a-z]", rest[1]):
            return self._assigned(rest, 2, EQUALS)
        if _is_bare(word):
            return self._alone(rest)
        return self._assigned(rest, 1, "")

    def _flag(self, word: str, rest: Sequence[str]) -> Reading:
        name, equals, value = word.partition("=")
        count = 1
        # argparse accepts an abbreviated flag
        known = [flag for flag in self._flags if flag == name or (name[:2] == "--" and flag.startswith(name))]
        if known and (self._flags[known[0]] or not equals):
            count += self._flags[known[0]] and not equals and rest[1:2] != []
            return Reading(tuple(rest[:count]), (word, *rest[1:count]), QUOTES if word != rest[0] else "")
        bare = name.strip("-").lower()
        for flag in (f"-{bare}", f"--{bare}"):
            if flag in self._flags and not self._flags[flag]:
                return Reading((rest[0],), (flag,), f"the flag is {flag}")
        words = [value] if equals else []
        while rest[count:] and _is_bare(rest[count]) and not rest[count].startswith("-"):
            words.append(rest[count])
            count += 1
        key = key_meant(name.strip("-"), self._groups)
        if not words and (key is None or ((kind := kind_of(key)) is not None and kind.hint is bool)):
            words = ["true"]
        means = self._argument(name.strip("-"), " ".join(words)) if words else None
        if means is None and (near := nearest(name, self._flags)) is not None:
            meant = self._flag(near + equals + value, rest)
            return Reading(meant.typed, meant.means, f"the flag is {near}")
        if means is None and (key is None or ("." not in key + name and key not in self._groups)):
            return Reading((rest[0],), None, "there is no such flag, and no key of this name")
        return Reading(tuple(rest[:count]), means, DASHES)

    def _alone(self, rest: Sequence[str]) -> Reading:
        """A word without =, such as `plan`, `model.nano` or `model` before `nano`."""
        word = rest[0]
        if word.startswith("~"):
            node = word[1:].replace("/", ".")
            kind = kind_of(node if node in STRATEGY_NODES else word[1:])
            own = kind is None or typing.get_origin(kind.hint) is dict  # nodes with keys of the user's own
            return Reading((word,), (word,)) if own else Reading((word,), (), "every run reads it")
        group = key_meant(word, self._groups)
        after = rest[1] if rest[1:2] and _is_bare(rest[1]) and group in self._groups else ""
        if after and (option := self._option(str(group), after)):
            return Reading(tuple(rest[:2]), option, EQUALS)
        kind = kind_of(group) if group is not None and group not in self._groups else None
        if kind is not None and not kind.is_node:
            if rest[1:2] and _is_bare(rest[1]) and not rest[1].startswith("-"):
                return Reading(tuple(rest[:2]), self._argument(word, rest[1]), EQUALS)
            if kind.hint is bool:
                return Reading((word,), (f"{group}=true",), ALONE_WHY)
        if " " in word.strip() or re.search(r":\s", word):
            key, colon, value = word.partition(":")
            sure = re.fullmatch(r"[\w./]+", key) and (key in self._groups or kind_of(key) is not None)
            if colon and sure and (means := self._argument(key, value.strip())):
                return Reading((word,), means, EQUALS)
            words = word.split()
            if words[0] in self._groups and len(words) == 2 and (option := self._option(*words)):
                return Reading((word,), option, EQUALS)
            return Reading((word,), (text_argument("task.prompt", word),), ALONE_WHY)
        if word.lower() in ALONE:
            return Reading((word,), ALONE[word.lower()], ALONE_WHY)
        if file := FILES.get(PurePath(word).suffix.lower()):
            return Reading((word,), (f"{file}={word}",), ALONE_WHY)
        if option := self._option("", word):
            return Reading((word,), option, ALONE_WHY)
        if match := re.fullmatch(r"([\w./]*\w)([./:])(.+)", word):
            key, mark, value = match.groups()
            if mark != ":" and (kind_of(word.replace("/", ".")) is not None or key not in self._groups):
                return Reading((word,), None, ALONE_WHY)
            if means := self._argument(key, value):
                return Reading((word,), means, EQUALS)
        return Reading((word,), None, ALONE_WHY)

    def _assigned(self, rest: Sequence[str], count: int, why: str) -> Reading:
        """`rest[:count]` is key=value, in one or more words. Words of a text may follow."""
        typed = "".join(rest[:count])
        match = _ASSIGNMENT.fullmatch(typed)
        if match is None:
            return Reading(tuple(rest[:count]), (typed,))
        key, value = match.groups()
        bare = key.lstrip("+[")
        meant = key_meant(bare, self._groups)
        kind = None if meant is None or meant in self._groups else kind_of(meant)
        words = []
        for word in rest[count:]:
            if not _is_bare(word) or word.startswith(("~", "-")) or rest[count - 1].endswith("]"):
                break
            words.append(word)
        is_text = kind is not None and kind.hint is str and "one_of" not in kind.limits
        numbers = all(re.fullmatch(r"[\d.]+,?", word) for word in (value, *words))
        if words and (is_text or (numbers and kind is not None)):
            count += len(words)
            spoken = " ".join([value, *words])
            if not is_text and self._sweep:  # `sampler.seed=1, 2` with -m
                return Reading(
                    tuple(rest[:count]), (f"{meant}={','.join(re.findall(r'[0-9.]+', spoken))}",), SPACE
                )
            return Reading(tuple(rest[:count]), self._argument(bare, spoken), SPACE)
        parts = re.split(r"[,;&]\s*(?=[\w./]+=)", typed)  # "model=nano;job=plan"
        if meant in self._groups and " " in value:  # "job=plan model nano"
            parts = [f"{key}={value.split()[0]}", *value.split()[1:]]
        if len(parts) > 1 and (meant in self._groups or all(map(self._is_named, parts))):
            inner = read(parts, self._groups, flags={}, sweep=self._sweep, fps=self._fps)
            if all(one.means for one in inner):
                return Reading(tuple(rest[:count]), tuple(a for one in inner for a in one.means or ()), EQUALS)
        if count == 1 and self._is_right(typed, meant, kind):
            return Reading((typed,), (typed,))
        if key.startswith("+") and (kind is None and meant not in self._groups):
            return Reading((typed,), (typed,))
        if key.startswith("~"):
            return Reading((typed,), (typed,))
        means = self._argument(bare, value.rstrip("]") if key.startswith("[") else value)
        if means is None and meant is not None and re.fullmatch(r"[\w.-]+(,[\w.-]+)+", value) and not self._sweep:
            means = ("-m", f"{meant}={value}")
        return Reading(tuple(rest[:count]), means, why or self._why(typed, key, value))

    def _is_named(self, argument: str) -> bool:
        """Whether a group or a key of the schema is before the equals sign."""
        key = argument.partition("=")[0]
        return key in self._groups or kind_of(key) is not None

    def _is_right(self, argument: str, meant: str | None, kind: Kind | None) -> bool:
        """Whether Hydra and OmegaConf accept the argument as it is, as far as names and kinds tell."""
        override = parsed(argument)
        if override is None:
            return False
        key = override.key_or_group
        if override.is_hydra_override() or key.split(".")[0] in ("hydra", "extras"):
            return True
        if override.is_add() and meant == key and key not in self._groups:
            return False
        if key in self._groups:
            values = override.value()
            names = [str(v) for v in values] if isinstance(values, list) else [str(values)]
            added = override.is_add() or override.is_force_add()
            swept = override.is_sweep_override()
            return not added and (self._sweep if swept else all(n in self._groups[key] for n in names))
        if override.is_sweep_override():
            return self._sweep and meant == key
        if not isinstance(override.value(), dict) and key.replace(".", "/") in self._groups:
            return False
        if self._why_not_as_text(key, override.value()):
            return False
        return meant == key and fits(kind, override.value())

    def _why_not_as_text(self, key: str, value: object) -> str:
        """Why a text that Hydra and OmegaConf accept sets something else than people mean; "" if it does not."""
        kind = kind_of(key)
        if value == "None" and kind is not None and kind.optional:
            return NULL
        return ONLY_A_NAME if key.endswith(".name") and value in self._groups.get(key[:-5], ()) else ""

    def _why(self, typed: str, key: str, value: str) -> str:
        if typed.translate(TYPOGRAPHIC) != typed and parsed(typed) is None:
            return QUOTES
        plain = key.lstrip("+")
        if plain in self._groups if key.startswith("++") else key.startswith("+") and self._is_named(plain):
            return PLUS
        if (override := parsed(typed)) is not None:
            is_one = not override.is_delete() and not override.is_sweep_override()
            return self._why_not_as_text(key, override.value()) if is_one else ""
        if not re.match(r"[\w./+~@-]+=(?!=)", typed):
            return EQUALS
        return TILDE if value.startswith("~") else SYNTAX

    def _argument(self, key: str, value: str) -> tuple[str, ...] | None:
        """The right arguments for a key and a value as they were typed."""
        return self._set(key, value) or self._as_flag(key, value) or self._beside(key, value)

    def _as_flag(self, key: str, value: str) -> tuple[str, ...] | None:
        """The choice of the option that `key` names: `vae=tiled` for `vae.tiling=true`."""
        node, _, word = key.replace("-", "_").lower().rpartition(".")
        if value.lower() not in _TRUE or (node and node not in self._groups):
            return None
        return self._option(node, word)

    def _beside(self, key: str, value: str) -> tuple[str, ...] | None:
        """The one other key below the same node that has `value` among its names."""
        node, _, _ = key.rpartition(".")
        keys = [other for other in schema_keys() if node and other.startswith(f"{node}.")]
        kinds = {other: kind for other in keys if (kind := kind_of(other)) is not None}
        found = [
            f"{other}={name}" for other, kind in kinds.items() for name in _words_of(value) if name in kind.names
        ]
        return (found[0],) if len(found) == 1 else None

    def _set(self, key: str, value: str) -> tuple[str, ...] | None:
        value = value.translate(TYPOGRAPHIC)
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if value[:1] in ("'", '"') and value.count(value[0]) == 1:
            value = value[1:]  # the closing quote is missing
        leaf = re.split(r"[./]", key)[-1].lower()
        if leaf in ("size", "resolution"):
            size = re.fullmatch(r"(\d+)[x,*](\d+)", SIZES.get(value.lower(), value))
            return (f"task.width={size[1]}", f"task.height={size[2]}") if size else None
        if leaf in ("duration", "seconds") and re.fullmatch(r"\d+", value):
            value += "s"
        above = key.rpartition(".")[0].replace(".", "/")
        if leaf in ("strategy", "method") and above in self._groups:
            return self._option(above, value)
        meant = key_meant(key, self._groups)
        if meant is None:
            return self._option(above if above in self._groups else "", value)
        if meant in self._groups:
            option = self._option(meant, value)
            if option is not None or meant != "output":
                return option
            meant = FOLDER  # a file to write, as in output=kite.mp4
        if meant == FOLDER:
            return (f"{meant}={PurePath(value).with_suffix('')}",) if PurePath(value).name else None
        kind = kind_of(meant)
        if meant.endswith(".name") and value in self._groups.get(meant[:-5], ()):
            return (f"{meant[:-5]}={value}",)
        if (node := meant.replace(".", "/")) in self._groups:
            return self._option(node, value)
        if kind is not None and kind.hint in (int, float) and (several := _several(value)):
            return (*([] if self._sweep else ["-m"]), f"{meant}={several}")
        made = None if kind is None else written(kind, value, meant, self._fps)
        return None if made is None else (made if made.startswith(f"{meant}=") else f"{meant}={made}",)

    def _option(self, group: str, value: str) -> tuple[str, ...] | None:
        """The choice of `value` in `group`, else in a group below it, else in the only group that has it."""
        if group == "model" and re.fullmatch(r"(?!model/)[\w.-]+/[\w.-]+", value):  # a repository of the hub
            made = self._option("model", value.partition("/")[2])
            return (*made, f"model.path={value}") if made and made[0].startswith("model=") else None
        if value.lower() in (*_TRUE, *_FALSE) and "none" in self._groups.get(group, ()):
            chosen = [each for each in self._groups[group] if (each == "none") == (value.lower() in _FALSE)]
            return (f"{group}={chosen[0]}",) if len(chosen) == 1 else None
        above, _, leaf = group.rpartition("/")
        if value.lower() in (*_TRUE, *_FALSE):  # the flag beside the strategy, as in vae.decode=true
            flag = f"{above}.parallel_{leaf}"
            return (f"{flag}={str(value.lower() in _TRUE).lower()}",) if kind_of(flag) is not None else None
        names = [each for each in value.strip(" ,;\"'").split(",") if each]
        if len(names) > 1:
            found = [self._option(group, name) for name in names]
            if group not in self._groups or None in found:
                return None
            choices = ",".join(str(one[0]).partition("=")[2] for one in found if one)
            return (*([] if self._sweep else ["-m"]), f"{group}={choices}")
        if not names:
            return None
        word = _folded(PurePath(names[0].removesuffix(".yaml")).name.lower().removeprefix("cosmos3"))
        # Also `h100_x8` for `8xH100`, and the name of another tool.
        words = [word, re.sub(r"^(\d+)x(.+)$", r"\2x\1", word), *map(_folded, _words_of(names[0])[1:])]

        def exact(where: str) -> str | None:
            known = {_folded(option): option for option in self._groups[where]}
            return next((known[each] for each in words if each in known), None)

        options = self._groups.get(group, ())
        if group in self._groups and (option := exact(group)):
            return (f"{group}={option}",)
        if begins := [option for option in options if len(word) > 2 and _folded(option).startswith(word)]:
            return (f"{group}={nearest(word, begins) or begins[0]}",)
        below = [other for other in self._groups if group and other.startswith(f"{group}/") and exact(other)]
        anywhere = [other for other in self._groups if "/" not in other and exact(other)]
        for other in [*below[:1], *(anywhere if len(anywhere) == 1 else [])]:
            return (f"{other}={exact(other)}",)
        for where in (group, above):
            if (near := nearest(word, self._groups.get(where, ()))) is not None:
                return (f"{where}={near}",)
        return None


def _several(text: str) -> str | None:
    """How several numbers are swept over: `range(1,6)` for `1-5`, and `1,2` for `[1,2]`."""
    if match := re.fullmatch(r"(\d+)(?:-|\.\.+|:)(\d+)", text):
        first, last = int(match[1]), int(match[2])
        return f"range({first},{last + 1})" if first <= last else f"range({first},{last - 1},-1)"
    match = re.fullmatch(r"\[([\d.,\s]+)\]", text)
    return re.sub(r"\s", "", match[1]) if match else None


def _words_of(value: str) -> list[str]:
    """`value` in lower case with underscores, and what it means if it is the word of another tool."""
    word = re.sub(r"[-\s]+", "_", value.strip().lower())
    return [word, OTHER_VALUES[word]] if word in OTHER_VALUES else [word]


def cannot_take(key: str, value: str) -> bool:
    """Whether `value` means no name that `key` takes, or is a truth value for a key that takes others."""
    kind = kind_of(key)
    if kind is None or kind.is_node:
        return False
    if kind.names:
        return written(kind, value, key) is None
    return kind.hint is not bool and value.lower() in ("true", "false")


def written(kind: Kind, text: str, key: str, fps: float = USUAL_FPS) -> str | None:
    """How the value `text` is written for a key of this kind, such as [2,2] for `2,2`; None if it cannot be."""
    text = text.strip()
    if text == "None" and kind.optional:
        return "null"
    bare = text.rstrip(",;").strip("\"' ")
    if typing.get_origin(kind.hint) is list:
        inner = typing.get_args(kind.hint)[0]
        if dataclasses.is_dataclass(inner):
            first = dataclasses.fields(inner)[0].name
            override = parsed(f"{first}={bare}") if bare and kind_of(f"{key}[0].{first}") else None
            is_text = override is not None and isinstance(override.value(), str)
            return f"[{{{first}:{bare}}}]" if is_text else None
        words = re.split(r"[,;x\s]+" if inner in (int, float) else r"[,;\s]+", bare.strip("[](){} "))
        made = [written(Kind(inner, False, {}), word, key) for word in words if word]
        return None if None in made or not made else f"[{','.join(map(str, made))}]"
    if names := kind.names:
        words = _words_of(bare.rpartition(".")[2])
        return next((word for word in words if word in names), None) or nearest(words[-1], names)
    if kind.hint is bool:
        low = bare.lower()
        return "true" if low in _TRUE else "false" if low in _FALSE else nearest(low, ("true", "false"))
    if kind.hint in (int, float):
        return _number(kind, bare, key, fps)
    if kind.hint is str:
        if text.startswith("~/"):
            text = os.path.expanduser(text)
        override = parsed(f"{key}={text}")
        if override is not None and not override.is_sweep_override() and fits(kind, override.value()):
            return text
        return text_argument(key, text)
    return None


def _number(kind: Kind, text: str, key: str, fps: float) -> str | None:
    if text.lower() == "random" and kind.hint is int:
        return str(_drawn(kind.limits.get("at_least", 0), min(kind.limits.get("at_most", 2**31), 2**31)))
    if re.fullmatch(r"\d{1,3}([,_ ]\d{3})+", text):
        text = re.sub(r"[,_ ]", "", text)
    if kind.hint is float:
        text = re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", text)
    if re.fullmatch(r"[\dOolI]*\d[\dOolI]*|[Oo]", text):  # letters that look like digits
        text = text.translate(str.maketrans("OolI", "0011"))
    if fraction := re.fullmatch(r"(\d+)/([1-9]\d*)", text):  # as a container states a frame rate
        text = f"{int(fraction[1]) / int(fraction[2]):g}"
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([a-zA-Z%]*)", text)
    if match is None:
        return None
    number = float(match[1]) * (1000 if match[2] in ("k", "K") else 1)
    if not math.isfinite(number):
        return None
    if key == "task.num_frames" and match[2].lower() in ("s", "sec", "secs", "seconds"):
        number = round(number * fps) // 4 * 4 + 1  # a clip has 4 n + 1 frames
    if kind.hint is int:
        return str(round(number))
    return f"{number:g}"


@cache
def _drawn(low: int, high: int) -> int:
    """A number that stays the same in all parts of an answer."""
    return random.randint(low, high)


def _is_bare(word: str) -> bool:
    return "=" not in word


def _folded(name: str) -> str:
    return re.sub(r"[-_.\s]", "", name.lower())
