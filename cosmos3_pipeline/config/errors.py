"""Errors a person can act on: what is wrong, why it cannot work, what would.

`explain` turns what Hydra and OmegaConf raise while composing into such a problem, with "did you mean".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# The nodes that hold a strategy's own settings, which the schema does not know.
STRATEGY_NODES = ("vae.encode", "vae.decode")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a composition: `what` (with keys and values in it), `why`, and `works` (what would).

    `set_by` says for each key in `what` which file or override set it, as far as that is known.
    """

    what: str
    why: str
    works: str
    set_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        set_by = f"\n  set:   {'; '.join(self.set_by)}" if self.set_by else ""
        return f"{self.what}{set_by}\n  why:   {self.why}\n  works: {self.works}"


class Refusal(ValueError):
    """A setting that cannot be honoured, found below the config: the three parts of a Problem, as an error."""

    def __init__(self, *, what: str, why: str, works: str) -> None:
        self.problem = Problem(what=what, why=why, works=works)
        super().__init__(str(self.problem))


class ConfigError(ValueError):
    """A composition that is refused before any work starts. Holds every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that a typo most likely meant, or None."""
    # one swapped pair of letters in a short name already costs a third of the likeness
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6 if len(word) < 5 else 0.75)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str) -> str:
    """`did you mean X?` for the nearest of `known`, or `otherwise` where nothing is near."""
    near = nearest(word, known)
    return f"did you mean {near}?" if near else otherwise


def unknown_key(key: str, known: Iterable[str], *, where: str = "") -> Problem:
    """A dotted key that the schema does not have, `where` naming the file or override that brought it.

    The nearest key is sought by the whole name and then by its last part, so that `task.promt` and
    `sampler.prompt` both find `task.prompt`; that of a strategy's setting among the settings that it has.
    """
    node, _, leaf = key.rpartition(".")
    known = [k for k in known if not key.startswith(f"{k}.")]
    if node in STRATEGY_NODES:
        known = [k for k in known if k.startswith(f"{node}.")]
    leaves = {k.rpartition(".")[2]: k for k in known}
    near = nearest(key, known) or leaves.get(nearest(leaf, leaves) or "")
    siblings = sorted({k[len(node) + 1 :].split(".")[0] for k in known if not node or k.startswith(f"{node}.")})
    listed = f"the keys of {node} are: {', '.join(siblings)}" if siblings and node else "see --cfg job"
    return Problem(
        what=f"unknown key {key}{where}",
        why="nothing reads it, so it would be ignored",
        works=f"did you mean {near}?" if near else listed,
    )


def explain(error: Exception, keys: Iterable[str], overrides: Sequence[str]) -> Problem | None:
    """The problem behind what Hydra or OmegaConf raised while composing `overrides`, or None when not theirs.

    `keys` are all dotted keys of the schema, for "did you mean".
    """
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, YAMLError):
        return Problem(what="a config file is not valid YAML", why=str(error), works="mending the line it names")
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = str(error)
    cause = f"{text}\n{error.__cause__ or ''}"
    where = _where(text, overrides)
    if match := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        group = match.group(1).split("@")[0]
        return Problem(
            what=f"unknown key or group {group}{where}",
            why="no config group and no key has this name",
            works=did_you_mean(group, [*keys, *_groups(keys)], otherwise="see --help for the groups"),
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match.group(1), keys, where=where)
    if match := re.search(r"Key '[^']+' not in|Key '[^']+' is not in struct", cause):
        full = re.search(r"full_key: (\S+)", cause)
        return unknown_key(full.group(1) if full else match.group(0), keys, where=where)
    if match := re.search(r"(Value .+? (?:of type .+? )?(?:could not be|is not).+|Invalid value .+)", cause):
        full = re.search(r"full_key: (\S+)", cause)
        key = full.group(1) if full else "a key"
        allowed = re.search(r"expected one of \[(.+?)\]", cause)
        return Problem(
            what=f"{key} has a value of the wrong type{where}",
            why=match.group(1).rstrip("."),
            works=f"one of {allowed.group(1)}" if allowed else "a value of the type that --cfg job shows",
        )
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.+)'", text):
        key, value = match.groups()
        return Problem(
            what=f"{key} has a comma in it",
            why="outside -m a comma could mean a list, a sweep or a text",
            works=f"quoted twice, once for the shell: '{key}=\"{value}\"'",
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


def _missing_option(error: MissingConfigException) -> Problem:
    name = error.missing_cfg_file or ""
    group, _, option = name.rpartition("/")
    options = [o for o in error.options or [] if not o.startswith("_")]
    if group == "_strategy":
        return Problem(
            what=f"the strategy plugin {option} is not available",
            why="no installed package declares it, or it failed to import",
            works="installing the package that provides it; `cosmos3 plugins` lists what is found",
        )
    return Problem(
        what=f"{group or 'config'}={option} does not exist",
        why=f"the options of {group} are: {', '.join(options)}" if options else f"no file provides {name}",
        works=did_you_mean(option, options, otherwise=f"one of {', '.join(options)}" if options else "see --help"),
    )


def _where(text: str, overrides: Sequence[str]) -> str:
    """` (in conf/model/toy.yaml)` or ` (from the override x=y)`, as far as Hydra's message tells."""
    if match := re.search(r"In '([^']+)'", text):
        return f" (in {match.group(1)}.yaml)"
    if match := re.search(r"Error merging override (.+)", text):
        return f" (from {match.group(1).strip()})"
    if match := re.search(r"Could not override '([^']+)'", text):
        mine = [o for o in overrides if o.lstrip("+~").startswith(match.group(1))]
        return f" (from {mine[0]})" if mine else ""
    return ""


def _groups(keys: Iterable[str]) -> list[str]:
    return sorted({k.split(".")[0] for k in keys})
