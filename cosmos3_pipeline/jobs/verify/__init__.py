"""`job=verify`: checks the declared exactness of strategies and of skipped passes. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosmos3_pipeline.config.plugins import build_strategy
from cosmos3_pipeline.config.schema import Config, JobName
from cosmos3_pipeline.errors import ConfigError, Problem, Refusal, did_you_mean
from cosmos3_pipeline.jobs.ranks import on_ranks
from cosmos3_pipeline.planning.geometry import chunks_of, clip_of
from cosmos3_pipeline.planning.sampling import skipping
from cosmos3_pipeline.planning.units import quantity
from cosmos3_pipeline.planning.vae import VaePlan, directions, is_parallel, reference, settings_of, vae_plan
from cosmos3_pipeline.vae.plugins import discover
from cosmos3_pipeline.vae.program import Direction

if TYPE_CHECKING:
    from cosmos3_pipeline.jobs.start import Prepared

REPORT_FILE = "verify.json"
PICTURE_FILE = "verify.png"
EXAMPLE = "verify.strategies=[layer_pipeline]"
DENOISE = "denoise"  # the place of a direction in the report of a run that skips passes
EVERY_PASS, REFERENCE = (
    "every pass",
    "replicated",
)  # what such a run and a strategy are compared with


class VerifyFailed(SystemExit):
    """A strategy is not as exact as it declares. Uncaught, it ends the process with its words and exit code 1."""


@dataclass(frozen=True)
class Chosen:
    """A strategy to verify in one direction: the settings that are not its defaults, and its plan."""

    direction: Direction
    settings: dict[str, Any]
    plan: VaePlan


@dataclass(frozen=True)
class Verification:
    """The strategies that a job verifies, and the reference of each direction that is compared.

    With `skipping`, the overrides by which the run skips passes, its clip is compared with the clip of every pass.
    """

    chosen: tuple[Chosen, ...]
    references: dict[Direction, VaePlan]
    skipping: tuple[str, ...]


def check_verify(cfg: Config) -> Verification | None:
    """The planned strategies that the checked `cfg` asks to verify. None for another job.

    Raises ConfigError with all reasons why they cannot be verified, and for settings that another job would
    ignore.
    """
    found = list(_unread(cfg))
    if cfg.job.name != JobName.verify:
        _raise(found)
        return None
    found = list(_unknown_names(cfg.verify.strategies or []))
    if cfg.task.prompt_file is not None:
        found.insert(0, _several_clips(cfg))
    picked = _picked(cfg)
    chosen = []
    for direction, node in picked:
        try:
            chosen.append(_planned(cfg, direction, node))
        except ConfigError as error:
            found.extend(error.problems)
    # An inverse dynamics has no clip to decode, and latents of a file are not denoised.
    skips = skipping(cfg) if cfg.verify.latents is None and "decode" in directions(cfg) else ()
    if not picked and not skips and not found:
        found.append(_nothing(cfg))
    if cfg.verify.latents is not None:
        found.extend(_latents(cfg, cfg.verify.latents))
    _raise(found)
    compared = dict.fromkeys(direction for direction, _ in picked)
    if skips:
        compared["decode"] = None
    return Verification(tuple(chosen), {d: vae_plan(cfg, d, reference()) for d in compared}, skips)


def _raise(found: Sequence[Problem]) -> None:
    if found:
        raise ConfigError(found)


def _picked(cfg: Config) -> list[tuple[Direction, dict[str, Any]]]:
    """The strategies to verify, each with its direction and its config node.

    They are `verify.strategies` in every direction of the task, by default the strategies that the vae flags
    switch on. A configured strategy has its configured settings; any other strategy has its defaults.
    """
    needed, plugins = directions(cfg), discover()
    if cfg.verify.strategies is None:
        return [(d, settings_of(cfg.vae, d)) for d in needed if is_parallel(cfg.vae, d)]
    found: list[tuple[Direction, dict[str, Any]]] = []
    for name in cfg.verify.strategies:
        if name not in plugins.strategies:
            continue  # `_unknown_names` reports it
        target = plugins.target(name)
        for direction in needed:
            configured = settings_of(cfg.vae, direction)
            node = configured if configured["_target_"] == target else {"_target_": target}
            if direction in plugins.strategies[name].directions:
                found.append((direction, node))
    return found


def _planned(cfg: Config, direction: Direction, node: dict[str, Any]) -> Chosen:
    try:
        planned = vae_plan(cfg, direction, build_strategy(node))
    except Refusal as refusal:
        what = f"{direction}: {refusal.problem.what}"
        raise ConfigError([replace(refusal.problem, what=what)]) from refusal
    return Chosen(direction, {key: value for key, value in node.items() if key != "_target_"}, planned)


def _unread(cfg: Config) -> Iterator[Problem]:
    """Settings of job=verify in another job."""
    if cfg.job.name == JobName.verify:
        return
    for key, value in vars(cfg.verify).items():
        if value is not None:
            yield Problem(
                what=f"verify.{key}={value} with job={cfg.job.name.value}",
                why="only job=verify reads it, so it would be ignored",
                works=f"job=verify, or no verify.{key}",
            )


def _several_clips(cfg: Config) -> Problem:
    return Problem(
        what=f"task.prompt_file={cfg.task.prompt_file} with job=verify",
        why="strategies are compared on one clip",
        works="task.prompt='a red kite'",
    )


def _nothing(cfg: Config) -> Problem:
    asked = cfg.verify.strategies
    flags = "vae.parallel_encode and vae.parallel_decode are off for what task={} does"
    return Problem(
        what="job=verify with nothing to verify",
        why=f"verify.strategies={asked} does none of: {', '.join(directions(cfg))}"
        if asked is not None
        else flags.format(cfg.task.name.value) + ", so only the reference would run",
        works=f"vae=parallel_decode, topology=cpu_x2, or {EXAMPLE}",
    )


def _unknown_names(names: Sequence[str]) -> Iterator[Problem]:
    known = discover().strategies
    for name in names:
        if name not in known:
            why = discover().broken.get(name)
            yield Problem(
                what=f"verify.strategies has {name}",
                why=f"it is installed but broken: {why}" if why else f"the strategies are: {', '.join(known)}",
                works=did_you_mean(name, known, otherwise=EXAMPLE),
            )


def _latents(cfg: Config, latents: str) -> Iterator[Problem]:
    """Problems of the file of latents. Its values are checked too, because all ranks would stop at a NaN."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    named, clip = f"verify.latents={latents}", clip_of(cfg)
    file = Path(latents).expanduser()
    works = "latents.safetensors of a run with output.latents=true"
    try:
        with safe_open(file, framework="numpy") as tensors:
            if "latents" not in tensors.keys():  # noqa: SIM118 # no dict
                why = f"its tensors are: {', '.join(sorted(tensors.keys()))}"
                yield Problem(what=f"{named} has no tensor `latents`", why=why, works=works)
                return
            part = tensors.get_slice("latents")
            dtype, shape = part.get_dtype(), part.get_shape()
            if dtype != "F32":
                why = "the sampler works in float32, and so does the file that a run leaves"
                yield Problem(what=f"{named} holds {dtype}", why=why, works=works)
                return
            wanted = [chunks_of(cfg).count, cfg.model.vae.z_dim]
            wanted += [clip.latent_frames, clip.latent_rows, clip.latent_cols]
            if shape != wanted:
                yield Problem(
                    what=f"{named} holds {shape}",
                    why=f"{clip.width}x{clip.height} and {clip.num_frames} frames are {wanted}",
                    works=_size_of(shape, cfg) if len(shape) == 5 else works,
                )
            elif not np.isfinite(tensors.get_tensor("latents")).all():
                yield Problem(
                    what=f"{named} has values that are NaN or infinite",
                    why="every pixel that they reach is lost, whatever the strategy",
                    works=works,
                )
    except (OSError, SafetensorError) as error:
        yield Problem(what=f"{named} cannot be read", why=str(error), works=works)


