"""Write docs/performance.md from the results that are kept in docs/results.

    python benchmarks/vae.py --out docs/results/NAME       # keeps vae.json there, which this program reads
    python benchmarks/denoise.py --out docs/results/NAME   # keeps denoise.json there
    python benchmarks/performance.py

The page is never edited by hand. A test fails if it differs from what this program writes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vae import ROOT, exactness, spread, table

RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "performance.md"
BESIDE = ("diffusers", "distvae", "one_rank")  # the contestants whose seconds are divided by ours

HEAD = """<!-- Written by benchmarks/performance.py from docs/results. Do not edit. -->
# Performance

`benchmarks/performance.py` writes this page from the files in `docs/results`. [bench.md](bench.md) says how the
numbers are measured. `make bench` measures everything anew in about two hours on two cores, and then writes
this page.

All numbers are from CPUs. [gpu.md](gpu.md) has the program that measures on a GPU."""

READ = """## Results by run

A ratio says how many times as fast ours is: the seconds of the other contestant divided by ours, both of the
same round. The table has the median of the rounds and the range. "Processor" is the same ratio in CPU seconds
of the busier rank, which other programs on the machine disturb less. "Peak" is ours divided by theirs, in bytes
beyond the weights."""

EARLY_VAE = """## The targets of the VAE, at commit 0d1e500

One `make bench` in a fresh clone of commit 0d1e500, before strategies became assignments. `layer_pipeline` at
the full width was run separately afterwards. The machine had two cores of an AMD EPYC (Zen 4) and one thread
per rank. Weights are random. Each number is the median of five or more interleaved rounds. This table was
copied from the reports by hand.

*Small* is the width of the toy, at 23 or 24 x 20 latents (images and the condition: 11 x 10). *Full* is the
Wan2.2 VAE, at 3 x 2 to 12 x 4 latents (images: 5 x 6). In fp32 our picture was at most 8.2e-6 from diffusers'
picture. **Bold**: target missed."""

EARLY_VAE_NOTES = """The other runs are from other hours and other EPYCs, whose cores are shared with other
users. The same work takes up to twice as long in some of them.

- **Why fp32 can beat oneDNN.** Ours computes two frames at a time with a third fewer products (Winograd). The
  gain depends on the size of the picture: at the full width it was 2.4x for 3 x 2 latents, and 1.8x to 2.2x for
  11 x 4 and 12 x 4.
- **Why two ranks stay below 2x.** A pipeline fills and drains once, and two cores share their memory. Two ranks
  that send nothing did 1.9 to 2.0 times the work of one (`one_rank_each`). `job=plan` gives 1.95x at best for
  the small width.
- **An image of 11 x 10 latents** is decoded by two ranks hardly sooner than by one.
- **Processors.** All of these have AVX-512. PyTorch has no fast bfloat16 without it. On an EPYC with AVX2 our
  decode of 3 frames of 6 x 5 latents in bfloat16 took 0.34 s, and diffusers' took 10 s (`benchmarks/vae.py
  --cases decode_bf16 --rows 6 --cols 5 --frames 3`).
- **Since then.** The commit that made strategies assignments was measured beside 0d1e500 in the same rounds.
  The bits are the same, and the seconds are 0.95 to 1.05 times those before, within the spread. An image in two
  slabs took 1.09 times as long (0.66 to 1.51). The reports: [decode](results/beside_0d1e500_decode.md),
  [encode](results/beside_0d1e500_encode.md), [spatial_shard](results/beside_0d1e500_spatial_shard.md)."""

EARLY_DENOISING = """## Denoising, at an earlier commit

Times as fast as `Cosmos3OmniPipeline` on one rank, from the prompt to the latents. In brackets: against
diffusers' denoising loop alone, without the blank clip that its pipeline sends through the VAE. 35 steps, fp32,
random weights of 4 layers, one thread per rank, medians of interleaved rounds on two CPU cores with gloo. Two
ratios in one cell are of several runs. The latents are equal in every bit. This table was copied from the
output by hand (`benchmarks/denoise.py`; last row: `--model small --clip 960`)."""


def by_hand(name: str) -> str:
    """A table that was copied into docs/results/NAME.csv before results were kept as JSON."""
    with (RESULTS / f"{name}.csv").open(newline="") as stream:
        return table(csv.reader(stream))


def about(report: Mapping[str, Any]) -> str:
    """The date, machine and command of a result."""
    machine = report["machine"]
    return (
        f"{report['date']}, commit {report['revision']}, `{report['command']}`. {machine['processor']}, "
        f"{machine['cores']} cores, load {machine['load']:.1f} before the start, torch {machine['torch']}."
    )


def vae_rows(report: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """The ratios of each of our contestants to each of the others, case by case."""
    yield "case", "ours", "ranks", "beside", "times as fast", "processor", "peak", "result"
    for name, case in report["cases"].items():
        rows = case["contestants"]
        size = f"{name}: {case['frames']} x {case['rows']} x {case['cols']}, {case['dtype']}"
        for ours, row in rows.items():
            for other in BESIDE:
                if other not in rows or ours in (other, "diffusers", "diffusers_tiled", "distvae", "roofline"):
                    continue
                clock, busy = (
                    spread([a / b for a, b in zip(rows[other][key], row[key], strict=True)])
                    for key in ("rounds", "processor")
                )
                peak = peak_bytes(row) / theirs if (theirs := peak_bytes(rows[other])) else 0
                result = exactness(row["checked"][0])
                yield size, ours, str(row["ranks"]), other, clock, busy, f"{peak:.0%}" if peak else "", result


def peak_bytes(row: Mapping[str, Any]) -> int:
    return max((int(answer.get("peak_bytes", 0)) for answer in row["checked"]), default=0)


def denoising_rows(report: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """The ratios of each way to diffusers' loop and to its whole pipeline."""
    yield "model", "vision tokens", "text tokens", "way", "seconds", "beside the loop", "beside the pipeline"
    for run in report["runs"]:
        for way, row in run["ways"].items():
            ratios = [
                spread([a / b for a, b in zip(run["ways"][other]["rounds"], row["rounds"], strict=True)])
                for other in ("diffusers loop", "diffusers pipeline")
            ]
            yield run["model"], str(run["clip"]), run["text_tokens"], way, spread(row["rounds"]), *ratios


def page(results: Path = RESULTS) -> str:
    """The whole page, in Markdown. Latest results first."""
    parts = [HEAD]
    found = [
        (json.loads(file.read_text()), rows)
        for name, rows in (("vae", vae_rows), ("denoise", denoising_rows))
        for file in sorted(results.glob(f"*/{name}.json"))
    ]
    if found:
        parts.append(READ)
    for report, rows in sorted(found, key=lambda each: str(each[0]["date"]), reverse=True):
        parts += [about(report), table(rows(report))]
    parts += [EARLY_VAE, by_hand("vae_0d1e500"), EARLY_VAE_NOTES, EARLY_DENOISING, by_hand("denoise_early")]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
