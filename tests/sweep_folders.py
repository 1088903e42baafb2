"""Folders as the jobs of a sweep leave them, without running any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def leave_run(
    folder: Path, level: int, digest: str, *, seconds: float = 2.0, size: int = 16, picture: str = "image.png"
) -> None:
    """What a run with the picture of one grey leaves in `folder`; a `picture` of another name is the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(folder / "image.png")
    wire = {
        "send": {"calls": 2, "bytes": 10},
        "recv": {"calls": 2, "bytes": 10},
        "control": {"calls": 1, "bytes": 0},
    }
    stages = {
        name: {"seconds": part, "ranks": [{"rank": 0, "peak_bytes": 5, "wire": wire}]}
        for name, part in (("denoise", seconds * 0.75), ("decode", seconds * 0.25), ("text", 0.001))
    }
    metrics = {
        "seconds": seconds,
        "peak_bytes": 7,
        "beyond_bytes": 3,
        "stages": stages,
        "picture": picture,
        "frames_sha256": digest,
        "against_replicated": {"psnr_db": None, "ssim": 0.5},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    summary = {"fits": True, "seconds.total": 1.5, "memory.peak_bytes": 6, "exactness.decode": "rounding"}
    (folder / "plan.json").write_text(json.dumps({"summary": summary}))