def _size_of(shape: Sequence[int], cfg: Config) -> str:
    """The overrides for a clip whose latents have this `shape`."""
    clip = clip_of(cfg)
    _, _, frames, rows, cols = shape
    num_frames = (frames - 1) * clip.temporal + 1
    return f"task.height={rows * clip.spatial} task.width={cols * clip.spatial} task.num_frames={num_frames}"


def verify(prepared: Prepared, output: Path, *, multirun: bool) -> None:
    """Verify the chosen strategies. Leaves verify.json and verify.png in `output` and prints the table.

    Raises VerifyFailed if a strategy misses its declaration, and RankFailed if a rank failed.
    """
    if multirun:
        problem = Problem(
            what="job=verify with -m",
            why="a sweep compares the pictures that its jobs leave, and verify leaves none",
            works="one run with several strategies: verify.strategies=[layer_pipeline,spatial_shard]",
        )
        raise ConfigError([problem])
    assert prepared.verification is not None
    entry = "cosmos3_pipeline.jobs.verify.rank:verify_rank"
    on_ranks(prepared.config, output, entry, prepared.plan, prepared.verification)
    show(output)


def join(prepared: Prepared) -> None:
    """Be a rank other than the root in the world that RANK and WORLD_SIZE describe."""
    from cosmos3_pipeline.jobs.verify.rank import verify_rank

    assert prepared.verification is not None
    verify_rank(prepared.config, prepared.plan, prepared.verification, None)


