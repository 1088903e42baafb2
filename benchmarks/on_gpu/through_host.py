"""Messages between ranks that share one GPU. They use gloo on the host, because NCCL refuses to share a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from cosmos3_pipeline.distributed.accelerator import AcceleratorGroup, Region, Work
from cosmos3_pipeline.distributed.watch import Watch

Landing = tuple[Tensor, Tensor]  # a tensor of the device, and its bytes on the host


class Landed:
    """Messages in flight to the host. They are copied to the device when they have arrived."""

    def __init__(self, works: Sequence[Work], landings: Sequence[Landing]) -> None:
        self._works = works
        self._landings = landings

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        for tensor, host in self._landings:
            tensor.copy_(host.view(tensor.dtype).view(tensor.shape))


class ThroughHost(AcceleratorGroup):
    """Replaces `AcceleratorGroup`, with the same methods. The tensors may be on any device."""

    def __init__(
        self,
        store: Store,
        rank: int,
        members: Sequence[int],
        *,
        device: torch.device,
        patience: timedelta,
        watch: Watch,
    ) -> None:
        # With the host as its device, the base class makes gloo's backend and waits as for gloo.
        super().__init__(store, rank, members, device=torch.device("cpu"), patience=patience, watch=watch)
        self._accelerator = device

    def batch(self, receives: Sequence[Region], sends: Sequence[Region]) -> list[Work]:
        landings = [(tensor, _room(tensor)) for tensor, _ in receives]
        coming = [(host, peer) for (_, host), (_, peer) in zip(landings, receives, strict=True)]
        works = super().batch(coming, [(_bytes(tensor), peer) for tensor, peer in sends])
        return [Landed(works, landings)]

    def broadcast(self, tensor: Tensor, source: int) -> Work:
        host = _bytes(tensor)
        return Landed([super().broadcast(host, source)], [(tensor, host)])

    def all_gather(self, parts: list[Tensor], tensor: Tensor) -> Work:
        landings = [(part, _room(part)) for part in parts]
        return Landed([super().all_gather([host for _, host in landings], _bytes(tensor))], landings)

    def gather_into(self, whole: Tensor, own: Tensor) -> Work:
        host = _room(whole)
        return Landed([super().gather_into(host, _bytes(own))], [(whole, host)])

    def synchronize(self) -> None:
        if self._accelerator.type == "cuda":
            torch.cuda.synchronize(self._accelerator)


def _bytes(tensor: Tensor) -> Tensor:
    """A copy of the tensor's bytes on the host. It waits until the device has computed them."""
    return tensor.contiguous().cpu().view(-1).view(torch.uint8)


def _room(tensor: Tensor) -> Tensor:
    """Memory on the host for the bytes of a tensor."""
    return torch.empty(tensor.nbytes, dtype=torch.uint8)
