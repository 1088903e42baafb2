"""Measures peak memory, kernels and seconds of each stage, beside the plan and the rehearsal of the same run.

The stages are those of a run without the export. The checkpoint is that of a rehearsal: it has no files, and its
weights are drawn on the device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import torch

from on_gpu.found import Found
from on_gpu.setting import Kernel, Setting, kernels_of, on_rank, synchronize

if find_spec("av") is None:
    # PyAV is the largest of all wheels, and no video is read or written here, so stand-ins are imported instead.
    # They are removed again, because diffusers must not find PyAV installed.
    names = ("av", "av.error", "av.video", "av.video.reformatter")
    sys.modules.update(dict.fromkeys(names, MagicMock()))
    import_module("cosmos3_pipeline.stages.media")
    for name in names:
        del sys.modules[name]

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.jobs.metrics import Meter, held_bytes
from cosmos3_pipeline.jobs.rank import components
from cosmos3_pipeline.jobs.rehearse.rank import rehearse_ranks
from cosmos3_pipeline.models.form import form_of
from cosmos3_pipeline.planning.plan import Plan
from cosmos3_pipeline.rehearsal.findings import Rehearsed
from cosmos3_pipeline.stages import STAGES
from cosmos3_pipeline.stages.build import build_stages
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.progress import Advance
from on_gpu.drawn import drawn_in_place_of_files

# Overrides of two runs. Memory and seconds are measured in the first run, kernels are counted in the second,
# because a profile makes a run slower.
TIMED = ("task.num_frames=189", "sampler.steps=3")
COUNTED = ("task.num_frames=29", "sampler.steps=2")
SMALL = ("task.num_frames=5", "task.height=96", "task.width=160", "sampler.steps=2")
STAGES_MEASURED = ("text", "denoise", "decode")
LONGEST_KERNELS = 12
DRAWING = ("distribution", "aten::normal_")  # parts of the names of kernels that draw the weights


@dataclass
class Clock:
    """A reporter that records the time at which each denoising step was computed."""

    device: torch.device
    steps: list[float] = field(default_factory=list)

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        def advance(units: int = 1) -> None:
            if what == "denoising steps":
                synchronize(self.device)
                self.steps.append(time.perf_counter())

        yield advance


@dataclass
class Played:
    """The measurements of one run: seconds and peak bytes of its stages, and seconds between denoising steps."""

    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    step_seconds: list[float]


def measure(setting: Setting) -> None:
    """Rehearse, then measure. The rehearsal is first, because it needs no device."""
    found = Found(setting.file)
    with on_rank(setting) as device:
        config = composed(setting, SMALL if setting.small else TIMED)
        rehearsed = rehearse_ranks(config, [0])
        for finding in rehearsed.findings:
            # The toy's stages are so small that a few tensors exceed a plan's tolerance.
            (found.note if setting.small else found.wrong)(f"rehearsal: {finding}")
        write_timed(found, rehearsed, play(config, rehearsed.plan, device, run_at_once))
        counted = composed(setting, SMALL if setting.small else COUNTED)
        again = rehearse_ranks(counted, [0])
        kernels: dict[str, list[Kernel]] = {}

        def profiled(name: str, stage: Callable[[], None]) -> None:
            kernels[name] = kernels_of(stage, device)

        play(counted, again.plan, device, profiled)
        write_counted(found, again, kernels)


def composed(setting: Setting, overrides: Sequence[str]) -> Config:
    """The config of text to video on one rank."""
    return compose([f"model={setting.model}", f"topology={setting.topology}", "task=t2v", *overrides])


def run_at_once(name: str, stage: Callable[[], None]) -> None:
    stage()


def play(
    config: Config, plan: Plan, device: torch.device, around: Callable[[str, Callable[[], None]], None]
) -> Played:
    """Run the stages of `plan` without the export. `around` runs each stage. Weights are drawn, not read."""
    base, ledgers = held_bytes(device), [Ledger()]
    mesh, clock = RankMesh.build(device=device), Clock(device)
    seconds = {}
    with drawn_in_place_of_files():
        parts = components(config, plan, device, mesh, ledgers, clock, checkpoint=form_of(config.model))
        meter = Meter(device, STAGES, ledgers)
        context = RunContext(
            components=parts,
            clip=plan.clip,
            fps=config.task.fps,
            directory=Path(),
            mesh=mesh,
            reporter=clock,
            measure=meter.stage,
        )
        for name, stage in build_stages(config, plan).items():
            if name not in STAGES_MEASURED:
                continue
            started = time.perf_counter()
            around(name, lambda stage=stage: finish(stage, context, device))  # type: ignore[misc]
            seconds[name] = time.perf_counter() - started
    peaks = {name: max(0, meter.stages[name].peak_bytes - base) for name in seconds}
    return Played(seconds, peaks, [b - a for a, b in zip(clock.steps, clock.steps[1:], strict=False)])


def finish(stage: Callable[[RunContext], None], context: RunContext, device: torch.device) -> None:
    """Run the stage, and read all frames that it leaves."""
    stage(context)
    for _ in context.frames or ():
        pass
    synchronize(device)


def write_timed(found: Found, rehearsed: Rehearsed, played: Played) -> None:
    """Write peak bytes and seconds: planned, rehearsed and measured."""
    plan, clip = rehearsed.plan, rehearsed.plan.clip
    title = f"{plan.model}, {clip.width} x {clip.height}, {clip.num_frames} frames, {plan.steps} steps"
    for name in STAGES_MEASURED:
        planned, stage = plan.ranks[0].stages[name], rehearsed.ranks[0].stages[name]
        peak = played.peak_bytes[name]
        found.row(
            title,
            stage=name,
            **{"planned GB": f"{planned.peak_bytes / 1e9:.2f}", "rehearsed GB": f"{stage.peak_bytes / 1e9:.2f}"},
            **{"measured GB": f"{peak / 1e9:.2f}", "measured / planned": f"{peak / planned.peak_bytes:.3f}"},
            **{"planned s": f"{planned.total_seconds:.2f}", "measured s": f"{played.seconds[name]:.2f}"},
            **{"TFLOP": f"{planned.flops / 1e12:.1f}"},
            **{"TFLOP/s": f"{planned.flops / played.seconds[name] / 1e12:.1f}"},
        )
    if played.step_seconds:
        planned_step = plan.ranks[0].stages["denoise"].total_seconds / plan.steps
        found.note(
            f"a denoising step after the first: {min(played.step_seconds):.3f} s, {planned_step:.3f} s planned; "
            "the stages' seconds have the drawing of their weights in them"
        )


def write_counted(found: Found, rehearsed: Rehearsed, kernels: dict[str, list[Kernel]]) -> None:
    """Write the numbers of kernels, rehearsed and profiled, and the longest kernels. Drawing is left out."""
    clip, steps = rehearsed.plan.clip, rehearsed.plan.steps
    title = f"kernels, {clip.num_frames} frames, {steps} steps"
    for name in STAGES_MEASURED:
        stage = rehearsed.ranks[0].stages[name]
        own = [kernel for kernel in kernels[name] if not any(word in kernel.name for word in DRAWING)]
        count, seconds = (sum(getattr(kernel, what) for kernel in own) for what in ("count", "seconds"))
        found.row(
            title,
            stage=name,
            rehearsed=f"{stage.kernels:,}",
            profiled=f"{count:,}",
            **{"seconds in kernels": f"{seconds:.3f}", "rehearsed GB moved": f"{stage.moved_bytes / 1e9:.1f}"},
        )
        for kernel in own[:LONGEST_KERNELS]:
            found.row(
                f"longest kernels, {name}",
                kernel=kernel.name[:100].replace("|", "/"),
                count=f"{kernel.count:,}",
                seconds=f"{kernel.seconds:.4f}",
                part=f"{kernel.seconds / seconds:.1%}" if seconds else "",
            )
