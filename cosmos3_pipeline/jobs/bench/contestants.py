"""Who takes part in a case: ours, diffusers, DistVAE, each as something that can be called again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from torch import Tensor

from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.jobs.bench.conditioning import by_diffusers, by_stage
from cosmos3_pipeline.jobs.bench.given import Given
from cosmos3_pipeline.jobs.bench.roofline import Roofline
from cosmos3_pipeline.jobs.bench.suite import (
    DIFFUSERS,
    DISTVAE,
    ONE_RANK,
    ONE_RANK_EACH,
    ROOFLINE,
    TILED,
    Case,
    build,
)
from cosmos3_pipeline.jobs.bench.weights import Autoencoders, CountedWeights
from cosmos3_pipeline.jobs.bench.world import World
from cosmos3_pipeline.plan.vae import reference
from cosmos3_pipeline.vae.kernels import arithmetic_dtype
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.program import Direction, program_for
from cosmos3_pipeline.vae.strategy import Strategy, StrategyPlan

# Where the picture is smaller than one of diffusers' own tiles: tiles of two thirds of it, three quarters apart as
# its own are, if that is more than one tile.
TILE_PART, STRIDE_PART, FEWEST_TILED = 2 / 3, 3 / 4, 4
# Seconds after which a rank that waits for DistVAE's other ranks gives up.
PEER_TIMEOUT = 600
# In bfloat16, on a processor without instructions for it, PyTorch did 0.8 to 1.6 GFLOP/s a core. A peer that would
# take more than so many seconds a run is not waited for.
PLAIN_FLOPS_PER_SECOND, MOST_PLAIN_SECONDS = 1e9, 60


class Unavailable(Exception):
    """A contestant that cannot take part, and why, for the row of the table."""


@dataclass
class Contestant:
    """`run` does the work once, on all ranks if `everywhere`, else on the root; it returns the result on the root.

    known: its weights, which do not count as its memory. note: what a person must know of it. plan and weights:
    of ours. roofline: what tells the seconds, instead of the clock.
    """

    name: str
    run: Callable[[Given], Tensor | None]
    everywhere: bool
    known: list[Tensor]
    note: str = ""
    ledger: Ledger | None = None
    plan: StrategyPlan | None = None
    weights: CountedWeights | None = None
    roofline: Roofline | None = None


@dataclass
class Factory:
    """Makes the contestants of a case. `plain` is the resolved config, for the settings of its strategies.

    `op_seconds`: the file of what its ops take on these ranks, if they were measured.
    """

    case: Case
    plain: Mapping[str, Any]
    dimensions: Mapping[str, Any]
    autoencoders: Autoencoders
    world: World
    op_seconds: str = ""
    _made: dict[str, Callable[[], Contestant]] = field(init=False)
    # One rank's work, which several contestants do: its reordered weights are held once.
    _alone: tuple[ParallelVAE, CountedWeights] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._made = {
            DIFFUSERS: lambda: self._peer(DIFFUSERS, self._autoencoder()),
            TILED: self._tiled,
            ONE_RANK: lambda: self._ours(ONE_RANK, reference(), alone=True),
            ONE_RANK_EACH: lambda: self._ours(ONE_RANK_EACH, reference(), alone=True, everywhere=True),
            DISTVAE: self._distvae,
            ROOFLINE: self._roofline,
        }

    def make(self, name: str) -> Contestant:
        """The contestant `name`, ready to run on this rank. Raises Unavailable."""
        if name in (DIFFUSERS, TILED, DISTVAE):
            self._refuse_hours()
        if name in self._made:
            return self._made[name]()
        strategy = build(name, self.plain, self.case.direction, op_seconds=self.op_seconds)
        return self._ours(name, strategy, alone=False)

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.case.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _refuse_hours(self) -> None:
        """Raises Unavailable for a peer whose every run would take minutes on this processor."""
        if arithmetic_dtype(self.dtype, self.world.device) == self.dtype:
            return
        flops = program_for(self.case.direction, self.dimensions).flops(self.case.worked)
        seconds = flops / PLAIN_FLOPS_PER_SECOND
        if seconds > MOST_PLAIN_SECONDS:
            why = f"this processor has no instructions for {self.case.dtype}"
            raise Unavailable(f"{why}, and each run would take some {seconds:.0f} s")

    def _division(self, strategy: Strategy) -> str:
        """By whose seconds its ops are divided, if by any."""
        path = getattr(strategy, "op_seconds", "")
        if path and path == self.op_seconds:
            return "divided by what its ops take here"
        return f"divided by what its ops took in {path}" if path else ""

    def _autoencoder(self) -> AutoencoderKLWan:
        return self.autoencoders.model(self.dtype)

    def _peer(self, name: str, vae: AutoencoderKLWan, *, everywhere: bool = False, note: str = "") -> Contestant:
        call = partial(by_diffusers, vae) if self.case.call == "condition" else self._call(vae)
        return Contestant(name, call, everywhere, list(vae.state_dict().values()), note)

    def _call(self, vae: Any) -> Callable[[Given], Tensor | None]:
        """The method of `AutoencoderKLWan`, or of what has the same ones, that the case calls."""
        if self.case.direction == "encode":
            return lambda given: vae.encode(given.tensor).latent_dist.mode()
        return lambda given: vae.decode(given.tensor).sample

    def _tiled(self) -> Contestant:
        vae, shape = self.autoencoders.view(self.dtype), self.case.shape
        step = vae.spatial_compression_ratio
        sizes = {"height": shape.rows * step, "width": shape.cols * step}
        tile = {axis: getattr(vae, f"tile_sample_min_{axis}") for axis in sizes}
        stride = {axis: getattr(vae, f"tile_sample_stride_{axis}") for axis in sizes}
        if all(sizes[axis] <= tile[axis] for axis in sizes):
            if max(shape.rows, shape.cols) < FEWEST_TILED:
                raise Unavailable(f"{shape.rows} x {shape.cols} latents are no more than one tile")
            for axis, latents in (("height", shape.rows), ("width", shape.cols)):
                if latents >= FEWEST_TILED:
                    part = math.ceil(TILE_PART * latents)
                    tile[axis], stride[axis] = part * step, max(1, int(STRIDE_PART * part)) * step
        vae.enable_tiling(tile["height"], tile["width"], stride["height"], stride["width"])
        note = f"tiles of {tile['height']} x {tile['width']} pixels, {stride['height']} x {stride['width']} apart"
        return self._peer(TILED, vae, note=note)

    def _distvae(self) -> Contestant:
        try:
            from distvae.vae import parallelize_decoder, parallelize_encoder
        except ImportError as error:
            raise Unavailable(f"{error}; it comes with the optional dependencies `bench`") from error
        if self.world.comm.size == 1:
            raise Unavailable("it shares work out over ranks, and there is one")
        if self.case.call == "condition":
            raise Unavailable("it has no pipeline of its own")
        vae = self.autoencoders.view(self.dtype)
        group = dist.new_group(timeout=timedelta(seconds=PEER_TIMEOUT))
        parallelize = parallelize_decoder if self.case.direction == "decode" else parallelize_encoder
        parallelize(vae, group)
        return self._peer(DISTVAE, vae, everywhere=True)

    def _roofline(self) -> Contestant:
        program = program_for(self.case.direction, self.dimensions)
        roofline = Roofline(program, self.case.worked, self.dtype, self.world.device)
        return Contestant(ROOFLINE, lambda given: roofline.measure(), False, [], roofline=roofline)

    def _ours(self, name: str, strategy: Strategy, *, alone: bool, everywhere: bool | None = None) -> Contestant:
        model = self._autoencoder()
        if alone and self._alone is not None:
            vae, weights = self._alone
        else:
            weights = CountedWeights(model)
            used: dict[Direction, Strategy] = {"encode": reference(), "decode": reference()}
            used[self.case.direction] = strategy
            group = self.world.alone if alone else None
            vae = ParallelVAE(
                model, **used, group=group, weights=weights, dtype=self.dtype, device=self.world.device
            )
        if alone:
            self._alone = vae, weights

        def stream(given: Given) -> None:
            for _ in vae.decode_stream(given.tensor):
                pass  # as a run writes it, and forgets it

        calls: dict[str, Callable[[Given], Tensor | None]] = {
            "stream": stream,
            "condition": partial(by_stage, vae),
        }
        return Contestant(
            name,
            calls.get(self.case.call) or self._call(vae),
            not alone if everywhere is None else everywhere,
            list(model.state_dict().values()),
            note=self._division(strategy),
            ledger=vae.ledger,
            plan=vae.plan(self.case.direction, self.case.worked),
            weights=weights,
        )