def show(output: Path) -> None:
    """Print the report in `output`. Raises VerifyFailed if a strategy missed its declaration."""
    report = json.loads((output / REPORT_FILE).read_text())
    ranks = report["topology"]["replica_ranks"]
    table = Table(title=f"{report['task']} with {report['model']} on {ranks} rank{'s' * (ranks > 1)}")
    for column in ("", "strategy", "declared", "measured"):
        table.add_column(column)
    for column in ("max", "mean", "PSNR dB", "SSIM", "seconds", "peak MB per rank", "sent"):
        table.add_column(column, justify="right")
    blank = [""] * 4
    for direction, alone in report["reference"].items():
        table.add_row(direction, REFERENCE, "", "the reference", *blank, *_cost_cells(alone), style="dim")
        for check in report["checks"]:
            if check["direction"] == direction:
                table.add_row(*_cells(check), *_cost_cells(check))
    skipped = [check for check in report["checks"] if check["direction"] == DENOISE]
    for check in skipped:
        table.add_row(DENOISE, EVERY_PASS, "", "the reference", style="dim")
        table.add_row(*_cells(check))
    console = Console(markup=False)
    console.print(table)
    console.print("max and mean difference: of 255 levels, for encode in the latents' own scale")
    for check in skipped:
        computed, every = (sum(check["passes"][one].values()) for one in ("run", EVERY_PASS))
        away = f"latents {check['latents_distance']:.3g} of their norm away"
        console.print(f"{check['strategy']}: {computed} of {every} passes computed, {away}")
    files = [REPORT_FILE] + [PICTURE_FILE] * (output / PICTURE_FILE).is_file()
    console.print(" ".join(str(output / name) for name in files), soft_wrap=True, highlight=False)
    missed = [check for check in report["checks"] if not check["passed"]]
    if missed:
        lines = [f"{check['direction']} with {check['strategy']}: {check['missed']}" for check in missed]
        raise VerifyFailed("\n".join([*lines, f"see {output / REPORT_FILE}"]))


def _cells(check: dict[str, Any]) -> list[str | Text]:
    found = check["levels"] or check["values"]
    verdict = check["reached"] or "another picture"
    colour = "green" if check["passed"] else "red"
    return [
        check["direction"],
        check["strategy"],
        check["declared"],
        Text(verdict, style=colour),
        *("NaN" if found[key] is None else f"{found[key]:.3g}" for key in ("max", "mean")),
        "equal" if found["max"] == 0 else "NaN" if found["psnr_db"] is None else f"{found['psnr_db']:.1f}",
        "" if check["ssim"] is None else f"{check['ssim']:.5f}",
    ]


def _cost_cells(measured: dict[str, Any]) -> list[str]:
    peaks = ", ".join(f"{rank['peak_bytes'] / 1e6:.0f}" for rank in measured["ranks"])
    sent = sum(rank["sent_bytes"] for rank in measured["ranks"])
    return [f"{measured['seconds']:.2f}", peaks, quantity("bytes", sent) if sent else "0"]
