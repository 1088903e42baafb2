"""Estimates by the clock the seconds of each strategy on ranks that are not there, and the CPU cost of planning.

    python benchmarks/simulate.py                                             # sglang's 27037 on 1 to 16 H200
    python benchmarks/simulate.py --ranks 72 --strategies spatial_shard --trace trace.json    # for Perfetto
    python benchmarks/simulate.py experiment=sglang_27037 task.num_frames=61 --costs outputs/bench/vae.json

Nothing runs on an accelerator. By default an op takes the time of its FLOPs or of its memory traffic by the data
sheet in conf/topology, whichever is longer. With --costs it takes its measured share of the time. --serial sets
the seconds of one rank for the clip. Its default is 8.93 s, published for that experiment. docs/plan.md says what
the clock leaves out. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.planning.geometry import clip_of
from cosmos3_pipeline.planning.hardware import vae_rates
from cosmos3_pipeline.plugin_api import (
    Assignment,
    LatentShape,
    Program,
    RooflineCosts,
    StrategyError,
    discover,
)
from cosmos3_pipeline.vae.account import account_repeated
from cosmos3_pipeline.vae.clock import Links, OpCosts, timeline
from cosmos3_pipeline.vae.lowering import lower, lower_repeated
from cosmos3_pipeline.vae.ops import WHOLE, Sides
from cosmos3_pipeline.vae.program import program_for

SERIAL_S = 8.93  # published: the decode of experiment=sglang_27037 on one H200


class MeasuredCosts:
    """Seconds of ops from a report of benchmarks/vae.py, in proportion to rows, times `factor`.

    costs: the costs of one case of the report.
    """

    def __init__(self, costs: Mapping[str, Any], factor: float = 1.0) -> None:
        self._rows: int = costs["latent_rows"]
        self._whole: dict[bool, list[float]] = {
            first: [factor * op["first_s" if first else "later_s"] for op in costs["alone"]]
            for first in (True, False)
        }

    def seconds(self, op: int, rows: float, sides: Sides = WHOLE, *, first: bool) -> float:
        """As `clock.OpCosts.seconds`."""
        return self._whole[first][op] * rows / self._rows


def clip_seconds(
    program: Program, shape: LatentShape, assignment: Assignment, costs: OpCosts, links: Links | None
) -> float:
    """The seconds of a clip by the clock. Chunks that are alike are lowered once."""
    return lower_repeated(program, shape, assignment).total(lambda low: timeline(low, costs, links).seconds)


def serial_seconds(program: Program, shape: LatentShape, costs: OpCosts) -> float:
    """The seconds of one rank for the clip."""
    later = program.chunks(shape) - 1
    return sum(
        costs.seconds(op, shape.rows, first=True) + later * costs.seconds(op, shape.rows, first=False)
        for op in range(len(program))
    )


class Experiment:
    """The clip of a composition, its decoder, and the accelerators for which it is estimated."""

    def __init__(self, overrides: list[str], node_ranks: int) -> None:
        cfg = compose(overrides).typed()
        clip = clip_of(cfg)
        self.program = program_for("decode", plain(cfg.model.vae))
        self.shape = LatentShape(
            1, clip.latent_frames, clip.latent_rows, clip.latent_cols, element_bytes=2, on_host=False
        )
        self._rates = replace(vae_rates(cfg), ranks_per_node=node_ranks)
        self.links: Links = self._rates.link

    def estimated(self, serial_s: float, fixed_share: float) -> OpCosts:
        """Costs by the data sheet, scaled so that one rank takes `serial_s`.

        `fixed_share` of an op's time does not shrink with its tile.
        """

        def costs(slower: float) -> OpCosts:
            rates = self._rates.flops_per_s / slower, self._rates.memory_bytes_per_s / slower
            return RooflineCosts(self.program, self.shape, *rates, fixed_share=fixed_share)

        return costs(serial_s / serial_seconds(self.program, self.shape, costs(1.0)))

    def measured(self, report: Mapping[str, Any], serial_s: float) -> OpCosts:
        """Costs in the proportions of the largest case of a report, scaled so that one rank takes `serial_s`.

        Raises ValueError if the report is of another VAE.
        """
        if program_for("decode", report["vae"]) != self.program:
            raise ValueError(
                f"op seconds of a VAE with decoder_base_dim={report['vae']['decoder_base_dim']}; the composition "
                "has another, whose ops take other shares of the time; run benchmarks/vae.py --width full"
            )
        case = max(report["costs"]["cases"].values(), key=lambda case: case["latent_rows"] * case["latent_cols"])
        whole = {**case, "latent_rows": self.shape.rows}  # the measured seconds count for the whole picture
        return MeasuredCosts(whole, serial_s / serial_seconds(self.program, self.shape, MeasuredCosts(whole)))

    def row(self, name: str, ranks: int, costs: OpCosts) -> list[str]:
        """One line of the table."""
        began = time.process_time()
        try:
            assignment = discover().strategies[name]().assign(self.program, self.shape, ranks)
        except StrategyError as error:
            return [name, str(ranks), f"refused: {error.problem.what}", *[""] * 5]
        marks = [began, time.process_time()]
        clip = lower_repeated(self.program, self.shape, assignment)
        marks.append(time.process_time())
        tallies = account_repeated(clip)
        marks.append(time.process_time())
        seconds = clip.total(lambda low: timeline(low, costs, self.links).seconds)
        marks.append(time.process_time())
        serial = serial_seconds(self.program, self.shape, costs)
        took = [f"{b - a:.2f}" for a, b in pairwise(marks)]
        peak = max(tally.peak_bytes + tally.weight_bytes for tally in tallies)
        return [name, str(ranks), f"{seconds:.3f} ({serial / seconds:.1f}x)", f"{peak / 1e9:.2f}", *took]


def main() -> None:
    """Print the table, and write a trace with --trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["experiment=sglang_27037"], help="a composition of conf")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    names = ["layer_pipeline", "spatial_shard", "pipeline_of_shards"]
    parser.add_argument("--strategies", nargs="+", default=names, choices=sorted(discover().strategies))
    parser.add_argument("--node-ranks", type=int, default=8, help="ranks of a node; between nodes is the network")
    parser.add_argument("--serial", type=float, default=SERIAL_S, help="seconds of one rank for the whole clip")
    parser.add_argument(
        "--fixed-share", type=float, default=0.0, help="of an op that does not shrink with its tile"
    )
    parser.add_argument(
        "--costs", type=Path, help="vae.json of benchmarks/vae.py, for the ops' shares of the time"
    )
    parser.add_argument("--trace", type=Path, help="a file for Perfetto: the last strategy on the most ranks")
    given = parser.parse_args()
    experiment = Experiment(given.overrides, given.node_ranks)
    costs = experiment.estimated(given.serial, given.fixed_share)
    if given.costs:
        costs = experiment.measured(json.loads(given.costs.read_text()), given.serial)
    heading = [
        "strategy",
        "ranks",
        "seconds",
        "peak GB",
        "assign CPU s",
        "lower CPU s",
        "account CPU s",
        "clock CPU s",
    ]
    print(f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    for name in given.strategies:
        for ranks in given.ranks:
            print(f"| {' | '.join(experiment.row(name, ranks, costs))} |", flush=True)
    if given.trace:
        strategy = discover().strategies[given.strategies[-1]]()
        assignment = strategy.assign(experiment.program, experiment.shape, max(given.ranks))
        lowered = lower(experiment.program, experiment.shape, assignment)
        traced = timeline(lowered, costs, experiment.links, events=True)
        given.trace.write_text(json.dumps(traced.trace()))


if __name__ == "__main__":
    main()
