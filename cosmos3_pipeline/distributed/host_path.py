"""Whether a tensor goes the way of a CPU or of an accelerator: the one place that asks."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# As 1 in the environment it makes tensors on a CPU go the way of an accelerator's, so that tests cover that.
FORCED = "COSMOS3_ACCELERATOR_PATH"


def takes_host_path(where: Tensor | torch.device) -> bool:
    """Whether what is on `where` goes the way of a CPU: its blocks, kernels and messages."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type == "cpu" and os.environ.get(FORCED) != "1"
