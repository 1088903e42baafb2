"""Tell a rename from a removal and an addition, for keys of the schema and for options of groups."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cosmos3_pipeline.review.report import ABSENT

Config = Mapping[str, Any]


def renamed_keys(pairs: Sequence[tuple[Config, Config]]) -> dict[str, str]:
    """Old name -> new name of renamed keys, from the configs of many cases.

    A removed and an added key are taken for one key if their names are alike: they have the same last part, or
    each is the only such key of their node and the spelling is similar. They are also taken for one if they are in
    the same node and have the same value in at least half of the cases.
    """
    before = {key for old, _ in pairs for key in old}
    after = {key for _, new in pairs for key in new}
    gone, came = sorted(before - after), sorted(after - before)
    candidates = []
    for old_key in gone:
        having = [(old[old_key], new) for old, new in pairs if old_key in old]
        for new_key in came:
            agree = sum(new.get(new_key, ABSENT) == value for value, new in having) / len(having)
            related = _related(old_key, new_key, gone, came)
            if related >= 1 or (agree >= 0.5 and related > 0):
                candidates.append((agree + related, old_key, new_key))
    found: dict[str, str] = {}
    for _, old_key, new_key in sorted(candidates, key=lambda c: (-c[0], c[1], c[2])):
        if old_key not in found and new_key not in found.values():
            found[old_key] = new_key
    return found


def _related(old: str, new: str, gone: Sequence[str], came: Sequence[str]) -> float:
    """How much two names have in common. Names with 1 or more are the same key, whatever its values."""
    old_node, _, old_leaf = old.rpartition(".")
    new_node, _, new_leaf = new.rpartition(".")
    if old_leaf == new_leaf:
        return 1 + _likeness(old_node, new_node)
    if old_node != new_node:
        return 0.0
    likeness = _likeness(old_leaf, new_leaf)
    alone = all(sum(k.rpartition(".")[0] == old_node for k in keys) == 1 for keys in (gone, came))
    return 1 + likeness if alone and likeness >= 0.5 else 0.5 * likeness + 0.1


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def renamed_options(
    base: Mapping[str, Mapping[str, Any]], head: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """`group=old` -> `group=new` for options with another name or another group on the other side.

    At least half of the values that the option changes in the default run must be the same.
    """
    gone = [n for n, c in base.items() if "=" in n and n not in head and "config" in c]
    came = [n for n, c in head.items() if "=" in n and n not in base and "config" in c]
    candidates = []
    for old in gone:
        for new in came:
            alike = _overlap(_own(base, old), _own(head, new))
            same_group, same_name = (a == b for a, b in zip(old.split("="), new.split("="), strict=True))
            if alike >= 0.5 and (same_group or same_name):
                candidates.append((alike + _likeness(old, new), old, new))
    found: dict[str, str] = {}
    for _, old, new in sorted(candidates, key=lambda c: (-c[0], c[1], c[2])):
        if old not in found and new not in found.values():
            found[old] = new
    return found


def _own(survey: Mapping[str, Mapping[str, Any]], name: str) -> set[str]:
    """The values that an option changes in the default run, by last part of the key: a node may be renamed."""
    default = survey.get("default", {}).get("config", {})
    config: Config = survey[name]["config"]
    return {f"{k.rpartition('.')[2]}={v!r}" for k, v in config.items() if k not in default or default[k] != v}


def _overlap(a: Iterable[str], b: Iterable[str]) -> float:
    a, b = set(a), set(b)
    return len(a & b) / len(a | b) if a | b else 1.0
