"""One rank of benchmarks/vae.py. It reads commands from stdin, one JSON a line, and answers on stdout.

It uses only published names of this project, so that the same file can run an older checkout (see PYTHONPATH).
Modules that only newer checkouts have (the roofline, the seconds of ops, live bytes) are imported where they are
used.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

import cosmos3_pipeline
from cosmos3_pipeline.distributed.launch import joined_world
from cosmos3_pipeline.models.toy import make_vae
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.program import program_for
from cosmos3_pipeline.vae.strategy import StrategyError
from cosmos3_plugins.replicated import Replicated

ALONE = ("one_rank", "one_rank_each")  # our VAE in a group of one rank
# Errors that a peer raises for work that it cannot do. The report names the error, and other contestants go on.
PEER_ERRORS = (AssertionError, ValueError, RuntimeError)
PEER_TIMEOUT = 600  # seconds after which a rank stops waiting for DistVAE's other ranks
# If a picture is smaller than one of diffusers' tiles, tiles have two thirds of its size. They begin three
# quarters of a tile apart, as diffusers' tiles do. The picture must give more than one tile.
TILE_PART, STRIDE_PART, FEWEST_TILED = 2 / 3, 3 / 4, 4
# PyTorch reached 0.8 to 1.6 GFLOP/s a core in bfloat16 on processors without instructions for it. A peer that
# would take more than MOST_PLAIN_S seconds a run is left out.
PLAIN_FLOPS_PER_S, MOST_PLAIN_S = 1e9, 60
SMALL_MESSAGE, LARGE_MESSAGE, PINGS = 8, 1 << 22, 50  # bytes, bytes, how often


class Absent(Exception):
    """The reason why a contestant cannot take part."""


@dataclass
class Contestant:
    """`run(keep)` does the work once. With `keep` it returns the result on the root.

    known: tensors that do not count as its memory. vae: only for our VAE. declared: the exactness that our
    strategy declares. about: further entries for the report, after a run.
    """

    run: Callable[[bool], Tensor | None]
    everywhere: bool
    known: list[Tensor]
    vae: ParallelVAE | None = None
    declared: str = ""
    about: Callable[[], dict[str, Any]] = dict


class Rank:
    """The state of a rank between commands: the VAE, the case's input, its contestants and one rank's result."""

    def __init__(self, dimensions: Mapping[str, Any]) -> None:
        self._dimensions = dimensions
        self._models = {torch.float32: make_vae(dimensions)}
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self._alone = groups[dist.get_rank()]
        self._contestants: dict[str, Contestant] = {}
        self._reference: Tensor | None = None

    def hello(self) -> dict[str, Any]:
        """The folder of the package that this rank imports."""
        return {"package": str(Path(cosmos3_pipeline.__file__).parent)}

    def case(self, *, call: str, frames: int, rows: int, cols: int, dtype: str) -> dict[str, Any]:
        """Drop the previous case, and draw the input of this case, the same on every rank and checkout."""
        self._contestants, self._reference = {}, None
        gc.collect()  # modules have reference cycles, and at full width each holds gigabytes
        self._call, self._dtype = call, getattr(torch, dtype)
        self._models = {kept: m for kept, m in self._models.items() if kept in (self._dtype, torch.float32)}
        self._program = program_for("encode" if call == "encode" else "decode", self._dimensions)
        self._latent = (frames, rows, cols)
        generator, size = torch.Generator().manual_seed(0), (frames, rows, cols)
        if call == "encode":
            scale = self._program.spatial
            size = (self._program.picture_frames(frames), rows * scale, cols * scale)
            drawn = torch.rand(1, 3, *size, generator=generator) * 2 - 1
        else:
            drawn = torch.randn(1, self._program.z_dim, *size, generator=generator)
        self._given = drawn.to(self._dtype)
        return {}

    def make(self, *, name: str, op_seconds: str) -> dict[str, Any]:
        """Make the contestant `name` and warm it up with one run. Answers the reason if it is absent."""
        try:
            contestant = self._made(name, op_seconds)
            contestant.run(False)
        except (Absent, ImportError, StrategyError) as error:  # an older checkout may lack what a strategy imports
            return {"absent": str(error)}
        except PEER_ERRORS as error:
            if name in ("diffusers_tiled", "distvae"):
                return {"absent": f"{type(error).__name__}: {error}"}
            raise
        self._contestants[name] = contestant
        return {}

    def run(self, *, name: str) -> dict[str, Any]:
        """Run a contestant once. Answers wall-clock seconds and CPU seconds of this rank."""
        contestant = self._contestants[name]
        if contestant.everywhere:
            dist.barrier()
        began, processor = time.perf_counter(), time.process_time()
        contestant.run(False)
        return {"seconds": time.perf_counter() - began, "processor_s": time.process_time() - processor}

    def check(self, *, name: str) -> dict[str, Any]:
        """Run it untimed. Answers its memory and messages, and on the root the distance from one rank's result."""
        contestant = self._contestants[name]
        found: dict[str, Any] = {"declared": contestant.declared, **contestant.about()}
        if name == "roofline":
            return found
        ledger = None if contestant.vae is None else contestant.vae.ledger
        before = None if ledger is None else ledger.snapshot()
        try:
            from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes
        except ImportError:
            contestant.run(False)
        else:
            with LiveBytes([*contestant.known, self._given]) as live:
                contestant.run(False)
            found["peak_bytes"] = live.peak
        if ledger is not None and before is not None:
            counted = ledger.since(before)
            found |= {"sent_bytes": counted.sent_bytes, "sent_messages": counted.sent_messages}
        result = contestant.run(True)
        if result is not None and dist.get_rank() == 0:
            found |= self._against_one_rank(name, result)
        return found

    def _against_one_rank(self, name: str, result: Tensor) -> dict[str, Any]:
        if name == "one_rank":
            self._reference = result
        found: dict[str, Any] = {"digest": _digest(result)}
        expected = self._reference
        if expected is None or expected.shape != result.shape or expected.dtype != result.dtype:
            return found
        off = (result.double() - expected.double()).abs_()
        found |= {"max_abs": float(off.max()), "mean_square": float(off.square().mean())}
        found |= {"range": float(expected.max()) - float(expected.min())}
        return found | {"equal": torch.equal(result, expected)}

    def ops(self, *, rounds: int) -> dict[str, Any]:
        """The seconds of each op of the decoder on this rank alone, on frames of the case's size."""
        from op_seconds import op_seconds

        frames, rows, cols = self._latent
        alone = op_seconds(self._models[torch.float32], self._alone, rows, cols, rounds, image=frames == 1)
        return {"latent_rows": rows, "latent_cols": cols, "alone": alone}

    def link(self) -> dict[str, Any]:
        """The cost of a message between the first two ranks, one way: the arguments of `clock.Link`."""
        from cosmos3_pipeline.distributed.comm import Comm

        comm = Comm()
        with comm.run():
            (latency, busy), (arrival, busy_large) = (
                _one_way(comm, size) for size in (SMALL_MESSAGE, LARGE_MESSAGE)
            )
        return {
            "latency_s": latency,
            "bytes_per_s": LARGE_MESSAGE / max(arrival - latency, 1e-9),
            "busy_s": busy,
            "busy_s_per_byte": max(busy_large - busy, 0.0) / LARGE_MESSAGE,
        }

    # ------------------------------------------------------------------------------------------------- contestants
    def _made(self, name: str, op_seconds: str) -> Contestant:
        if name in ("diffusers", "diffusers_tiled", "distvae"):
            self._refuse_hours()
        if name == "diffusers":
            return self._peer(self._model())
        if name == "diffusers_tiled":
            return self._tiled()
        if name == "distvae":
            return self._distvae()
        if name == "roofline":
            return self._roofline()
        strategy: Any = Replicated() if name in ALONE else _strategy(name)
        if op_seconds and getattr(strategy, "op_seconds", None) == "":
            strategy = replace(strategy, op_seconds=op_seconds)
        group = self._alone if name in ALONE else None
        vae = ParallelVAE(self._model(), encode=Replicated(), decode=Replicated(), group=group)
        if name not in ALONE:
            other = {"encode": Replicated(), "decode": Replicated(), self._program.direction: strategy}
            vae = ParallelVAE(self._model(), **other)
        known = list(self._model().state_dict().values())
        return Contestant(self._call_of(vae), name != "one_rank", known, vae, str(strategy.exactness))

    def _call_of(self, vae: Any) -> Callable[[bool], Tensor | None]:
        """The call of the case, on an `AutoencoderKLWan` or a VAE with the same methods."""
        given = self._given
        if self._call == "encode":
            return lambda keep: vae.encode(given).latent_dist.mode()
        if self._call == "stream" and isinstance(vae, ParallelVAE):

            def stream(keep: bool) -> Tensor | None:
                kept = [frames for frames in vae.decode_stream(given) if keep]
                return torch.cat(kept) if kept else None

            return stream
        return lambda keep: vae.decode(given).sample

    def _model(self) -> AutoencoderKLWan:
        """The VAE in the case's dtype. Callers must not change it."""
        if self._dtype not in self._models:
            self._models[self._dtype] = _view(self._models[torch.float32], self._dtype)
        return self._models[self._dtype]

    def _refuse_hours(self) -> None:
        from cosmos3_pipeline.vae.kernels import arithmetic_dtype
        from cosmos3_pipeline.vae.ops import LatentShape

        seconds = self._program.flops(LatentShape(1, *self._latent)) / PLAIN_FLOPS_PER_S
        if arithmetic_dtype(self._dtype, torch.device("cpu")) != self._dtype and seconds > MOST_PLAIN_S:
            raise Absent(f"no instructions for {self._dtype} here: each run would take some {seconds:.0f} s")

    def _peer(self, vae: AutoencoderKLWan, *, everywhere: bool = False, note: str = "") -> Contestant:
        about = {"note": note} if note else {}
        return Contestant(self._call_of(vae), everywhere, list(vae.state_dict().values()), about=about.copy)

    def _tiled(self) -> Contestant:
        vae, (_, rows, cols) = _view(self._model(), self._dtype), self._latent
        step, latents = vae.spatial_compression_ratio, {"height": rows, "width": cols}
        tile = {axis: getattr(vae, f"tile_sample_min_{axis}") for axis in latents}
        stride = {axis: getattr(vae, f"tile_sample_stride_{axis}") for axis in latents}
        if all(n * step <= tile[axis] for axis, n in latents.items()):
            if max(rows, cols) < FEWEST_TILED:
                raise Absent(f"{rows} x {cols} latents are no more than one tile")
            for axis, n in latents.items():
                if n >= FEWEST_TILED:
                    part = math.ceil(TILE_PART * n)
                    tile[axis], stride[axis] = part * step, max(1, int(STRIDE_PART * part)) * step
        vae.enable_tiling(tile["height"], tile["width"], stride["height"], stride["width"])
        note = f"tiles of {tile['height']} x {tile['width']} pixels, {stride['height']} x {stride['width']} apart"
        return self._peer(vae, note=note)

    def _distvae(self) -> Contestant:
        try:
            from distvae.vae import parallelize_decoder, parallelize_encoder
        except ImportError as error:
            raise Absent(f"{error}; it comes with the optional dependencies `bench`") from error
        if dist.get_world_size() == 1:
            raise Absent("it shares work out over ranks, and there is one")
        vae = _view(self._model(), self._dtype)
        group = dist.new_group(timeout=timedelta(seconds=PEER_TIMEOUT))
        (parallelize_encoder if self._call == "encode" else parallelize_decoder)(vae, group)
        return self._peer(vae, everywhere=True)

    def _roofline(self) -> Contestant:
        from roofline import Roofline

        from cosmos3_pipeline.vae.ops import LatentShape

        line = Roofline(self._program, LatentShape(1, *self._latent), self._dtype, torch.device("cpu"))
        return Contestant(lambda keep: line.measure(), False, [], about=line.about)


