"""docs/architecture.md lists the files that a latent passes; a run is traced and compared with it."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import FrameType

from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.jobs.generate import generate
from cosmos3_pipeline.jobs.start import prepare

ROOT = Path(__file__).parents[2]


def listed() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\d+\. `(.+?\.py)`", text, flags=re.MULTILINE)


def test_a_latent_passes_the_listed_files_in_their_order(tmp_path: Path) -> None:
    files = listed()
    assert 0 < len(files) <= 12
    named = {str(ROOT / name): name for name in files}
    seen: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        name = named.get(frame.f_code.co_filename)
        # Modules and bodies of classes run too, when they are imported, and constructors are given no latent.
        function = frame.f_code.co_flags & inspect.CO_OPTIMIZED and frame.f_code.co_name != "__init__"
        if event == "call" and name and name not in seen and function:
            seen.append(name)
            if len(seen) == len(named):
                sys.setprofile(None)

    prepared = prepare(compose(["task.num_frames=5", "sampler.steps=1", "vae.parallel_decode=true"]))
    sys.setprofile(note)
    try:
        generate(prepared, tmp_path)
    finally:
        sys.setprofile(None)
    assert seen == files
