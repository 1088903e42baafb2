"""What keeps a benchmark from being run, all of it before any work starts. Imports no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import BenchConfig, Config, Dtype, JobName
from cosmos3_pipeline.errors import Problem, did_you_mean
from cosmos3_pipeline.jobs.bench.suite import (
    BUILT_IN,
    CALLS,
    DIFFUSERS,
    MEASURES,
    RATIOS,
    build,
    cases_of,
    vae_dimensions,
)
from cosmos3_pipeline.plan.units import quantity
from cosmos3_pipeline.plan.vae import ELEMENT_BYTES
from cosmos3_pipeline.vae.builder import ProgramError
from cosmos3_pipeline.vae.plugins import discover
from cosmos3_pipeline.vae.program import Direction, Program, program_for
from cosmos3_pipeline.vae.strategy import StrategyError

# A rank holds the weights, each of its strategies' reordered copies, and those of the first chunk's fewer taps.
COPIES = 3


def problems(cfg: Config) -> Iterator[Problem]:
    """What keeps `bench` of a checked `cfg` from being done, or being read."""
    if cfg.job.name != JobName.bench:
        yield from _unread(cfg)
        return
    if cfg.topology.dp != 1:
        yield Problem(
            what=f"topology.dp={cfg.topology.dp} with job=bench",
            why="replicas each make a clip of their own; a benchmark has one",
            works="topology.dp=1",
        )
    bench = plain(cfg.bench)
    found = [*_names(bench), *(p for one in bench["suite"] for p in _definition(one, bench))]
    yield from found
    if not found:
        yield from _impossible(cfg, bench)


def _unread(cfg: Config) -> Iterator[Problem]:
    for key, default in vars(BenchConfig()).items():
        value = getattr(cfg.bench, key)
        if key != "suite" and value != default:
            yield Problem(
                what=f"bench.{key}={value} with job={cfg.job.name.value}",
                why="only job=bench reads it, so it would be ignored",
                works=f"job=bench, or no bench.{key}",
            )


def _names(bench: Mapping[str, Any]) -> Iterator[Problem]:
    """Cases and strategies that do not exist, or that are not enough."""
    named = [one["name"] for one in bench["suite"]]
    example = f"bench.cases=[{named[0]}]" if named else "bench=targets"
    for name, count in Counter(named).items():
        if count > 1:
            yield Problem(
                what=f"bench.suite has {count} cases with the name {name}",
                why="bench.cases chooses by name, and so do targets",
                works="another name for one of them",
            )
    for name in bench["cases"] or ():
        if name not in named:
            yield Problem(
                what=f"bench.cases has {name}",
                why=f"the cases are: {', '.join(named)}",
                works=did_you_mean(name, named, otherwise=example),
            )
    if bench["cases"] == [] or not named:
        yield Problem(
            what="job=bench without a case",
            why=f"bench.cases={bench['cases']}; the suite has {', '.join(named) or 'none'}",
            works=example,
        )
    for name in bench["strategies"] or ():
        if not _strategy(name):
            yield _unknown(name, "bench.strategies", ())


def _strategy(name: str) -> bool:
    return name in discover().strategies


def _unknown(name: str, where: str, others: Sequence[str]) -> Problem:
    known = (*others, *discover().strategies)
    why = discover().broken.get(name)
    return Problem(
        what=f"{where} has {name}",
        why=f"it is installed but broken: {why}" if why else f"known are: {', '.join(known)}",
        works=did_you_mean(name, known, otherwise="layer_pipeline"),
    )


def _definition(one: Mapping[str, Any], bench: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with a case as it is written."""
    where = f"the case {one['name']} of bench.suite"
    if bench["cases"] is not None and one["name"] not in bench["cases"]:
        return
    if one["call"] not in CALLS:
        yield Problem(
            what=f"{where} has call: {one['call']}",
            why=f"the calls are: {', '.join(CALLS)}",
            works=did_you_mean(one["call"], CALLS, otherwise=f"call: {CALLS[0]}"),
        )
    for key in ("small", "full"):
        if len(one[key]) != 2 or min(one[key], default=0) < 1:
            yield Problem(
                what=f"{where} has {key}: {one[key]}",
                why="it is the latent's rows and columns at that width, at least one of each",
                works=f"{key}: [11, 10]",
            )
    if one["frames"] < 1:
        yield Problem(what=f"{where} has frames: {one['frames']}", why="a clip has one or more", works="frames: 8")
    for name in one["contestants"]:
        if name not in BUILT_IN and not _strategy(name):
            yield _unknown(name, where, BUILT_IN)
    for target in one["targets"]:
        yield from _target(where, one, target, bench)


