"""Checks that every strategy is as exact on the device as it declares, against one rank and against diffusers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.jobs.verify.distance import Distance, exactness_of
from cosmos3_pipeline.plugin_api import Exactness, Program, Strategy, StrategyError, discover
from cosmos3_pipeline.vae.inputs import latent_shape
from cosmos3_plugins.tiled import Tiled
from on_gpu.drawn import drawn_transformer, latents_by
from on_gpu.found import Found
from on_gpu.setting import Setting, free, is_root, on_rank, synchronize
from on_gpu.vaes import PATIENCE, Clip, Vaes, in_words, model_config, result_of, vae_dimensions

# For denoising: the number of layers at full width, so few that every rank on one GPU can have a copy, and the
# steps.
LAYERS, STEPS = 4, 2
SMALL_CLIP, CLIP = (80, 48, 5), (480, 832, 13)  # height, width (pixels), frames
# Settings that change the assignment of work to ranks, by the strategy's name.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "layer_pipeline": ({}, {"moving_cuts": False}),
    "spatial_shard": ({}, {"axis": "width"}, {"axis": "grid"}),
}


def clips(*, small: bool) -> Iterator[Clip]:
    """The clips of this step. The most important clips come first, because the step may run out of time.

    Long clips have 48 latent frames, which are 189 frames. The last clip has the 720p size, with 3 latent frames.
    """
    sizes = (2, 4, 4) if small else (48, 8, 8)
    for direction in ("decode", "encode"):
        for dtype in (torch.bfloat16, torch.float32):
            yield Clip(direction, dtype, *sizes)
    if not small:
        yield Clip("decode", torch.bfloat16, 3, 45, 80)


def strategies(clip: Clip, program: Program) -> Iterator[tuple[str, Strategy]]:
    """Every installed strategy with its settings. `replicated` is last, because it takes longest on one GPU."""
    for name, cls in sorted(discover().strategies.items(), key=lambda item: item[0] == "replicated"):
        for settings in [tiles(clip, program)] if name == "tiled" else SETTINGS.get(name, ({},)):
            shown = "" if name == "tiled" else "".join(f" {key}={value}" for key, value in settings.items())
            yield f"{name}{shown}", cls(**settings)


def tiles(clip: Clip, program: Program) -> dict[str, int]:
    """Tiles of half the picture that overlap by half. diffusers' default tiles are larger than some clips here."""
    unit = program.spatial // (1 if program.direction == "decode" else program.patch)
    sizes: dict[str, int] = {}
    for axis, count in (("height", clip.rows), ("width", clip.cols)):
        sizes |= {f"tile_sample_min_{axis}": count // 2 * unit, f"tile_sample_stride_{axis}": count // 4 * unit}
    return sizes


def reach(program: Program) -> int:
    """How many latent frames back a latent frame depends on: the temporal caches of all ops, in latent frames."""
    return math.ceil(sum(op.cached_frames * program.latents_per_chunk / op.source.frames for op in program.ops))


def check_all(setting: Setting) -> None:
    """Check all clips with all strategies, then the transformer's layouts. The root writes the results."""
    found = Found(setting.file)
    with on_rank(setting, shares=setting.shares) as device:
        if is_root():
            shared = "share one device and send through the host by gloo"
            found.note(f"{dist.get_world_size()} ranks, which {shared if setting.shares else 'have a GPU each'}")
        vaes = Vaes(vae_dimensions(setting.model), device)
        for clip in clips(small=setting.small):
            check_clip(found, vaes, clip)
            free(device)
        del vaes
        free(device)
        check_transformer(found, setting, device)


def check_clip(found: Found, vaes: Vaes, clip: Clip) -> None:
    """Write one row for diffusers and one for each strategy. Results are compared with one rank's result."""
    given = vaes.given(clip)
    judge = Judge(vaes, clip, given) if is_root() else None
    if judge is not None:
        back = reach(vaes.programs[clip.direction])
        if clip.frames > back:
            found.note(f"{clip.name}: longer than the {back} latent frames that one depends on")
        judge.diffusers(found)
    dist.barrier()
    for name, strategy in strategies(clip, vaes.programs[clip.direction]):
        began, sent, made, problem = time.perf_counter(), 0, None, ""
        try:
            vae = vaes.together(clip, strategy)
            made = result_of(vae, clip.direction, given.to(clip.dtype))
            synchronize(vaes.device)
            sent = vae.ledger.sent_bytes
        except StrategyError as error:
            problem = f"refused: {error}"
        # Any exception of a strategy is a result of this step. The next strategy gets new connections.
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if judge is not None:
            seconds = time.perf_counter() - began
            judge.strategy(found, name, strategy, made, problem, seconds=seconds, sent=sent)
        dist.barrier()


class Judge:
    """On the root: the results of one rank, of diffusers, and of one rank in float32."""

    def __init__(self, vaes: Vaes, clip: Clip, given: Tensor) -> None:
        self.clip, self._given, self._model = clip, given.to(clip.dtype), vaes.models[clip.dtype]
        self.alone = result_of(vaes.alone(clip.dtype), clip.direction, self._given)
        self.theirs = result_of(self._model, clip.direction, self._given)
        self.wide = self.alone
        if clip.dtype != torch.float32:
            self.wide = result_of(vaes.alone(torch.float32), clip.direction, given)
        self._range = float(self.wide.max() - self.wide.min())
        self._shape = latent_shape(vaes.programs[clip.direction], self._given)
        self._program = vaes.programs[clip.direction]

    def distance(self, reference: Tensor, other: Tensor) -> Distance:
        found = Distance(self._range)
        found.add(reference, other)
        return found

    def reached(self, result: Tensor, beside: Tensor) -> Exactness | None:
        """The exactness of a result against `beside`. `beside` is as near to float32 as its dtype allows."""
        distance = self.distance(beside, result)
        if self.clip.dtype == torch.float32:
            return exactness_of(distance)
        wide = self.distance(self.wide, result)
        return exactness_of(distance, float32=wide, reference_float32=self.distance(self.wide, beside))

    def diffusers(self, found: Found) -> None:
        """Compare one rank with diffusers: they must be equal up to rounding."""
        self._row(found, "one rank", Exactness.ROUNDING, self.alone, self.theirs, "diffusers")
        reached = self.reached(self.alone, self.theirs)
        if reached is None or not reached.satisfies(Exactness.ROUNDING):
            db = self.distance(self.theirs, self.alone).psnr
            found.wrong(f"{self.clip.name}: one rank is {db:.1f} dB from diffusers, which is more than rounding")
        if not bool(self.alone.isfinite().all()):
            found.wrong(f"{self.clip.name}: one rank's result is not finite")

    def strategy(
        self,
        found: Found,
        name: str,
        strategy: Strategy,
        made: Tensor | None,
        problem: str,
        *,
        seconds: float,
        sent: int,
    ) -> None:
        """Write a strategy's row, and check that it keeps the exactness that it declares for this clip."""
        if made is None:
            found.row(self.clip.name, strategy=name, expected=str(strategy.exactness), result=problem)
            if not problem.startswith("refused"):
                found.wrong(f"{self.clip.name}: {name} raised {problem}")
            return
        declared = strategy.plan(self._program, self._shape, dist.get_world_size()).exactness
        beside, whose = self.alone, "one rank"
        if isinstance(strategy, Tiled):
            # The distance of tiles from the whole picture depends on their size, so diffusers runs the same tiles.
            beside, whose, declared = self.diffusers_tiled(strategy), "diffusers' tiles", Exactness.ROUNDING
        reached = self.reached(made, beside)
        self._row(
            found, name, declared, made, beside, whose, seconds=f"{seconds:.2f}", sent=f"{sent / 1e6:.1f} MB"
        )
        if reached is None or not reached.satisfies(declared):
            was = reached or "another picture"
            found.wrong(f"{self.clip.name}: {name} is {was} beside {whose}, where {declared} is expected")

    def diffusers_tiled(self, strategy: Tiled) -> Tensor:
        """diffusers' result with the tiles of `strategy`."""
        model = self._model
        before = {name: getattr(model, name) for name in asdict(strategy)}
        model.enable_tiling(**asdict(strategy))
        made = result_of(model, self.clip.direction, self._given)
        model.enable_tiling(**before)
        model.disable_tiling()
        return made

    def _row(
        self, found: Found, name: str, declared: Exactness, made: Tensor, beside: Tensor, whose: str, **more: str
    ) -> None:
        distance = self.distance(beside, made)
        found.row(
            self.clip.name,
            strategy=name,
            beside=whose,
            expected=str(declared),
            result=str(self.reached(made, beside) or "another picture"),
            **{"largest difference": f"{distance.max_abs:.1e}"},
            distance=in_words(distance),
            **{"from diffusers": in_words(self.distance(self.theirs, made))},
            **more,
        )


# ----------------------------------------------------------------------------------------------------- transformer
def check_transformer(found: Found, setting: Setting, device: torch.device) -> None:
    """Compare the latents of guidance and sequence over all ranks with those of one rank and of diffusers."""
    model = model_config(setting.model)
    dtype = getattr(torch, model.dtype.value)
    transformer = drawn_transformer(model, device, dtype, layers=LAYERS)
    clip, ranks = SMALL_CLIP if setting.small else CLIP, dist.get_world_size()
    mesh = RankMesh.build(cfg=2, ulysses=ranks // 2, device=device, patience=PATIENCE)
    made = {}
    if is_root():
        made["diffusers"] = latents_by(None, transformer, clip, steps=STEPS)
        made["one rank"] = latents_by(ParallelLoopDenoiser(), transformer, clip, steps=STEPS)
    dist.barrier()
    name = f"guidance over {mesh.cfg} x sequence over {mesh.ulysses}"
    made[name] = latents_by(ParallelLoopDenoiser(mesh), transformer, clip, steps=STEPS)
    if not is_root():
        return
    for way, result in made.items():
        cells = {}
        for other in ("one rank", "diffusers"):
            distance = Distance(float(made[other].max() - made[other].min()))
            distance.add(made[other], result)
            cells[f"from {other}"] = in_words(distance)
        title = f"denoising, {LAYERS} layers, {model.dtype.value}, {STEPS} steps"
        found.row(title, way=way, **cells, finite=str(bool(result.isfinite().all())))
