"""Runs a checkpoint of the published size on this machine: one picture with each placement of its weights.

    python benchmarks/full_size.py --layout nano --folder /data/nano      # an image of 256x256 in two steps
    python benchmarks/full_size.py --layout edge --folder /data/edge      # five frames of 832x480 in two steps

Writes random bf16 weights in the layout to --folder (29 GB for Nano, 7 GB for Edge), unless the folder has them.
Then it runs `launch.py` with each placement, one after the other. The results are printed, and written to --out as
JSON and as a table: planned and measured peaks of resident memory, the seconds of each stage, and whether the
latents are bitwise the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).parents[1] / "launch.py"
SMALL = {
    "nano": ("task=t2i", "task.height=256", "task.width=256"),
    "edge": ("task=t2v", "task.height=480", "task.width=832", "task.num_frames=5"),
}
GB = 1e9


def make_checkpoint(layout: str, folder: Path) -> None:
    if (folder / "model_index.json").exists():
        return
    command = [sys.executable, "-m", "cosmos3_pipeline", "make-checkpoint", "--layout", layout, "--full-size"]
    subprocess.run([*command, str(folder)], check=True)


def run(layout: str, folder: Path, placement: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Do one run. Returns its measurements."""
    said = [
        f"model={layout}",
        f"model.path={folder}",
        *SMALL[layout],
        f"weights={placement}",
        "sampler.steps=2",
        "output.latents=true",
        f"hydra.run.dir={out}",
        *overrides,
    ]
    subprocess.run([sys.executable, str(LAUNCH), *said], check=True)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    stages = metrics["stages"]
    return {
        "placement": placement,
        "peak_gb": metrics["peak_bytes"] / GB,
        "peak_gb_of_stage": {name: stages[name]["ranks"][0]["peak_bytes"] / GB for name in stages},
        "planned_gb": plan["memory"]["peak_bytes"] / GB,
        "seconds": {name: stages[name]["seconds"] for name in stages},
        "latents_sha256": hashlib.sha256((out / "latents.safetensors").read_bytes()).hexdigest(),
        "command": " ".join(["python", "launch.py", *said]),
    }


def table(found: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    stages = list(found["runs"][0]["seconds"])
    columns = ["weights", "peak GB", "planned GB", *(f"{name} s" for name in stages), "latents"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for one in found["runs"]:
        cells = [one["placement"], f"{one['peak_gb']:.2f}", f"{one['planned_gb']:.2f}"]
        cells += [f"{one['seconds'][name]:.1f}" for name in stages] + [one["latents_sha256"][:12]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=SMALL, default="nano")
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoint")
    parser.add_argument("--placements", default="streamed,resident")
    parser.add_argument("--out", type=Path, default=Path("outputs/full_size"))
    parser.add_argument("overrides", nargs="*", help="for every run, such as topology.threads_per_rank=2")
    asked = parser.parse_args()
    make_checkpoint(asked.layout, asked.folder)
    runs = [
        run(asked.layout, asked.folder, placement, asked.out / f"{asked.layout}_{placement}", asked.overrides)
        for placement in asked.placements.split(",")
    ]
    found = {
        "layout": asked.layout,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "same_bits": len({one["latents_sha256"] for one in runs}) == 1,
        "runs": runs,
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"{asked.layout}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (asked.out / f"{asked.layout}.md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))
    if not found["same_bits"]:
        sys.exit("the placements made different latents")


if __name__ == "__main__":
    main()
