"""Reads the results that a job left in its folder, in one form for all jobs: measured by a run, or planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cosmos3_pipeline.config.schema import JobName
from cosmos3_pipeline.distributed.ledger import SENDING
from cosmos3_pipeline.jobs.prompts import INDEX_FILE


def measured(folder: Path, job: str) -> dict[str, Any]:
    """Seconds, bytes and the picture of the `job` that left its files in `folder`, as plain values for JSON.

    `planned` is the summary of the job's plan. For job=plan, seconds and bytes are the planned ones. For a prompt
    file they include all its clips, and there is no picture. `folder` may also be the folder of one clip of a
    prompt file; the plan is then in its parent. Empty if the job leaves no such results.
    """
    if job == JobName.plan.value:
        return _of_plan(_read(folder / "plan.json")["summary"]) if (folder / "plan.json").is_file() else {}
    if job != JobName.generate.value:
        return {}
    several = (folder / INDEX_FILE).is_file()
    folders = [folder / line["folder"] for line in _read(folder / INDEX_FILE)["lines"]] if several else [folder]
    clips = [_read(each / "metrics.json") for each in folders]
    plan = next(file for file in (folder / "plan.json", folder.parent / "plan.json") if file.is_file())
    found: dict[str, Any] = {
        "planned": _read(plan)["summary"],
        "clips": len(clips),
        "seconds": {name: sum(clip["stages"][name]["seconds"] for clip in clips) for name in clips[0]["stages"]},
        "total_seconds": sum(clip["seconds"] for clip in clips),
        "peak_bytes": max(clip["peak_bytes"] for clip in clips),
        "beyond_bytes": max(clip["beyond_bytes"] for clip in clips),
        "sent_bytes": sum(_sent(clip) for clip in clips),
    }
    if not several and clips[0]["picture"] is not None:
        found |= {"picture": clips[0]["picture"], "frames_sha256": clips[0]["frames_sha256"]}
    return found


def _of_plan(summary: dict[str, Any]) -> dict[str, Any]:
    def part(kind: str, suffix: str = "") -> dict[str, Any]:
        keys = [key for key in summary if key.startswith(f"{kind}.") and key.endswith(suffix)]
        return {key.removeprefix(f"{kind}.").removesuffix(suffix): summary[key] for key in keys}

    seconds = part("seconds")
    return {
        "planned": summary,
        "total_seconds": seconds.pop("total"),
        "seconds": seconds,
        "peak_bytes": summary["memory.peak_bytes"],
        "sent_bytes": sum(part("wire", "_bytes").values()),
    }


def _sent(clip: dict[str, Any]) -> int:
    """Payload bytes that all ranks sent together."""
    return sum(
        count["bytes"]
        for stage in clip["stages"].values()
        for rank in stage["ranks"]
        for kind, count in rank["wire"].items()
        if kind in SENDING
    )


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
