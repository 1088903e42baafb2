"""Measures the cost of streaming and sharding: denoising with each placement of the weights, interleaved, medians.

    python benchmarks/weights.py [--ranks 2] [--hidden 512] [--clip 320x512x21] [--steps 4] [--repeats 5]

It writes a temporary checkpoint of random bf16 weights. Every round runs each placement once on the same ranks,
with one thread per rank. Loading is not timed. Writes weights.json and weights.md to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.config.schema import Placement, SamplerConfig
from cosmos3_pipeline.distributed.launch import joined_world, run_ranks
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.models.layouts import LAYOUTS
from cosmos3_pipeline.models.make_checkpoint import numbers_of
from cosmos3_pipeline.models.maker import write_checkpoint
from cosmos3_pipeline.planning.weights import WeightsPlan
from cosmos3_pipeline.stages.denoise import DenoiseStage
from cosmos3_pipeline.stages.text import TextStage

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy_runs import PROMPT, clip_of, components, context_of, task_config


def on_rank(folder: str, asked: dict[str, Any], out: str) -> None:
    with joined_world(device="cpu", threads=1):
        ranks = asked["ranks"]
        mesh = RankMesh.build(ulysses=ranks)
        width, height, frames = map(int, asked["clip"].split("x"))
        sampler = SamplerConfig(steps=asked["steps"], guidance_scale=6.0, seed=0)
        kinds = [Placement.resident, Placement.streamed, *[Placement.sharded] * (ranks > 1)]
        parts = {
            kind: components(
                inspect_checkpoint(folder),
                dtype=torch.bfloat16,
                mesh=mesh,
                weights=WeightsPlan(kind, resident_layers=0, keep_text=False, stays=True),
            )
            for kind in kinds
        }
        seconds: dict[str, list[float]] = {kind.value: [] for kind in kinds}
        for number in range(asked["repeats"] + 1):
            for kind in kinds:
                context = context_of(parts[kind], clip_of(height, width, frames), Path(folder), mesh=mesh)
                TextStage(task_config(prompt=PROMPT), sampler)(context)
                parts[kind].load_vision()
                if dist.is_initialized():
                    dist.barrier()
                started = time.perf_counter()
                DenoiseStage(sampler, stays=True)(context)
                if number:  # the first round warms up
                    seconds[kind.value].append(time.perf_counter() - started)
        if mesh.rank("ulysses") == 0:
            Path(out).write_text(json.dumps(seconds), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--clip", default="512x320x21", help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/weights"))
    asked = vars(parser.parse_args())
    out = asked.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        numbers = numbers_of(LAYOUTS["nano"], full_size=False)
        numbers["transformer"] |= {
            "hidden_size": asked["hidden"],
            "num_hidden_layers": asked["layers"],
            "num_attention_heads": asked["hidden"] // 64,
            "num_key_value_heads": asked["hidden"] // 128,
            "head_dim": 64,
            "intermediate_size": 3 * asked["hidden"],
        }
        write_checkpoint(Path(folder) / "nano", LAYOUTS["nano"], **numbers)
        timed = out / "seconds.json"
        run_ranks(on_rank, str(Path(folder) / "nano"), asked, str(timed), ranks=asked["ranks"])
        seconds = json.loads(timed.read_text(encoding="utf-8"))
    lines = ["| weights | denoising s | beside resident |", "|---|---:|---:|"]
    for kind, own in seconds.items():
        ratios = sorted(one / other for one, other in zip(own, seconds["resident"], strict=True))
        lines.append(
            f"| {kind} | {statistics.median(own):.2f} | {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}) |"
        )
    (out / "weights.json").write_text(json.dumps({**asked, "seconds": seconds}, indent=2) + "\n", encoding="utf-8")
    (out / "weights.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