def _target(
    where: str, one: Mapping[str, Any], target: Mapping[str, Any], bench: Mapping[str, Any]
) -> Iterator[Problem]:
    if target["measure"] not in MEASURES:
        yield Problem(
            what=f"{where} has a target with measure: {target['measure']}",
            why=f"the measures are: {', '.join(MEASURES)}",
            works=did_you_mean(target["measure"], MEASURES, otherwise="measure: speed"),
        )
        return
    if target["at_least"] is None and target["at_most"] is None:
        yield Problem(
            what=f"{where} has a target for {target['of']} without at_least and at_most",
            why="nothing could miss it",
            works="at_least: 1.5",
        )
    if (target["over"] is None) == (target["measure"] in RATIOS):
        yield Problem(
            what=f"{where} has a target with measure: {target['measure']} and over: {target['over']}",
            why=f"{', '.join(RATIOS)} compare two contestants, the others one with its plan",
            works=f"over: {DIFFUSERS}" if target["over"] is None else "no `over`",
        )
        return
    other = target["over_case"] or one["name"]
    if bench["cases"] is not None and other not in bench["cases"]:
        yield Problem(
            what=f"bench.cases={bench['cases']} without {other}",
            why=f"a target of {one['name']} is relative to what {other} measures",
            works=f"bench.cases=[{', '.join([*bench['cases'], other])}]",
        )
    theirs = next((case["contestants"] for case in bench["suite"] if case["name"] == other), None)
    for name, case, there in (
        (target["of"], one["name"], one["contestants"]),
        (target["over"], other, theirs),
    ):
        if name is not None and (there is None or name not in there):
            yield Problem(
                what=f"{where} has a target with {name} in {case}",
                why=f"{case} is no case" if there is None else f"its contestants are: {', '.join(there)}",
                works=f"contestants: [{', '.join([*(there or ()), name])}]",
            )


def _impossible(cfg: Config, bench: Mapping[str, Any]) -> Iterator[Problem]:
    """Cases that a strategy refuses, and weights that this machine cannot hold."""
    ranks = cfg.topology.nodes * cfg.topology.ranks_per_node
    dimensions = vae_dimensions(cfg)
    try:
        programs: dict[Direction, Program] = {d: program_for(d, dimensions) for d in ("decode", "encode")}
    except ProgramError as error:
        yield _three_parts("", error)
        return
    for case in cases_of(bench):
        program = programs[case.direction]
        try:
            program.chunks(case.worked)
            for name in case.contestants:
                if name not in BUILT_IN:
                    build(name, plain(cfg), case.direction).plan(program, case.worked, ranks)
        except (ProgramError, StrategyError) as error:
            yield _three_parts(f"bench case {case.name}: ", error)
    held = sum(program.weight_elements() for program in programs.values()) * ELEMENT_BYTES[Dtype.float32]
    needed = COPIES * held * cfg.topology.ranks_per_node
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        yield Problem(
            what=f"bench.width={bench['width']} on topology.ranks_per_node={cfg.topology.ranks_per_node}",
            why=f"its weights are {quantity('bytes', held)} a rank; with the copies that its contestants make, "
            f"{quantity('bytes', needed)}, and this machine has {quantity('bytes', there)}",
            works="bench.width=small, or fewer ranks",
        )


def _three_parts(where: str, error: ValueError) -> Problem:
    """A ProgramError or StrategyError, which says its three parts in one line."""
    what, why, works = (*str(error).split("; ", 2), "", "")[:3]
    return Problem(what=f"{where}{what}", why=why or what, works=works or "bench.rows=11 bench.cols=10")
