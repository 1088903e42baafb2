"""Costs of ops that were measured on a machine, from a report of `benchmarks/vae.py`.

The model in `costs` was fitted to one kind of processor. On a processor with faster arithmetic and the same
memory, the ranks with the early ops would be busy longer than the others, because early ops have most of the
weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cosmos3_pipeline.vae.costs import ChunkCosts, op_costs
from cosmos3_pipeline.vae.program import Program, program_for
from cosmos3_pipeline.vae.strategy import StrategyError

_REMEDY = "run benchmarks/vae.py on this machine with this VAE's width, and give its vae.json"


@dataclass(frozen=True)
class OpSeconds:
    """Measured seconds of each op of `program`, by the number of latent pixels. `digest` identifies the report."""

    program: Program
    by_pixels: dict[int, ChunkCosts]
    digest: str

    def costs(self, program: Program, pixels: int, element_bytes: int) -> ChunkCosts:
        """Seconds of each op on chunks of `pixels` latent pixels.

        They are the seconds of the nearest measured size, scaled by the model's ratio between both sizes. Raises
        StrategyError for a program or element size without measurements.
        """
        if program.direction != "decode":
            raise StrategyError(
                "layer_pipeline.op_seconds for encode",
                "benchmarks/vae.py measures the ops of the decoder only",
                "leave it empty for encode",
            )
        if element_bytes != 4:
            raise StrategyError(
                f"layer_pipeline.op_seconds for elements of {element_bytes} bytes",
                "benchmarks/vae.py measures ops in float32 only; other dtypes take other shares of the time",
                "leave it empty, or decode in float32",
            )
        if program != self.program:
            raise StrategyError(
                f"layer_pipeline.op_seconds of a decoder with {len(self.program)} ops and "
                f"{self.program.weight_elements():,} weights",
                f"this one has {len(program)} and {program.weight_elements():,}, which take other shares of the "
                "time",
                f"{_REMEDY}",
            )
        nearest = min(self.by_pixels, key=lambda measured: (abs(math.log(measured / pixels)), measured))
        there, here = (op_costs(program, size) for size in (nearest, pixels))
        # An op to which the model gives no time keeps its measured time for every size.
        return ChunkCosts(
            *(
                tuple(s * (b / a if a else 1.0) for s, a, b in zip(seconds, modelled, wanted, strict=True))
                for seconds, modelled, wanted in zip(self.by_pixels[nearest], there, here, strict=True)
            )
        )


def op_seconds(path: str) -> OpSeconds:
    """The op seconds of the report at `path`. Raises StrategyError if the file has none."""
    try:
        written = Path(path).read_bytes()
    except OSError as error:
        raise StrategyError(
            f"layer_pipeline.op_seconds={path!r} cannot be read ({error.strerror})",
            "the ops are divided by the times in this file",
            f"{_REMEDY}",
        ) from None
    try:
        return _parsed(written)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StrategyError(
            f"layer_pipeline.op_seconds={path!r} has no seconds of ops ({type(error).__name__}: {error})",
            "a vae.json has them of each float32 decode, unless it was told --no-costs",
            f"{_REMEDY}",
        ) from None


@cache
def _parsed(written: bytes) -> OpSeconds:
    report = json.loads(written)
    program = program_for("decode", report["vae"])
    found = {}
    for case in report["costs"]["cases"].values():
        ops = case["alone"]
        if [op["name"] for op in ops] != [op.name for op in program.ops]:
            raise ValueError("its ops are not those of its VAE")
        first, later = (tuple(float(op[key]) for op in ops) for key in ("first_s", "later_s"))
        if not all(0 < seconds < math.inf for seconds in (*first, *later)):
            raise ValueError("some of its ops took no time, or no number of seconds")
        found[case["latent_rows"] * case["latent_cols"]] = ChunkCosts(first, later)
    if not found:
        raise ValueError("no case measured them")
    return OpSeconds(program, found, hashlib.sha256(written).hexdigest())
