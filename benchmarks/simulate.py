"""The tables of docs/simulation.md: decoding the clip of sglang's pull request 27037 on H200s that are not there.

    python benchmarks/simulate.py [--costs bench.json]

A simulation, from data sheets and one published time; nothing here runs on a GPU. Takes some seconds and no torch.
`--costs` takes the op seconds of a report of `job=bench bench.width=full` instead of those measured for the docs,
which were on CPU too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.vae.plugins import discover
from cosmos3_pipeline.config.schema import Dtype
from cosmos3_pipeline.plan.geometry import clip_of
from cosmos3_pipeline.plan.hardware import accelerator_of
from cosmos3_pipeline.plan.simulation import (
    EstimatedCosts,
    Link,
    MeasuredCosts,
    Nodes,
    OpCosts,
    simulate,
)
from cosmos3_pipeline.vae.program import program_for
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.strategy import StrategyError

SERIAL_S, PARALLEL_S, PARALLEL_RANKS = 8.93, 5.203, 4  # published: decode on one H200, and sglang's on four
RANKS = (1, 2, 4, 8, 16)
NODE_RANKS = 8
STRATEGIES = ("layer_pipeline", "spatial_shard", "pipeline_of_shards")
OP_SECONDS = Path(__file__).with_name("op_seconds.json")


class Experiment:
    """The clip, its decoder, and the accelerator of `experiment=sglang_27037`."""

    def __init__(self) -> None:
        cfg = compose(["experiment=sglang_27037"]).typed()
        clip = clip_of(cfg)
        self.program = program_for("decode", plain(cfg.model.vae))
        self.shape = LatentShape(1, clip.latent_frames, clip.latent_rows, clip.latent_cols, element_bytes=2)
        self.accelerator = accelerator_of(cfg)
        self.link = Link(self.accelerator.latency_s, self.accelerator.link_bytes_per_s)
        self.network = Link(self.accelerator.latency_s, self.accelerator.network_bytes_per_s)

    def estimated(self, fixed_share: float = 0.0) -> OpCosts:
        """Op costs by the data sheet, in shares; one rank takes the published time."""
        costs = EstimatedCosts(self.program, self.shape, self.accelerator, Dtype.bfloat16, fixed_share=fixed_share)
        return costs.scaled_to(SERIAL_S, self.shape)

    def measured(self, report: Mapping[str, Any]) -> OpCosts:
        """Op costs in shares as on the machine of a bench report; one rank takes the published time.

        Of the largest latents that it has, as a whole: what is fixed on a slab of a few rows is nothing on 720p.
        Raises ValueError for a report of another VAE.
        """
        if program_for("decode", report["vae"]) != self.program:
            raise ValueError(
                f"op seconds of a VAE with decoder_base_dim={report['vae']['decoder_base_dim']}; the "
                "experiment's is another, whose ops take other shares of the time; give a report of job=bench "
                "with bench.width=full"
            )
        cases = report["costs"]["cases"].values()
        case = max(cases, key=lambda case: case["latent_rows"] * case["latent_cols"])
        samples = [(op["name"], op["rows"], op["first_s"], op["later_s"]) for op in case["ops"]]
        whole = [sample for sample in samples if sample[1] == case["latent_rows"]]
        return MeasuredCosts(self.program, whole).scaled_to(SERIAL_S, self.shape)

    def run(
        self, name: str, ranks: int, costs: OpCosts, *, slower: float = 1.0, overlaps: bool = True
    ) -> float | None:
        """Simulated seconds; None for a number of ranks that the strategy refuses. `slower`: times the latency."""
        strategy = discover().strategies[name]()
        try:
            plan = strategy.plan(self.program, self.shape, ranks)
        except StrategyError:
            return None
        link, network = (replace(x, latency_s=slower * x.latency_s) for x in (self.link, self.network))
        nodes = Nodes(NODE_RANKS, network)
        return simulate(self.program, self.shape, plan, costs, link, nodes=nodes, overlaps=overlaps).seconds

    def fixed_share_of_sglang(self) -> float:
        """The fixed share with which `spatial_shard` on four ranks takes as long as sglang's parallel decode."""
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            seconds = self.run("spatial_shard", PARALLEL_RANKS, self.estimated(middle))
            assert seconds is not None
            low, high = (low, middle) if seconds > PARALLEL_S else (middle, high)
        return round(middle, 2)


def expected(experiment: Experiment) -> list[list[str]]:
    """Seconds of each strategy by ranks, and beside them what was published."""
    costs = experiment.estimated()
    rows = [["ranks", *STRATEGIES, "published: serial, sglang's parallel"]]
    published = {1: f"{SERIAL_S}", PARALLEL_RANKS: f"{PARALLEL_S}"}
    for ranks in RANKS:
        seconds = [experiment.run(name, ranks, costs) for name in STRATEGIES]
        rows.append([f"{ranks}", *map(_speed, seconds), published.get(ranks, "")])
    return rows


def uncertain(experiment: Experiment, report: Mapping[str, Any]) -> list[list[str]]:
    """The same on four and eight ranks, one assumption changed at a time, and the range of them all."""
    base, fixed = experiment.estimated(), experiment.fixed_share_of_sglang()
    variants: list[tuple[str, OpCosts, dict[str, Any]]] = [
        ("as above", base, {}),
        ("op shares as measured on a CPU", experiment.measured(report), {}),
        ("latency x 2", base, {"slower": 2.0}),
        ("latency x 10", base, {"slower": 10.0}),
        ("messages not overlapped", base, {"overlaps": False}),
        ("a tenth of each op does not shrink with its slab", experiment.estimated(0.1), {}),
        (f"so much of it that spatial_shard is sglang's ({fixed:.0%})", experiment.estimated(fixed), {}),
    ]
    columns = [(name, ranks) for ranks in (PARALLEL_RANKS, 2 * PARALLEL_RANKS) for name in STRATEGIES]
    found = [[experiment.run(*column, costs, **how) for column in columns] for _, costs, how in variants]
    rows = [["changed", *(f"{name}, {ranks}" for name, ranks in columns)]]
    rows += [[what, *map(_seconds, row)] for (what, _, _), row in zip(variants, found, strict=True)]
    ranges = [[s for s in column if s is not None] for column in zip(*found, strict=True)]
    return [*rows, ["range", *(f"{min(each):.2f}-{max(each):.2f}" for each in ranges)]]


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


def _speed(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} ({SERIAL_S / seconds:.1f}x)"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first of `rows` are its headings."""
    heading, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([heading, f"|{'---|' * len(rows[0])}", *body])


def tables(report: Mapping[str, Any]) -> str:
    """Both tables, as they stand in the docs. `report`: bench.json of a run that measured op costs."""
    experiment = Experiment()
    return f"{markdown(expected(experiment))}\n\n{markdown(uncertain(experiment, report))}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, help="bench.json of job=bench")
    given = parser.parse_args()
    print(tables(json.loads((given.costs or OP_SECONDS).read_text())))
