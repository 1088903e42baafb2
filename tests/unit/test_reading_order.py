"""docs/architecture.md lists the files that a latent passes, and their helpers; a run is traced and compared."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.jobs.generate import generate
from cosmos3_pipeline.jobs.start import prepare

ROOT = Path(__file__).parents[2]


TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# They are given weights or the prompt's tensors.
NO_LATENTS = {"denoise/texts.py", "models/reading.py", "models/loading.py"}


def listed() -> list[str]:
    return re.findall(r"^\d+\. `(.+?\.py)`", TEXT, flags=re.MULTILINE)


def helpers() -> set[str]:
    (paragraph,) = re.findall(r"^They call helpers.+?\n\n", TEXT, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`(.+?\.py)`", paragraph))


def may_be_latent(value: Any) -> bool:
    """Whether it is a tensor, or a sequence of tensors, as large as this run's latents."""
    values = value[:4] if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(one, torch.Tensor) and one.dim() >= 3 and one.numel() > 200 for one in values)


def test_a_latent_passes_the_listed_files_in_their_order(tmp_path: Path) -> None:
    files = listed()
    assert 0 < len(files) <= 12
    named = {str(ROOT / name): name for name in files}
    seen: list[str] = []
    given = set[str]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        name = named.get(frame.f_code.co_filename)
        # Modules and bodies of classes run too, when they are imported, and constructors are given no latent.
        function = frame.f_code.co_flags & inspect.CO_OPTIMIZED and frame.f_code.co_name != "__init__"
        if event != "call" or not function:
            return
        if name and name not in seen:
            seen.append(name)
        file = frame.f_code.co_filename.removeprefix(f"{ROOT}/cosmos3_pipeline/")
        if (
            file != frame.f_code.co_filename
            and file not in given
            and any(map(may_be_latent, frame.f_locals.values()))
        ):
            given.add(file)

    prepared = prepare(compose(["task.num_frames=5", "sampler.steps=1", "vae.parallel_decode=true"]))
    sys.setprofile(note)
    try:
        generate(prepared, tmp_path)
    finally:
        sys.setprofile(None)
    assert seen == files
    assert given - {name.removeprefix("cosmos3_pipeline/") for name in files} - NO_LATENTS == helpers()
