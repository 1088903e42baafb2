"""Compares denoising with diffusers: 35 steps of text-to-video, one thread per rank, runs interleaved, medians.

    python benchmarks/denoise.py [--model small|medium|wide] [--clip 75|490|960] [--repeats 5] [--out DIR]

Random weights, fp32. Two baselines, both diffusers on one rank, because they answer different questions:
  loop      its modular denoising workflow with its own denoiser block: the same work as ours and nothing else
  pipeline  `Cosmos3OmniPipeline` up to the latents: it also encodes a blank clip through the VAE, even for
            text-to-video. The share of this encode depends on the VAE and the number of steps
If the ratio to the pipeline is larger than the ratio to the loop, the reason is the VAE encode that is not done,
not faster denoising.

Prints wall-clock seconds and the ratio to each baseline (median of the rounds, with the range for the loop), and
the same in CPU seconds of the busier rank. CPU seconds do not count waiting for messages or other programs. On a
busy machine they vary less, but for two ranks only wall-clock seconds show the gain. With --out the seconds of
every round are written to denoise.json, which benchmarks/performance.py reads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.distributed.launch import joined_world, run_ranks
from cosmos3_pipeline.distributed.mesh import RankMesh

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cosmos_models import denoise_with, tiny_pipeline
from vae import heading

MODELS: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
    "medium": {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    "wide": {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
}
# height, width (pixels), frames; vision tokens are 75, 490 and 960
CLIPS = {75: (96, 160, 17), 490: (320, 448, 13), 960: (320, 512, 21)}
PROMPT = "A red kite rises over a wide green valley while the camera follows it slowly. " * 3
NEGATIVE = {"empty": "", "long": "Blurry, shaking, grey, distorted, overexposed, with text and borders. " * 4}
WAYS = ("diffusers loop", "diffusers pipeline", "ours, 1 rank", "ours, 2 ranks")


def one_run(way: str, pipeline: Any, negative: str, clip: int, steps: int, mesh: RankMesh) -> torch.Tensor:
    """The final latents that one of the WAYS makes from the prompt."""
    height, width, num_frames = CLIPS[clip]
    words = {"prompt": PROMPT, "negative_prompt": NEGATIVE[negative], "use_system_prompt": False}
    size = {"height": height, "width": width, "num_frames": num_frames}
    if way == "diffusers pipeline":
        generator = torch.Generator("cpu").manual_seed(0)
        made = pipeline(**words, **size, num_inference_steps=steps, output_type="latent", generator=generator)
        assert isinstance(made.video, torch.Tensor)
        return made.video
    denoiser = None
    if way != "diffusers loop":
        denoiser = ParallelLoopDenoiser(mesh if way == "ours, 2 ranks" else None)
    ids = pipeline.tokenize_prompt(**words, **size)
    latent: torch.Tensor = denoise_with(
        denoiser, pipeline, prompt_ids=ids, **size, steps=steps, guidance_scale=6.0, seed=0
    )
    return latent


def measure(
    model: str, clips: list[int], repeats: int, steps: int, out: Path | None, head: dict[str, Any]
) -> None:
    """Measure on two ranks. Every round runs each way once; the second rank waits if a way needs only one.

    out: the folder for denoise.json, which begins with `head`.
    """
    runs: list[dict[str, Any]] = []
    with joined_world(device="cpu", threads=1):
        mesh = RankMesh.build(cfg=2)
        size = MODELS[model]
        pipeline = tiny_pipeline(num_hidden_layers=4, intermediate_size=3 * size["hidden_size"], **size)
        for clip in clips:
            for negative in NEGATIVE:
                seconds: dict[str, list[float]] = {way: [] for way in WAYS}
                cpu: dict[str, list[float]] = {way: [] for way in WAYS}
                made: dict[str, torch.Tensor] = {}
                for repeat in range(repeats + 1):
                    for way in WAYS:
                        dist.barrier()
                        started, busy = time.perf_counter(), time.process_time()
                        if way == "ours, 2 ranks" or dist.get_rank() == 0:
                            # the first round warms up, with two steps
                            made[way] = one_run(way, pipeline, negative, clip, steps if repeat else 2, mesh)
                        used = torch.tensor(time.process_time() - busy)
                        dist.all_reduce(used, dist.ReduceOp.MAX)  # returns when both ranks are done
                        if repeat:
                            seconds[way].append(time.perf_counter() - started)
                            cpu[way].append(used.item())
                if dist.get_rank() == 0:
                    texts = report(model, clip, negative, pipeline, seconds, cpu, made)
                    ways = {way: {"rounds": seconds[way], "processor": cpu[way]} for way in WAYS}
                    runs.append({"model": model, "clip": clip, "text_tokens": texts, "ways": ways})
                    if out is not None:
                        (out / "denoise.json").write_text(json.dumps({**head, "runs": runs}, indent=1))


def ratios(baseline: list[float], ours: list[float]) -> list[float]:
    return [theirs / mine for theirs, mine in zip(baseline, ours, strict=True)]


def report(
    model: str,
    clip: int,
    negative: str,
    pipeline: Any,
    seconds: dict[str, list[float]],
    cpu: dict[str, list[float]],
    made: dict[str, torch.Tensor],
) -> str:
    """Print the ratios of one clip. Returns the lengths of its two texts in tokens."""
    height, width, num_frames = CLIPS[clip]
    words = {"prompt": PROMPT, "negative_prompt": NEGATIVE[negative], "use_system_prompt": False}
    ids = pipeline.tokenize_prompt(**words, height=height, width=width, num_frames=num_frames)
    texts = f"{len(ids[0])} + {len(ids[1])}"
    print(f"{model}: {clip} vision tokens, {texts} text tokens")
    for way in WAYS:
        loop, whole = ratios(seconds[WAYS[0]], seconds[way]), ratios(seconds[WAYS[1]], seconds[way])
        busy = ratios(cpu[WAYS[0]], cpu[way])
        difference = (made[way] - made["diffusers loop"]).abs().max().item()
        print(
            f"  {way:18} {statistics.median(seconds[way]):7.3f} s   {statistics.median(loop):5.2f}x the loop"
            f" ({min(loop):.2f} to {max(loop):.2f}), {statistics.median(whole):5.2f}x the pipeline;"
            f" CPU {statistics.median(cpu[way]):7.3f} s, {statistics.median(busy):5.2f}x the loop"
            f" ({min(busy):.2f} to {max(busy):.2f})"
            f"; latents differ by {difference:.1e}",
            flush=True,
        )
    return texts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="medium")
    parser.add_argument("--clip", choices=CLIPS, type=int, help="vision tokens; without it, all sizes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--out", type=Path, help="a folder for denoise.json")
    given = parser.parse_args()
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    os.environ["TQDM_DISABLE"] = "1"  # no bars of diffusers; ranks read the variable when they start
    clips = [given.clip] if given.clip else list(CLIPS)
    run_ranks(measure, given.model, clips, given.repeats, given.steps, given.out, heading("denoise.py"), ranks=2)
