"""Messages between the accelerators of a `Comm`. Each Comm has its own communicator, which is aborted with it.

On GPUs the communicator is NCCL's. It sends batches in the order in which they were started. A wait for an NCCL
message blocks the accelerator's later kernels, not this process. If the accelerator's path is forced on a CPU
(`host_path`), gloo sends the messages, and a wait blocks this process.
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

Region = tuple[Tensor, int]  # a tensor or a view of a tensor, and the rank that it is sent to or received from

_TAG = 0
# A rank that waits for gloo checks at this interval whether the run is over.
LOOK_SECONDS = 0.1


class Work(Protocol):
    """A message in flight."""

    def wait(self) -> Any:
        """Return when the message has left or arrived; on an accelerator, later kernels wait instead.

        Raises RuntimeError when the message can never arrive.
        """
        ...


class OnHost:
    """A gloo message in flight. `wait` blocks this process, until the message is done or the watch ends the run.

    The watch is necessary, because a gloo message to a dead rank does not fail if none of its bytes has left yet.
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
    """An NCCL message in flight. `wait` lets the accelerator wait, and this process continues."""

    def __init__(self, work: Work, peers: Sequence[int], watch: Watch, device: torch.device) -> None:
        self._work = work
        self._peers = peers
        self._watch = watch
        self._device = device

    def wait(self) -> None:
        with torch.cuda.device(self._device):
            self._work.wait()
            # The watch gets an event instead of the message, because the message would keep its tensors alive.
            arrived = torch.cuda.current_stream().record_event().query
        self._watch.waits_for(arrived, self._peers)


class AcceleratorGroup:
    """The communicator between `members`, which are ranks of a Comm. All members create it together in `store`.

    `rank`, and all ranks in the methods, are indices into `members`. `patience` is how long a message may take.
    `watch` is told for which ranks of the Comm this rank waits.
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
        # Any, because PyTorch's type stubs lack the methods that every backend has.
        self._backend: Any = _backend(store, rank, len(members), device, patience)

    def batch(self, receives: Sequence[Region], sends: Sequence[Region]) -> list[Work]:
        """Start all receives and sends as one batch, so that both directions run at once."""
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
        """Block the host until all work of the accelerator is done. An abort also ends this wait."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def shutdown(self) -> None:
        """Free the communicator's resources. No message may be in flight."""
        if self._device.type == "cuda":
            self._backend.shutdown()

    def abort(self) -> None:
        """End every wait for NCCL's messages on this rank; any thread may call it. gloo's waits ask the watch."""
        if self._device.type == "cuda" and not self._aborted:
            self._aborted = True
            self._backend.abort()

    def _watched(self, work: Work, peers: Sequence[int]) -> Work:
        if self._device.type == "cpu":
            return OnHost(work, peers, self._watch)
        return OnStream(work, peers, self._watch, self._device)


def _backend(store: Store, rank: int, size: int, device: torch.device, patience: timedelta) -> Any:
    if device.type == "cpu":
        gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout=patience)
        # gloo may return while another rank still connects. If this rank failed at once, the other would report a
        # closed connection and not this rank's error.
        gloo.barrier(c10d.BarrierOptions()).wait()
        return gloo
    nccl: Any = c10d.ProcessGroupNCCL  # missing in PyTorch builds for CPU
    # When a peer aborts, PyTorch's own thread would end this process before it could report the reason. The watch
    # reports the reason and ends the waits instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = nccl.Options()
    options._timeout = patience
    backend = nccl(store, rank, size, options)
    backend._set_sequence_number_for_group()
    # Connect now, while all ranks take part. The first message may involve only some of them.
    backend.eager_connect_single_device(device)
    return backend
