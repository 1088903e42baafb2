"""Whether a tensor is computed as on a CPU or as on an accelerator: the one place that asks."""

from __future__ import annotations

import torch
from torch import Tensor


def takes_host_path(where: Tensor | torch.device) -> bool:
    """Whether what is on `where` takes a CPU's branches: small blocks that stay in a cache, and oneDNN's calls."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "cpu"
