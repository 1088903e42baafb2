"""`cosmos3 blame`: which file or override set the value of a key, and which earlier values it replaced."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from cosmos3_pipeline.config.arguments import Arguments
from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.kinds import schema_keys
from cosmos3_pipeline.config.provenance import Link, Provenance
from cosmos3_pipeline.errors import ConfigError, did_you_mean

USAGE = 3

DESCRIPTION = """\
Which file or override set the value of KEY, and what each file of the defaults list had offered before it.

  cosmos3 blame sampler.steps
  cosmos3 blame vae.parallel_decode topology=h200_x4
  cosmos3 blame topology experiment=sglang_27037       every key of a node
"""


def main(arguments: Sequence[str]) -> int:
    """Run `cosmos3 blame` with `arguments`; returns the exit code: 0, or 3 if there is no such key."""
    parser = Arguments("cosmos3 blame", DESCRIPTION, usage=USAGE)
    parser.add_argument("key", help="a key such as sampler.steps, or a node such as topology")
    parser.add_argument("overrides", nargs="*", help="as for a run")
    asked = parser.parse(arguments)
    try:
        traced = compose(asked.overrides).traced()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    assert traced is not None
    keys = [key for key in traced.keys if key == asked.key or key.startswith(f"{asked.key}.")]
    if not keys:
        hint = did_you_mean(asked.key, schema_keys(), otherwise="see --cfg job for all keys")
        print(f"cosmos3 blame: nothing sets {asked.key}; {hint}", file=sys.stderr)
        return USAGE
    for key in keys:
        print("\n".join(explain(traced, key, traced.value(key))))
    return 0


def explain(traced: Provenance, key: str, value: Any) -> list[str]:
    """The lines that tell where the `value` of `key` comes from. The deciding file is in the first line."""
    chain = traced.chain(key)
    lines = [f"{key} = {_words(value)}   set by {chain[-1].winner.place}"]
    for link in chain:
        if link is not chain[0]:
            lines.append(f"  which refers to {link.key}")
        lines += _offers(link)
    return lines


def _offers(link: Link) -> list[str]:
    """The lines of a link's offers: the winner, then the values that it replaced, the latest first."""
    lines = []
    for offer in reversed(link.offers):
        because = f"   (chosen by {offer.because})" if offer.because else ""
        mark = "  ->" if offer is link.winner else "    "
        lines.append(f"{mark} {_words(offer.value):24} {offer.place}{because}")
    return lines


def _words(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=lambda other: getattr(other, "value", str(other)))