def _strategy(name: str) -> Any:
    """The installed strategy `name`, or the class `module:Class`, with its default settings."""
    if ":" in name:
        return resolve_name(name)()
    points = {point.name: point for point in entry_points(group="cosmos3_pipeline.plugins")}
    if name not in points:
        raise Absent(f"no strategy {name}; installed are {', '.join(sorted(points))}")
    return points[name].load()()


def _view(model: AutoencoderKLWan, dtype: torch.dtype) -> AutoencoderKLWan:
    """A VAE with separate modules and the weights of `model`. It shares weights that are already in `dtype`."""
    with torch.device("meta"):
        other = AutoencoderKLWan.from_config(model.config)
    other.load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()}, assign=True)
    return other.eval().requires_grad_(False)


def _digest(result: Tensor) -> str:
    return hashlib.sha256(result.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _one_way(comm: Any, size: int) -> tuple[float, float]:
    """Half of a round trip of `size` bytes: wall-clock seconds (median) and CPU seconds of this rank (mean)."""
    if comm.rank > 1:
        return 0.0, 0.0
    ball, peer = torch.zeros(size, dtype=torch.uint8), 1 - comm.rank
    ways = [{"sends": [(ball, peer)]}, {"receives": [(ball, peer)]}]
    seconds, processor = [], time.process_time()
    for _ in range(PINGS):
        started = time.perf_counter()
        for way in ways if comm.rank == 0 else ways[::-1]:
            comm.exchange(**way).wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / 2, (time.process_time() - processor) / PINGS / 2


def _pin(threads: int) -> None:
    """Pin this process to its own cores, if there are enough.

    Linux wakes a rank on the core of the rank whose message it waited for. On two cores the ranks would take
    turns.
    """
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if ranks * threads <= len(cores):
            os.sched_setaffinity(0, cores[local * threads : (local + 1) * threads])


def main() -> None:
    """Answer commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # text that libraries print goes to stderr, because stdout is for answers
    threads = int(sys.argv[2])
    _pin(threads)
    diffusers_logging.set_verbosity_error()
    with joined_world(device="cpu", threads=threads), torch.no_grad():
        rank = Rank(json.loads(sys.argv[1]))
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = getattr(rank, command.pop("do"))(**command)
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
