"""Stand-ins for weights that this rank does not hold: tensors of their shape on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_depth = 0


@contextmanager
def without_weights() -> Iterator[None]:
    """Tensors that are made in the block have shapes but no memory: weights that this rank does not hold."""
    global _depth
    _depth += 1
    try:
        with torch.device("meta"):
            yield
    finally:
        _depth -= 1


def makes_no_weights() -> bool:
    """Whether the caller is within `without_weights`. A rehearsal does not count tensors that are made there."""
    return _depth > 0


def absent(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor without memory in the shape of `weight`, in `dtype` or else the dtype of `weight`.

    It is always a new tensor, even if `weight` has no memory: a rehearsal must see that the weight was dropped.
    """
    with without_weights():
        return torch.empty(weight.shape, dtype=dtype or weight.dtype)
