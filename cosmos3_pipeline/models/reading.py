"""Reads a checkpoint's tensors from files directly into the memory of the device where they stay.

A rank holds the tensors that it keeps and one more block. No file is mapped, and the model does not pass through
host memory as a whole. Adapters are added here, so the weights include them in every placement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from cosmos3_pipeline.checkpoint.files import not_whole
from cosmos3_pipeline.checkpoint.inspect import Placed
from cosmos3_pipeline.checkpoint.stored import NO_FILE, LowRank, StoredTensor
from cosmos3_pipeline.errors import Fault, Refusal

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Large enough that the number of calls does not limit reading, and small compared with any model.
BLOCK_BYTES = 16 * 2**20
# Elements of an adapter's product that are in memory at once: 16 MiB, or hundreds of rows of the widest weight.
MERGED_ELEMENTS = 4 * 2**20
# Trained weights are far smaller. A few factors of this size in a row overflow any dtype.
LARGEST_VALUE = 1e6
AS_PUBLISHED = "the file as it was published, downloaded again"
Advance = Callable[[int], None]  # called with the number of bytes that were read from a file


def _unseen(nbytes: int) -> None: ...


@dataclass(frozen=True)
class Piece:
    """Elements of a stored tensor, from element `first` on, and the memory for them.

    `target` [n] is contiguous; the elements are converted to its dtype.
    """

    stored: StoredTensor
    first: int
    target: Tensor


def read_tensors(
    placed: Iterable[Placed], *, dtype: torch.dtype, device: torch.device, advance: Advance = _unseen
) -> dict[str, Tensor]:
    """The tensors in `dtype` on `device`. Tensors that the model keeps in float32 are in float32.

    Raises:
        Fault: see `read_pieces`.
    """
    found: dict[str, Tensor] = {}

    def pieces() -> Iterator[Piece]:
        for one in sorted(placed, key=lambda each: (each.stored.file, each.stored.start)):
            wanted = torch.float32 if one.weight.keeps_fp32 else dtype
            target = found[one.stored.name] = torch.empty(one.stored.shape, dtype=wanted, device=device)
            yield Piece(one.stored, 0, target.view(-1))

    read_pieces(pieces(), advance=advance)
    return found


def read_pieces(pieces: Iterable[Piece], *, check: bool = True, advance: Advance = _unseen) -> None:
    """Read each piece into its memory, and add the adapters of its tensor.

    `check` False skips the check of values, for pieces that were read and checked before.
    A tensor of `NO_FILE` has a shape and no values, so its memory is not changed.

    Raises:
        Fault: a file cannot be read or has become shorter, or a value is NaN or too large.
    """
    staging: Tensor | None = None
    file, stream = Path(), None
    try:
        for piece in pieces:
            if piece.stored.file == NO_FILE:
                continue
            if stream is None or piece.stored.file != file:
                if stream is not None:
                    stream.close()
                file = piece.stored.file
                stream = file.open("rb", buffering=0)
            source = DTYPES[piece.stored.dtype]
            stream.seek(piece.stored.start + piece.first * source.itemsize)
            if piece.target.is_cpu and piece.target.dtype == source:
                blocks = _in_place(stream, piece, advance)
            else:
                staging = _staging(staging, piece, source.itemsize)
                blocks = _through(staging, stream, piece, advance)
            for block in blocks:
                if check:
                    _refuse_overflow(block, _named(piece.stored), AS_PUBLISHED)
            for added in piece.stored.added:
                _add(added, piece, check=check)
    except OSError as error:
        raise _fault(not_whole(file, f"reading it failed: {error.strerror or error}")) from error
    finally:
        if stream is not None:
            stream.close()


def _staging(staging: Tensor | None, piece: Piece, itemsize: int) -> Tensor:
    """Host memory for the largest block of `piece`. It is `staging` again, if that is large enough."""
    needed = min(piece.target.numel() * itemsize, BLOCK_BYTES)
    if staging is not None and len(staging) >= needed:
        return staging
    return torch.empty(needed, dtype=torch.uint8, pin_memory=piece.target.is_cuda)


def _in_place(stream: BinaryIO, piece: Piece, advance: Advance) -> Iterator[Tensor]:
    """Read into the memory of the target. Yields the blocks that were read."""
    for block in piece.target.split(max(BLOCK_BYTES // piece.target.element_size(), 1)):
        _fill(stream, block.view(torch.uint8), piece.stored)
        advance(block.nbytes)
        yield block


def _through(staging: Tensor, stream: BinaryIO, piece: Piece, advance: Advance) -> Iterator[Tensor]:
    """Read each block into `staging`, convert it and copy it to the target. Yields the blocks of the target."""
    source = DTYPES[piece.stored.dtype]
    for part in piece.target.split(len(staging) // source.itemsize):
        raw = staging[: part.numel() * source.itemsize]
        _fill(stream, raw, piece.stored)
        part.copy_(raw.view(source))
        advance(raw.nbytes)
        yield part


def _add(added: LowRank, piece: Piece, *, check: bool) -> None:
    """Add an adapter to the target, for this piece of the adapter's weight.

    The arithmetic is that of diffusers' `fuse_lora` on a CPU, in all placements and on all devices. The matrices
    are in the model's dtype, their scaled product is in float32, and the sum is in the model's dtype again. The
    last bits of a product depend on its number of rows. Every piece therefore uses the same blocks of whole rows.
    """
    (outputs, columns), first, last = piece.stored.shape, piece.first, piece.first + piece.target.numel()
    down, up = (_matrix(one, piece.target.dtype, check=check) for one in (added.down, added.up))
    rows = -(-outputs // -(-outputs * columns // MERGED_ELEMENTS))
    for row in range(first // columns // rows * rows, -(-last // columns), rows):
        product = (up[row : row + rows] @ down).mul_(added.scale).to(piece.target.dtype).view(-1)
        start = row * columns
        begin, end = max(start, first), min(start + product.numel(), last)
        block = piece.target[begin - first : end - first]
        block += product[begin - start : end - start].to(block.device)
        if check:
            what = f"{_named(piece.stored)}, with what {added.up.file} adds,"
            _refuse_overflow(block, what, "a smaller weight in model.lora, or an adapter of this model")


def _matrix(stored: StoredTensor, dtype: torch.dtype, *, check: bool) -> Tensor:
    """A matrix of an adapter, on the host. It is rounded to `dtype` first, and then returned in float32."""
    values = torch.empty(stored.shape, dtype=dtype)
    read_pieces([Piece(stored, 0, values.view(-1))], check=check)
    return values.float()


def _fill(stream: BinaryIO, raw: Tensor, stored: StoredTensor) -> None:
    """Fill `raw` [n], uint8 on the host, with bytes of the file."""
    memory = memoryview(raw.numpy())  # type: ignore[arg-type] # an array is a buffer
    done = 0
    while done < len(memory):
        count = stream.readinto(memory[done:])  # type: ignore[attr-defined] # a file without a buffer has it
        if not count:
            raise _fault(not_whole(stored.file, f"it ended within {stored.name}, after its header was read"))
        done += count


def _fault(refusal: Refusal) -> Fault:
    return Fault(refusal.problem.what, refusal.problem.why, refusal.problem.works)


def _named(stored: StoredTensor) -> str:
    return f"{stored.name} in {stored.file}"


def _refuse_overflow(values: Tensor, what: str, works: str) -> None:
    """Raise Fault if a value is NaN or too large. One pass finds the smallest and the largest value."""
    if not values.numel() or all(abs(end.item()) <= LARGEST_VALUE for end in values.aminmax()):
        return
    bad = int((~(values.abs() <= LARGEST_VALUE)).sum())
    raise Fault(
        what=f"{what} has {bad} values in one block that are NaN or too large",
        why=f"beyond {LARGEST_VALUE:g} products with them overflow, and the picture is black",
        works=works,
    )
