"""Messages between the accelerators of a `Comm`: a communicator of its own, aborted and made anew with it.

On GPUs that is NCCL's. Its messages go one batch after the other in the order in which they were started, and
waiting for one makes what is computed next wait, not this process. Where the accelerator's path is forced on a CPU
(`host_path`) gloo moves them, and there this process waits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import Store

from cosmos3_pipeline.distributed.watch import Watch

Region = tuple[Tensor, int]  # a tensor, or part of one, and the rank that it goes to or comes from

_TAG = 0
# How often whoever waits for gloo looks whether the run is over.
LOOK_SECONDS = 0.1


class Work(Protocol):
    """A message in flight."""

    def wait(self) -> Any:
        """Return when it has left or arrived, on an accelerator for what is computed next.

        Raises RuntimeError when it never will.
        """
        ...


class OnHost:
    """gloo's message in flight, for which this process waits until the watch knows that the run is over.

    gloo itself may wait for ever: a message to a rank that has died does not fail when nothing of it has left.
    """

    def __init__(self, work: Work, peers: Sequence[int], watch: Watch) -> None:
        self._work = work
        self._peers = peers
        self._watch = watch

    def wait(self) -> None:
        ended, errors = threading.Event(), list[RuntimeError]()
        self._watch.waits_for(ended.is_set, self._peers)

        def wait() -> None:
            try:
                self._work.wait()
            except RuntimeError as error:
                errors.append(error)
            ended.set()

        threading.Thread(target=wait, daemon=True).start()
        while not ended.wait(LOOK_SECONDS):
            self._watch.check()
        if errors:
            raise errors[0]


class OnStream:
    """NCCL's message in flight, for which the accelerator waits, and this process goes on."""

    def __init__(self, work: Work, peers: Sequence[int], watch: Watch, device: torch.device) -> None:
        self._work = work
        self._peers = peers
        self._watch = watch
        self._device = device

    def wait(self) -> None:
        with torch.cuda.device(self._device):
            self._work.wait()
            # Not the message, which would keep its tensors.
            arrived = torch.cuda.current_stream().record_event().query
        self._watch.waits_for(arrived, self._peers)


class AcceleratorGroup:
    """The communicator of rank `rank` of `members`, which share `store` and make it together.

    Ranks are numbered within `members`, whose numbers are those of the Comm. `patience` is how long a message may
    take. `watch` is told for whom this rank waits.
    """

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
        self._device = device
        self._members = members
        self._others = [member for number, member in enumerate(members) if number != rank]
        self._watch = watch
        self._aborted = False
        # Any: PyTorch's stubs leave out the methods that every backend has.
        self._backend: Any = _backend(store, rank, len(members), device, patience)

    def batch(self, receives: Sequence[Region], sends: Sequence[Region]) -> list[Work]:
        """Start to receive and to send, both ways at once."""
        backend = self._backend
        together = backend.supports_coalescing
        if together:
            backend._start_coalescing()
        works = [backend.recv([tensor], peer, _TAG) for tensor, peer in receives]
        works += [backend.send([tensor], peer, _TAG) for tensor, peer in sends]
        peers = [self._members[peer] for _, peer in (*receives, *sends)]
        if together:
            return [self._watched(backend._end_coalescing(), sorted(set(peers)))]
        return [self._watched(work, [peer]) for work, peer in zip(works, peers, strict=True)]

    def broadcast(self, tensor: Tensor, source: int) -> Work:
        options = c10d.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = source, 0, True
        givers = self._others if self._members[source] not in self._others else [self._members[source]]
        return self._watched(self._backend.broadcast([tensor], options), givers)

    def all_gather(self, parts: list[Tensor], tensor: Tensor) -> Work:
        options = c10d.AllgatherOptions()
        options.asyncOp = True
        return self._watched(self._backend.allgather([parts], [tensor], options), self._others)

    def gather_into(self, whole: Tensor, own: Tensor) -> Work:
        options = c10d.AllgatherOptions()
        options.asyncOp = True
        return self._watched(self._backend._allgather_base(whole, own, options), self._others)

    def synchronize(self) -> None:
        """Wait, on the host, for all that the accelerator was asked to do; an abort ends that too."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def shutdown(self) -> None:
        """Give back what the communicator has, when no message is in flight."""
        if self._device.type == "cuda":
            self._backend.shutdown()

    def abort(self) -> None:
        """End every wait for its messages on this rank, whichever thread asks; of gloo's each ends by itself."""
        if self._device.type == "cuda" and not self._aborted:
            self._aborted = True
            self._backend.abort()

    def _watched(self, work: Work, peers: Sequence[int]) -> Work:
        if self._device.type == "cpu":
            return OnHost(work, peers, self._watch)
        return OnStream(work, peers, self._watch, self._device)


def _backend(store: Store, rank: int, size: int, device: torch.device, patience: timedelta) -> Any:
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, size, timeout=patience)
    nccl: Any = c10d.ProcessGroupNCCL  # which a build for the CPU does not have
    # PyTorch's own thread would end the process when a peer aborts, before it could say why: the watch does both.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = nccl.Options()
    options._timeout = patience
    backend = nccl(store, rank, size, options)
    backend._set_sequence_number_for_group()
    # Now, with all ranks: the first message need not be one in which each of them takes part.
    backend.eager_connect_single_device(device)
    return backend
