"""Tell a rename from a removal and an addition, for keys of the schema and for files."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence, Set
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


def best_matches(candidates: Iterable[tuple[float, str, str]]) -> dict[str, str]:
    """Old name -> new name, from (likeness, old, new). The most alike are taken first, and each name once.

    At least half of what two files say must be the same for a rename.
    """
    found: dict[str, str] = {}
    for likeness, old, new in sorted(candidates, key=lambda c: (-c[0] - _likeness(c[1], c[2]), c[1], c[2])):
        if likeness >= 0.5 and old not in found and new not in found.values():
            found[old] = new
    return found


def alike(a: Set[str], b: Set[str]) -> float:
    """The share of what two sets have in common."""
    return len(a & b) / len(a | b) if a | b else 1.0
