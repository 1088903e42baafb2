"""A checkpoint's tensors, read from their files straight into the memory of the device where they stay.

A rank holds what it keeps and one block besides: nothing is mapped, and no whole model passes through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cosmos3_pipeline.checkpoint.files import not_whole
from cosmos3_pipeline.checkpoint.inspect import Placed
from cosmos3_pipeline.checkpoint.stored import StoredTensor
from cosmos3_pipeline.errors import Refusal

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Large enough that reading is not bound by calls, small beside any model.
BLOCK_BYTES = 16 * 2**20
# A trained weight is not near it; a few of such size, one after the other, leave the range of any dtype.
LARGEST_VALUE = 1e6


def read_tensors(
    placed: Iterable[Placed],
    *,
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, Tensor]:
    """The tensors, in `dtype` on `device`, but for those that their model keeps in float32.

    `advance` is told the bytes of the file as they are read.

    Raises:
        Refusal: a file that cannot be read or has become shorter, or a value that is NaN or overflows.
    """
    found: dict[str, Tensor] = {}
    staging: Tensor | None = None
    by_file: dict[Path, list[Placed]] = {}
    for one in placed:
        by_file.setdefault(one.stored.file, []).append(one)
    for file, inside in by_file.items():
        try:
            with file.open("rb", buffering=0) as stream:
                for one in sorted(inside, key=lambda each: each.stored.start):
                    wanted = torch.float32 if one.weight.keeps_fp32 else dtype
                    target = torch.empty(one.stored.shape, dtype=wanted, device=device)
                    if device.type == "cpu" and wanted == DTYPES[one.stored.dtype]:
                        blocks = _in_place(stream, one.stored, target, advance)
                    else:
                        staging = _staging(device) if staging is None else staging
                        blocks = _through(staging, stream, one.stored, target, advance)
                    for block in blocks:
                        _refuse_overflow(one.stored, block)
                    found[one.stored.name] = target
        except OSError as error:
            raise not_whole(file, f"reading it failed: {error.strerror or error}") from error
    return found


def _staging(device: torch.device) -> Tensor:
    return torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _in_place(
    stream: BinaryIO, stored: StoredTensor, target: Tensor, advance: Callable[[int], None]
) -> Iterable[Tensor]:
    """Read into the memory of `target`; yields what was read, block by block."""
    flat = target.view(-1)
    stream.seek(stored.start)
    for block in flat.split(max(BLOCK_BYTES // target.element_size(), 1)):
        _fill(stream, block.view(torch.uint8), stored)
        advance(block.nbytes)
        yield block


def _through(
    staging: Tensor, stream: BinaryIO, stored: StoredTensor, target: Tensor, advance: Callable[[int], None]
) -> Iterable[Tensor]:
    """Read block by block into `staging` and from there, converted, into `target`; yields what was written."""
    source = DTYPES[stored.dtype]
    flat = target.view(-1)
    stream.seek(stored.start)
    for part in flat.split(len(staging) // source.itemsize):
        raw = staging[: part.numel() * source.itemsize]
        _fill(stream, raw, stored)
        part.copy_(raw.view(source))
        advance(raw.nbytes)
        yield part


def _fill(stream: BinaryIO, raw: Tensor, stored: StoredTensor) -> None:
    """Read as many bytes as `raw` [n], uint8 on the host, has."""
    memory = memoryview(raw.numpy())  # type: ignore[arg-type] # an array is a buffer
    done = 0
    while done < len(memory):
        count = stream.readinto(memory[done:])  # type: ignore[attr-defined] # a file without a buffer has it
        if not count:
            raise not_whole(stored.file, f"it ended within {stored.name}, after its header was read")
        done += count


def _refuse_overflow(stored: StoredTensor, values: Tensor) -> None:
    """Raise Refusal where one of `values` is NaN, or too large: smallest and largest tell, in one pass."""
    if not values.numel() or all(abs(end.item()) <= LARGEST_VALUE for end in values.aminmax()):
        return
    bad = int((~(values.abs() <= LARGEST_VALUE)).sum())
    raise Refusal(
        what=f"{stored.name} in {stored.file} has {bad} values in one block that are NaN or too large",
        why=f"beyond {LARGEST_VALUE:g} what they are multiplied with overflows, and the picture is black",
        works="the file as it was published, downloaded again",
    )
