"""The only place that decides whether a tensor takes the code path of a CPU or of an accelerator."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# If this environment variable is 1, CPU tensors take the accelerator's path, so that tests cover this path.
FORCED = "COSMOS3_ACCELERATOR_PATH"


def takes_host_path(where: Tensor | torch.device) -> bool:
    """Whether `where` takes the CPU's path: CPU block sizes, kernels and messages."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "cpu" and os.environ.get(FORCED) != "1"
