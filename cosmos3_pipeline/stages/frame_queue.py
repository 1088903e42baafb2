"""Brings frames from the device to a thread that writes them, while the next frames are decoded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Portions of frames in flight: one is written while one arrives.
WAITING = 2


class Arrival:
    """uint8 frames on the host, or in flight to `buffer` on the host. `wait` returns when they are complete."""

    def __init__(self, frames: Tensor, event: Any = None, buffer: Tensor | None = None) -> None:
        self.frames = frames
        self.buffer = buffer
        self._event = event

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class Landing:
    """Brings frames to the host. From a GPU it uses `WAITING` pinned buffers and a separate stream."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._free: Queue[Tensor] = Queue()

    def start(self, chunk: Tensor) -> Arrival:
        """Start to copy `chunk` to the host. Waits while all buffers are in use."""
        if not chunk.is_cuda:
            return Arrival(chunk.contiguous())
        if self._stream is None:
            self._stream = torch.cuda.Stream(chunk.device)
            for _ in range(WAITING):
                self._free.put(torch.empty(chunk.numel(), dtype=torch.uint8, pin_memory=True))
        buffer = self._free.get()
        if buffer.numel() < chunk.numel():  # the first chunk of a clip has fewer frames
            buffer = torch.empty(chunk.numel(), dtype=torch.uint8, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(chunk.device))
        with torch.cuda.stream(self._stream):
            frames = buffer[: chunk.numel()].view(chunk.shape)
            frames.copy_(chunk, non_blocking=True)
            chunk.record_stream(self._stream)
            return Arrival(frames, self._stream.record_event(), buffer)

    def give_back(self, arrival: Arrival) -> None:
        """Let the buffer of `arrival` be used again. Its frames must not be needed any more."""
        if arrival.buffer is not None:
            self._free.put(arrival.buffer)


class FrameQueue:
    """Calls `use` in a thread with each portion of frames, uint8 [frames, H, W, 3], in the order of `put`.

    An exception of `use` is raised by the next `put`, or at the end of the block, which waits for all frames. When
    the block itself raises, frames that still wait are dropped.

        with FrameQueue(write) as queue:
            for chunk in frames:
                queue.put(chunk)
    """

    def __init__(self, use: Callable[[NDArray[np.uint8]], None]) -> None:
        self._use = use
        self._landing = Landing()
        self._waiting: Queue[Arrival | None] = Queue(WAITING)
        self._last: Arrival | None = None
        self._error: BaseException | None = None
        self._dropped = False
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)

    def arrived(self) -> None:
        """Wait until the last portion that was put is on the host. The device has then computed it."""
        if self._last is not None:
            self._last.wait()

    def put(self, chunk: Tensor) -> None:
        """Hand over a portion. The caller must not change it any more. Waits while the thread is behind."""
        self._raise()
        self._last = self._landing.start(chunk)
        self._waiting.put(self._last)

    def __enter__(self) -> FrameQueue:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dropped = error is not None
        self._end()
        if error is None:
            self._raise()

    def finish(self) -> None:
        """Wait until all frames were used."""
        self._end()
        self._raise()

    def _end(self) -> None:
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (arrival := self._waiting.get()) is not None:
            if self._error is None and not self._dropped:
                try:
                    arrival.wait()
                    self._use(arrival.frames.numpy())
                except BaseException as error:  # `_raise` raises it in the thread that calls `put`
                    self._error = error
            self._landing.give_back(arrival)
