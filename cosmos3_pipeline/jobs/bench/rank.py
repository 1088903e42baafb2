"""One rank of `job=bench`: join the world, run the cases one after the other, and write the report on the root."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from rich.console import Console

from cosmos3_pipeline.config.plain import plain as plain_values
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.distributed.launch import joined_world
from cosmos3_pipeline.jobs.bench import MARKDOWN_FILE, OP_SECONDS_FILE, REPORT_FILE
from cosmos3_pipeline.jobs.bench.contestants import Factory
from cosmos3_pipeline.jobs.bench.costs import OpSeconds
from cosmos3_pipeline.jobs.bench.given import given_for
from cosmos3_pipeline.jobs.bench.judge import judge
from cosmos3_pipeline.jobs.bench.machine import machine, pinned
from cosmos3_pipeline.jobs.bench.messages import link_costs
from cosmos3_pipeline.jobs.bench.plots import draw
from cosmos3_pipeline.jobs.bench.simulated import simulated
from cosmos3_pipeline.jobs.bench.suite import Case, cases_of
from cosmos3_pipeline.jobs.bench.tables import markdown
from cosmos3_pipeline.jobs.bench.trial import Trial
from cosmos3_pipeline.jobs.bench.weights import Autoencoders
from cosmos3_pipeline.jobs.bench.world import World
from cosmos3_pipeline.jobs.rank import digest_of, everyones, refuse_other_configs
from cosmos3_pipeline.stages.files import write_whole
from cosmos3_pipeline.stages.progress import Advance, Bars, Reporter, Silent
from cosmos3_pipeline.vae.program import program_for

SCHEMA_VERSION = 1


def bench_rank(config: Config, dimensions: dict[str, Any], output: str | None) -> None:
    """Run the benchmark of `config` on a VAE of `dimensions`, as the rank of the environment.

    `output` is where the root writes; ranks that compose for themselves under torchrun pass None.
    """
    diffusers_logging.set_verbosity_error()
    plain = plain_values(config)
    topology, bench = plain["topology"], plain["bench"]
    threads = topology["threads_per_rank"]
    with (
        pinned(threads if topology["device"] == "cpu" else 0) as cores,
        joined_world(device=topology["device"], threads=threads) as device,
        torch.no_grad(),
    ):
        agreed = everyones((output, digest_of(config)))
        refuse_other_configs([digest for _, digest in agreed])
        world = World.join(device)
        about = machine(device, threads, everyones(cores), everyones(world.comm.reads_memory))
        reporter: Reporter = Bars(Console(stderr=True)) if world.is_root else Silent()
        cases = cases_of(bench)
        with reporter.track("benchmark", sum(units(case, bench) for case in cases)) as advance:
            folder = Path(str(agreed[0][0]))
            autoencoders = Autoencoders(dimensions, device)
            work = Bench(plain, dimensions, world, autoencoders, advance, folder)
            link = link_costs(world)
            measured: dict[str, dict[str, Any]] = {}
            for case in cases:
                measured[case.name] = work.run(case)
                if world.is_root:
                    # After each: who ends a run early keeps what it has measured so far.
                    costs = {"direction": "decode", "dtype": "float32", "link": link, "cases": work.costs}
                    report = report_of(
                        plain, dimensions, world.comm.size, about, cases, measured, costs, work.divided_by
                    )
                    _write(report, folder)


def report_of(
    plain: Mapping[str, Any],
    dimensions: Mapping[str, Any],
    ranks: int,
    about: Mapping[str, Any],
    cases: Sequence[Case],
    measured: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Any],
    op_seconds: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """For bench.json: what was `measured`, by the name of the case, which need not be all of `cases` yet.

    `op_seconds`: by the name of the case the file by which contestants were divided that can be.
    """
    report = {
        "schema_version": SCHEMA_VERSION,
        "width": plain["bench"]["width"],
        "vae": dimensions,
        "rounds": plain["bench"]["rounds"],
        "ranks": ranks,
        "machine": about,
        "targets": [verdict.as_dict() for verdict in judge(cases, measured)],
        "cases": measured,
        "not_run": [case.name for case in cases if case.name not in measured],
        "costs": costs,
    }
    return {**report, "simulated": simulated(cases, plain, report, op_seconds)}


def _write(report: Mapping[str, Any], directory: Path) -> None:
    """The report; with its plots when all of it is there."""
    write_whole(directory / REPORT_FILE, json.dumps(report, indent=2))
    write_whole(directory / MARKDOWN_FILE, markdown(report))
    if not report["not_run"]:
        draw(report, directory)


def units(case: Case, bench: Mapping[str, Any]) -> int:
    """The runs of all contestants, and one for the seconds of the ops: what the progress bar counts."""
    return len(case.contestants) * runs(case, bench) + 1


def runs(case: Case, bench: Mapping[str, Any]) -> int:
    """How often each contestant runs after its warm-up: in the fewest rounds, and to count its memory."""
    return 1 + int(bench["rounds"]) * case.timed


def _costs_of(case: Case, seconds: OpSeconds) -> dict[str, Any]:
    """For bench.json."""
    return {"latent_rows": case.shape.rows, "latent_cols": case.shape.cols, **seconds.costs()}


@dataclass
class Bench:
    """Runs cases one after the other; all ranks call it together. `costs` has the seconds of ops, by case.

    folder: where seconds of ops are written that are measured before a case, for strategies that divide by them.
    divided_by: those files, by case.
    """

    plain: Mapping[str, Any]
    dimensions: Mapping[str, Any]
    world: World
    autoencoders: Autoencoders
    advance: Advance
    folder: Path
    costs: dict[str, Any] = field(default_factory=dict)
    divided_by: dict[str, str] = field(default_factory=dict)

    def run(self, case: Case) -> dict[str, Any]:
        """What the case measured, whole on the root."""
        bench = self.plain["bench"]
        self.autoencoders.keep_only(getattr(torch, case.dtype))
        seconds, rounds = None, math.ceil(bench["rounds"] / 2)
        if bench["costs"] and case.simulated:
            # Before and after the contestants: beside them there is no memory for so much more at full width.
            seconds = OpSeconds(self.dimensions, self.autoencoders, self.world, case.shape)
            seconds.take(rounds)
            self._share(case, seconds)
        report = self._tried(case)
        gc.collect()  # the contestants' modules refer to themselves, and what comes next needs their memory
        if seconds is not None:
            seconds.take(rounds)
            self.costs[case.name] = _costs_of(case, seconds)
        self.advance()
        return report

    def _share(self, case: Case, seconds: OpSeconds) -> None:
        """Write what the ops took, and note where if every rank can read it, on whatever machine it is.

        A file for each case, which stays: bench.json will have what was measured after the case too.
        """
        path = self.folder / OP_SECONDS_FILE.format(case=case.name)
        costs = {"cases": {case.name: _costs_of(case, seconds)}}
        if self.world.is_root:
            write_whole(path, json.dumps({"vae": self.dimensions, "costs": costs}, indent=2))
        self.world.wait()
        if all(self.world.comm.agree(path.exists())):
            self.divided_by[case.name] = str(path)

    def _tried(self, case: Case) -> dict[str, Any]:
        """What the contestants did. Nothing of them is held afterwards: at full width each has gigabytes."""
        bench = self.plain["bench"]
        with TemporaryDirectory(prefix="cosmos3_bench_") as folder:
            given = given_for(case, program_for(case.direction, self.dimensions), Path(folder), self.world.device)
            factory = Factory(
                case,
                self.plain,
                self.dimensions,
                self.autoencoders,
                self.world,
                self.divided_by.get(case.name, ""),
            )
            trial = Trial(case, factory, given)
            self.advance(trial.absent * runs(case, bench))
            if case.timed:
                trial.rounds(bench["rounds"], bench["seconds"], self.advance)
            trial.once_more(self.advance)
            return trial.report()
