"""`cosmos3 make-checkpoint`: a checkpoint of random weights in a published layout. Imports torch only to write."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cosmos3_pipeline import stopping
from cosmos3_pipeline.config.arguments import Arguments
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.errors import REFUSED, Refusal
from cosmos3_pipeline.models.layouts import LAYOUTS, Layout
from cosmos3_pipeline.planning.units import quantity

DESCRIPTION = """\
Write a checkpoint of random weights in the layout of a published one: the same folders, files, keys and shards.
It makes a lively picture that shows nothing. Small by default; --full-size has the real numbers and shapes, to try
disks, memory and a cluster before the real one is downloaded.

  cosmos3 make-checkpoint --layout nano /tmp/nano                 16 MB, in seconds
  cosmos3 make-checkpoint --layout nano --full-size /data/nano    34 GB
"""


def main(arguments: Sequence[str]) -> int:
    """Run `cosmos3 make-checkpoint` with `arguments` and return the exit code: 0, or 2 for a Refusal."""
    parser = Arguments("cosmos3 make-checkpoint", DESCRIPTION, usage=REFUSED)
    layouts = "; ".join(f"{name}: {layout.what}" for name, layout in LAYOUTS.items())
    parser.add_argument("--layout", required=True, choices=LAYOUTS, help=layouts)
    parser.add_argument("--full-size", action="store_true", help="the real numbers of layers, heads and channels")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write; must not exist, or be empty")
    asked = parser.parse(arguments)
    try:
        make(asked.folder.expanduser(), asked.layout, full_size=asked.full_size, dtype=asked.dtype)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return REFUSED
    return 0


def make(folder: Path, name: str, *, full_size: bool, dtype: str) -> None:
    """Write the layout `name` into `folder`, whole or not at all, with a bar on stderr.

    Raises:
        Refusal: `folder` is not empty or cannot be written, or the disk is too full.
    """
    layout = LAYOUTS[name]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(
            what=f"{folder} is there already",
            why="files that exist are not overwritten",
            works="a folder that does not exist, or an empty one",
        )
    numbers = numbers_of(layout, full_size=full_size)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        with stopping.leftover(partial):
            _write(partial, folder, layout, numbers, full_size=full_size, dtype=dtype)
            partial.chmod(0o755)
            partial.rename(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    Console(stderr=True).print(_next(folder, layout, full_size=full_size), highlight=False, soft_wrap=True)


def _write(
    partial: Path, folder: Path, layout: Layout, numbers: dict[str, Any], *, full_size: bool, dtype: str
) -> None:
    import torch

    from cosmos3_pipeline.models.maker import component_entries, write_checkpoint

    settings = {**numbers, "dtype": getattr(torch, dtype), "full_size": full_size}
    entries = component_entries(layout, **settings)
    total = sum(entry.nbytes for tensors in entries.values() for entry in tensors)
    free = shutil.disk_usage(partial).free
    if total > free:
        raise Refusal(
            what=f"{folder} would have {quantity('bytes', total)}",
            why=f"{quantity('bytes', free)} are free on that disk, {quantity('bytes', total - free)} too few",
            works="another disk" + (", or no --full-size" if full_size else ""),
        )
    columns = (
        TextColumn(f"{layout.what}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        write_checkpoint(partial, layout, **settings, advance=lambda nbytes: progress.advance(task, nbytes))


def numbers_of(layout: Layout, *, full_size: bool) -> dict[str, Any]:
    """Numbers of `transformer`, `vae` and `sound_tokenizer`: the layout's, or in small with the toy's sizes."""
    own, nano, toy = (
        plain(composition_of([f"model={option}"]).typed().model)
        for option in (layout.option, "nano", "toy_random")
    )
    numbers = {}
    for part in ("transformer", "vae", "sound_tokenizer"):
        sizes = {} if full_size else {k: v for k, v in toy[part].items() if v != nano[part][k]}
        numbers[part] = {**own[part], **sizes}
    return numbers


def _next(folder: Path, layout: Layout, *, full_size: bool) -> str:
    if not layout.is_run:
        return f"{folder}\n{layout.what} is refused here; see docs/checkpoints.md"
    small = "" if full_size else " task.height=96 task.width=160 task.num_frames=17"
    if not full_size and not layout.is_distilled:
        small += " sampler.steps=8"
    return f"{folder}\ntry: python launch.py model={layout.option} model.path={folder}{small}"


def _unwritable(folder: Path, error: OSError) -> Refusal:
    return Refusal(
        what=f"{folder} cannot be written",
        why=error.strerror or str(error),
        works="a folder that this user may write, on a disk with room",
    )
