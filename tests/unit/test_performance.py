"""docs/performance.md is what benchmarks/performance.py makes of the results that are kept in docs/results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def row(seconds: list[float], peak: int, **checked: object) -> dict[str, object]:
    return {"ranks": 1, "rounds": seconds, "processor": seconds, "checked": [{"peak_bytes": peak, **checked}]}


def test_the_page_is_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("performance", "vae", "simulate")  # of which another test may have its own
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import performance

    assert performance.PAGE.read_text() == performance.page()

    contestants = {"diffusers": row([4.0, 6.0, 8.0], 100), "one_rank": row([2.0, 2.0, 2.0], 50, equal=True)}
    size = {"call": "decode", "frames": 8, "rows": 6, "cols": 5, "dtype": "float32"}
    case = {**size, "contestants": contestants}
    slower = {**size, "contestants": {**contestants, "layer_pipeline": row([2.5, 2.5, 2.5], 50, equal=True)}}
    machine = {"processor": "EPYC", "cores": 2, "load": 0.25, "torch": "2.13.0"}
    report = {
        "date": "2026-12-01",
        "revision": "abc",
        "command": "c",
        "machine": machine,
        "cases": {"decode": case, "layer_pipeline": slower},
    }
    (tmp_path / "now").mkdir()
    (tmp_path / "now" / "vae.json").write_text(json.dumps(report))
    made = performance.page(tmp_path)
    ratio = "3.00 (2.00 to 4.00)"
    assert (
        f"| decode: 8 x 6 x 5, float32 | one_rank | 1 | diffusers | {ratio} | 1.5x | {ratio} | 50% | bitwise |"
        in made
    )
    missed = "| layer_pipeline | 1 | one_rank | **0.80 (0.80 to 0.80)** | 1.85x |"
    assert missed in made and "No result is kept yet of: `decode_bf16`, `spatial_shard`," in made
    assert "EPYC, 2 cores, load 0.2 before the start" in made

    # Bytes round to the next level, and then a frame is far below the PSNR of a rounded float.
    off = {"equal": False, "psnr_db": 97.0, "max_abs": 1.0}
    assert [performance.exactness(off, call) for call in ("stream", "decode")] == ["rounding", "97 dB"]
    assert performance.exactness({**off, "max_abs": 2.0}, "stream") == "97 dB"
    for name in names:
        sys.modules.pop(name, None)
