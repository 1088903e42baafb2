"""Write docs/performance.md from the results that are kept in docs/results.

    python benchmarks/vae.py --out docs/results/NAME       # keeps vae.json there, which this program reads
    python benchmarks/denoise.py --out docs/results/NAME   # keeps denoise.json there
    python benchmarks/performance.py

The page is never edited by hand. A test fails if it differs from what this program writes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vae import CASES, ROOT, exactness, spread, table

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
same round. The table has the median of the rounds and the range. A ratio in **bold** misses its target.
"Processor" is the same ratio in CPU seconds of the busier rank, which other programs on the machine disturb
less. "Peak" is ours divided by theirs, in bytes beyond the weights."""

NOT_KEPT = """No result is kept yet of: {}. `make bench` measures them.

Until commit 8d8aa7a this page had tables that were copied by hand (`git show 8d8aa7a:docs/performance.md`). In
some of those runs two ranks missed their targets of 1.75x and 1.85x."""

COMPARED = """## Versions compared

Each report has two versions of this project, measured in the same rounds by `benchmarks/vae.py --old`."""

NOTES = """## How to read the numbers

- **Why fp32 can beat oneDNN.** Ours computes two frames at a time with a third fewer products (Winograd). The
  gain depends on the size of the picture.
- **Why two ranks stay below 2x.** A pipeline fills and drains once, and two cores share their memory. The
  contestant `one_rank_each` shows how much work two ranks do that send nothing.
- **Processors.** PyTorch has no fast bfloat16 without AVX-512. On a processor without it, diffusers' decode in
  bfloat16 takes many times as long as ours
  (`benchmarks/vae.py --cases decode_bf16 --rows 6 --cols 5 --frames 3`)."""

# How many times as fast our contestant must be as the other one, by case of benchmarks/vae.py.
TARGETS = {
    "decode": {("one_rank", "diffusers"): 1.5},
    "decode_bf16": {("one_rank", "diffusers"): 1.35},
    "image_decode": {("one_rank", "diffusers"): 2.0},
    "image_encode": {("one_rank", "diffusers"): 2.0},
    "layer_pipeline": {
        ("layer_pipeline", "one_rank"): 1.85,
        ("layer_pipeline", "diffusers"): 2.7,
        ("layer_pipeline", "distvae"): 1.6,
    },
    "spatial_shard": {("spatial_shard", "one_rank"): 1.75},
    "spatial_shard_even": {("spatial_shard", "one_rank"): 1.75, ("spatial_shard", "distvae"): 1.4},
}


def about(report: Mapping[str, Any]) -> str:
    """The date, machine and command of a result."""
    machine = report["machine"]
    return (
        f"{report['date']}, commit {report['revision']}, `{report['command']}`. {machine['processor']}, "
        f"{machine['cores']} cores, load {machine['load']:.1f} before the start, torch {machine['torch']}."
    )


def vae_rows(report: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """The ratios of each of our contestants to each of the others, case by case."""
    yield "case", "ours", "ranks", "beside", "times as fast", "target", "processor", "peak", "result"
    for name, case in report["cases"].items():
        rows = case["contestants"]
        size = f"{name}: {case['frames']} x {case['rows']} x {case['cols']}, {case['dtype']}"
        for ours, row in rows.items():
            for other in BESIDE:
                if other not in rows or ours in (other, "diffusers", "diffusers_tiled", "distvae", "roofline"):
                    continue
                ratios, busy = (
                    [a / b for a, b in zip(rows[other][key], row[key], strict=True)]
                    for key in ("rounds", "processor")
                )
                target = TARGETS.get(name, {}).get((ours, other))
                clock = spread(ratios)
                if target is not None and statistics.median(ratios) < target:
                    clock = f"**{clock}**"
                peak = peak_bytes(row) / theirs if (theirs := peak_bytes(rows[other])) else 0
                yield (
                    *(size, ours, str(row["ranks"]), other, clock),
                    *(f"{target}x" if target else "", spread(busy), f"{peak:.0%}" if peak else ""),
                    exactness(row["checked"][0], case["call"]),
                )


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
    if absent := [*not_kept(report for report, _ in found)]:
        parts.append(NOT_KEPT.format(", ".join(absent)))
    if reports := sorted(results.glob("*.md")):
        parts += [COMPARED, "\n".join(f"- [{file.stem}](results/{file.name}): {ran(file)}" for file in reports)]
    return "\n\n".join([*parts, NOTES]) + "\n"


def not_kept(reports: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The cases of the benchmarks that no report has."""
    cases, denoising = set[str](), False
    for report in reports:
        cases |= set(report.get("cases", ()))
        denoising |= "runs" in report
    yield from (f"`{case}`" for case in CASES if case not in cases)
    if not denoising:
        yield "denoising"


def ran(report: Path) -> str:
    """When and how a report of benchmarks/vae.py was measured: its first paragraph."""
    return report.read_text().split("\n\n")[1]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
