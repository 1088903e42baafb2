"""The choice of a rank's device, and the numerical settings of that device."""

from __future__ import annotations

import logging
from typing import Any

import torch

from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.errors import Refusal


def gpu(index: int) -> torch.device:
    """The GPU of rank `index` of this machine. Raises Refusal if PyTorch can use no such GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index < count:
        return torch.device("cuda", index)
    if not torch.version.cuda:
        why, works = f"PyTorch {torch.__version__} was built for the CPU alone", "PyTorch built with CUDA"
    elif count:
        why, works = f"this machine has {count}", f"topology.ranks_per_node={count}"
    else:
        why, works = (
            _driver_problem(),
            "a driver for this version of CUDA (nvidia-smi tells), or a machine with a GPU",
        )
    raise Refusal(
        what=f"topology.device=cuda, and there is no GPU for rank {index} of this machine",
        why=why,
        works=works if count else f"{works}; without one topology=cpu_x1",
    )


def _driver_problem() -> str:
    """Why a PyTorch with CUDA sees no GPU, in the words of CUDA's error."""
    try:
        torch.cuda.init()
    except Exception as error:  # CUDA raises RuntimeErrors and AssertionErrors of many kinds here
        return f"PyTorch {torch.__version__} with CUDA {torch.version.cuda} sees none: {error}"
    return f"PyTorch {torch.__version__} with CUDA {torch.version.cuda} sees none"


# With these versions of cuDNN, PyTorch computes convolutions of bfloat16 clips in its own loops, which take many
# times as long and as much memory. Source: pytorch issues 166643, 163581, 166480.
SLOW_CUDNN = range(90800, 91500)


def use(device: torch.device) -> None:
    """Make `device` the current GPU, without TF32, and with the same kernel for the same shape on all ranks.

    TF32 is off, because PyTorch would otherwise round the float32 inputs of convolutions. cuDNN's benchmark is
    off, because it could choose different kernels on different ranks. Their parts of a picture would then not
    match to the last bit.
    """
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    cudnn = torch.backends.cudnn.version()
    if cudnn in SLOW_CUDNN:
        logging.getLogger(__name__).warning(
            "cuDNN %s is known for bfloat16 convolutions of clips that take many times as long and as much "
            "memory; versions before 9.8 and from 9.15 on do not; PyTorch's own wheel brings one, which is used "
            "where LD_LIBRARY_PATH names no other; or take model.vae_dtype=float32",
            cudnn,
        )


def numerics(device: torch.device) -> dict[str, Any]:
    """The settings that decide the last bits of a result on `device`, for metrics.json."""
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": device.type, "cpu": capability, "as_accelerator": not takes_host_path(device)}
    return {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
    }
