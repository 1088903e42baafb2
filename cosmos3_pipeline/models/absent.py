"""Stand-ins for weights that this rank does not hold: tensors of their shape on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_depth = 0


@contextmanager
def without_weights() -> Iterator[None]:
    """Tensors that are made in the block have shapes only. They stand for weights that this rank does not hold."""
    global _depth
    _depth += 1
    try:
        with torch.device("meta"):
            yield
    finally:
        _depth -= 1


def makes_no_weights() -> bool:
    """Whether this is within `without_weights`: a rehearsal, whose device is meta, counts nothing of it."""
    return _depth > 0


def absent(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The shape of `weight`, in `dtype` if that is another, without its memory.

    Never `weight` itself, also where that has no values: a rehearsal must see that its memory is gone.
    """
    with without_weights():
        return torch.empty(weight.shape, dtype=dtype or weight.dtype)
