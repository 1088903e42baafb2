"""The machine: its versions, the best rates of the GPU, and whether messages between accelerators arrive."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from cosmos3_pipeline.distributed.accelerator import AcceleratorGroup
from cosmos3_pipeline.distributed.device import numerics
from cosmos3_pipeline.distributed.watch import Watch
from on_gpu.found import Found
from on_gpu.setting import Setting, is_root, on_rank, seconds_of
from on_gpu.through_host import ThroughHost

PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "safetensors", "hydra-core")
PATIENCE_SECONDS = 20
RUNS = 5


def facts_and_messages(setting: Setting) -> None:
    """The root writes facts and rates. Then all ranks send messages, and the root writes whether they arrive."""
    found = Found(setting.file)
    with on_rank(setting) as device:
        if is_root():
            for name, value in facts(device):
                found.row("machine", what=name, value=value)
            for name, rate in rates(device, small=setting.small):
                found.row("at best", what=name, value=rate)
        dist.barrier()
        # ThroughHost uses gloo, and a rank of gloo cannot send to itself.
        kinds = [AcceleratorGroup, ThroughHost] if dist.get_world_size() > 1 else [AcceleratorGroup]
        for kind in kinds:
            for name, call in messages(kind, device):
                arrived = "arrives"
                try:
                    call()
                # Any exception is a result: the report has it, and later steps do not depend on this message.
                except Exception as error:
                    arrived = f"{type(error).__name__}: {error}"
                if is_root():
                    found.row("messages between accelerators", group=kind.__name__, message=name, result=arrived)
                    if arrived != "arrives":
                        found.wrong(f"{name} by {kind.__name__}: {arrived}")


def facts(device: torch.device) -> Iterator[tuple[str, str]]:
    """The versions and properties on which the numbers of a report depend."""
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"
    for name, value in numerics(device).items():
        yield name, str(value)
    yield "C compiler, which Triton needs", shutil.which("cc") or shutil.which("gcc") or "none"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        yield "memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        yield "GPUs", str(torch.cuda.device_count())
        yield "nvidia-smi", nvidia_smi()


def nvidia_smi() -> str:
    """The GPUs, their driver, clocks and memory in use, in the words of the driver's own tool."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.used"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "; ".join((done.stdout or done.stderr).strip().splitlines())


def rates(device: torch.device, *, small: bool) -> Iterator[tuple[str, str]]:
    """The rates that limit all other work: matrix products, convolutions like the decoder's, memory, launches."""
    size, picture = (256, (8, 8)) if small else (8192, (180, 320))
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rate = 2 * size**3 / best(partial(torch.matmul, a, b), device) / 1e12
        yield f"{size} x {size} matrix product, {name}", f"{rate:.1f} TFLOP/s"
        x = torch.randn(1, 512, 4, *picture, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = torch.randn(512, 512, 3, 3, 3, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        rate = 2 * 27 * 512 * 512 * 2 * (picture[0] - 2) * (picture[1] - 2)
        rate = rate / best(partial(F.conv3d, x, weight), device) / 1e12
        yield f"3 x 3 x 3 convolution, 512 channels, {name}", f"{rate:.1f} TFLOP/s"
    source = torch.zeros(2**20 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / best(lambda: target.copy_(source), device) / 1e9
    yield "copy, read and written", f"{rate:.0f} GB/s"
    tiny = torch.zeros(1, device=device)
    launches = 1000
    each = best(lambda: [tiny.add_(1) for _ in range(launches)], device) / launches
    yield "one small kernel after the other", f"{each * 1e6:.1f} us"


def best(run: Callable[[], object], device: torch.device) -> float:
    """The fewest seconds of RUNS calls, after a call to warm up."""
    run()
    return min(seconds_of(run, device) for _ in range(RUNS))


def messages(kind: type[AcceleratorGroup], device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each kind of message between all ranks of the world. A call raises if wrong numbers arrive."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store: Any = PrefixStore(kind.__name__, _get_default_store())
    made: list[AcceleratorGroup] = []
    watches: list[Watch] = []

    def watched() -> None:
        watch = Watch(
            lambda: None,
            lambda: None,
            store=PrefixStore("watch", store.clone()),
            rank=rank,
            size=size,
            patience=PATIENCE_SECONDS,
        )
        watches.append(watch)
        patience = timedelta(seconds=PATIENCE_SECONDS)
        group = kind(PrefixStore("group", store), rank, range(size), device=device, patience=patience, watch=watch)
        made.append(group)

    def full(value: int) -> Tensor:
        return torch.full((1000,), value, dtype=torch.bfloat16, device=device)

    def exchange() -> None:
        """Send around a ring. A single rank sends to itself."""
        received = full(-1)
        for work in made[0].batch([(received, (rank - 1) % size)], [(full(rank), (rank + 1) % size)]):
            work.wait()
        same(received, full((rank - 1) % size))

    def broadcast() -> None:
        tensor = full(rank + 7)
        made[0].broadcast(tensor, 0).wait()
        same(tensor, full(7))

    def all_gather() -> None:
        parts = [full(-1) for _ in range(size)]
        made[0].all_gather(parts, full(rank)).wait()
        for number, part in enumerate(parts):
            same(part, full(number))

    def gather_into() -> None:
        whole = torch.empty(size * 1000, dtype=torch.bfloat16, device=device)
        made[0].gather_into(whole, full(rank)).wait()
        same(whole, torch.cat([full(number) for number in range(size)]))

    def abort() -> None:
        watches[0].stop()
        made[0].abort()

    yield f"a communicator of {size} rank{'s' * (size > 1)}", watched
    yield "broadcast", broadcast
    yield "all_gather", all_gather
    yield "gather_into", gather_into
    yield "exchange around a ring" if size > 1 else "exchange with itself", exchange
    yield "abort", abort


def same(found: Tensor, expected: Tensor) -> None:
    """Raise ValueError if the tensors differ."""
    if not torch.equal(found, expected):
        raise ValueError(f"{found[0].item()} arrived where {expected[0].item()} was sent")
