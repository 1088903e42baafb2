"""Writing a file under a temporary name and renaming it, so that no reader sees a half-written file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from cosmos3_pipeline import stopping

VIDEO_FILE = "video.mp4"
IMAGE_FILE = "image.png"
SOUND_FILE = "sound.wav"
LATENTS_FILE = "latents.safetensors"
CONTROL_FILE = "control.mp4"
# All files that jobs and report pages leave in the folder of a run. The next run in that folder removes them.
RUN_FILES = (
    *(VIDEO_FILE, IMAGE_FILE, SOUND_FILE, LATENTS_FILE, CONTROL_FILE, "actions.json"),
    *("metrics.json", "config.yaml", "plan.json", "plan.md", "search.json", "prompts.json"),
    *("verify.json", "verify.png", "rehearsal.json", "rehearsal.md", "log.txt", "index.html"),
)

PARTIAL = ".partial"  # ends the name of a file that is not whole yet


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to. It is renamed to `path` at the end, and removed if the block raises.

    The temporary name is unique. A link at `path` is replaced, not followed.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}{PARTIAL}")
    with stopping.leftover(partial):
        try:
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield partial
            partial.replace(path)
        except OSError as error:
            if error.filename is None:  # a failed write does not name its file
                error.filename = str(path)
            raise
        finally:
            partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_partial(folder: Path) -> None:
    """Remove the half-written files that a killed process left in `folder`."""
    for leftover in folder.glob(f"*{PARTIAL}"):
        leftover.unlink(missing_ok=True)
