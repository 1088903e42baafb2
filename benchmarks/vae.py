"""VAE decode against diffusers: one thread per rank, runs interleaved, medians, in one group of two ranks.

    python benchmarks/vae.py [--width small|full] [--frames 3 16] [--rows 11] [--cols 10] [--repeats 5]

Random weights, fp32. `AutoencoderKLWan` and our own one rank run on rank 0 while rank 1 waits; `layer_pipeline`
and `spatial_shard` run on both. Ratios are medians over the rounds, to the same round's diffusers (with their
spread) and to our own one rank. Full width is the Wan2.2 VAE of Cosmos3, and takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.distributed.launch import joined_world, run_ranks
from cosmos3_pipeline.plan.vae import plain
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.strategy import Strategy
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from vae_models import make_vae, vae_config

MODELS = {"small": "toy", "full": "nano"}  # the options of conf/model with these widths
BASELINE, ONE_RANK = "diffusers", "ours, 1 rank"


def measure(width: str, lengths: list[int], rows: int, cols: int, repeats: int) -> None:
    """Every round runs each contestant once, on the ranks that it needs."""
    with joined_world(device="cpu", threads=1), torch.no_grad():
        model = make_vae(vae_config(plain(compose([f"model={MODELS[width]}"]).model.vae)))
        alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]

        def ours(strategy: Strategy, group: dist.ProcessGroup | None) -> Callable[[Tensor], Tensor]:
            vae = ParallelVAE(model, Replicated(), strategy, group)
            return lambda z: vae.decode(z).sample

        contestants: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
            BASELINE: (lambda z: model.decode(z).sample, 1),
            ONE_RANK: (ours(Replicated(), alone), 1),
            "layer_pipeline, 2 ranks": (ours(LayerPipeline(), None), 2),
            "spatial_shard, 2 ranks": (ours(SpatialShard(), None), 2),
        }
        for frames in lengths:
            z = torch.randn(1, model.config.z_dim, frames, rows, cols, generator=torch.Generator().manual_seed(0))
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            made: dict[str, Tensor] = {}
            for repeat in range(repeats + 1):
                for name, (decode, ranks) in contestants.items():
                    dist.barrier()
                    started = time.perf_counter()
                    if dist.get_rank() < ranks:
                        made[name] = decode(z)
                    dist.barrier()  # returns when both ranks are done
                    if repeat:  # the first round warms up
                        seconds[name].append(time.perf_counter() - started)
            if dist.get_rank() == 0:
                report(f"{width} width, {frames} latent frames of {rows} x {cols}", seconds, made)


def report(title: str, seconds: dict[str, list[float]], made: dict[str, Tensor]) -> None:
    print(title)
    for name, taken in seconds.items():
        to_diffusers = [theirs / mine for theirs, mine in zip(seconds[BASELINE], taken, strict=True)]
        to_one = [theirs / mine for theirs, mine in zip(seconds[ONE_RANK], taken, strict=True)]
        spread = f"{min(to_diffusers):.2f} to {max(to_diffusers):.2f}"
        furthest = (made[name] - made[BASELINE]).abs().max()
        print(
            f"  {name:24} {statistics.median(taken):7.3f} s  {statistics.median(to_diffusers):5.2f}x diffusers "
            f"({spread}), {statistics.median(to_one):5.2f}x our one rank; differs by {furthest:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=MODELS, default="small")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 3, 16], help="latent frames of each clip")
    parser.add_argument("--rows", type=int, default=11, help="latent rows")
    parser.add_argument("--cols", type=int, default=10, help="latent columns")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    run_ranks(measure, given.width, given.frames, given.rows, given.cols, given.repeats, ranks=2)
