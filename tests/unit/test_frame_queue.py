"""Frames that a thread writes while the next are made: their order, what waits, and what goes wrong."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cosmos3_pipeline.stages import frame_queue
from cosmos3_pipeline.stages.frame_queue import WAITING, FrameQueue, Landing


def portion(value: int, frames: int = 2) -> torch.Tensor:
    return torch.full((frames, 3, 5, 3), value, dtype=torch.uint8)


def test_all_frames_come_in_their_order() -> None:
    seen: list[tuple[int, ...]] = []
    with FrameQueue(lambda frames: seen.append((len(frames), int(frames.min()), int(frames.max())))) as queue:
        for value in range(50):
            queue.arrived()
            queue.put(portion(value, frames=1 + value % 3))
    assert seen == [(1 + value % 3, value, value) for value in range(50)]


def test_the_maker_goes_on_but_not_far() -> None:
    may, begun = threading.Event(), threading.Event()

    def slow(frames: NDArray[np.uint8]) -> None:
        begun.set()
        assert may.wait(60)

    with FrameQueue(slow) as queue:
        for value in range(1 + WAITING):  # one is written, the others wait
            queue.put(portion(value))
            assert begun.wait(60)
        more = threading.Thread(target=lambda: queue.put(portion(9)))
        more.start()
        more.join(0.1)
        assert more.is_alive()
        may.set()
        more.join(60)
        assert not more.is_alive()


def test_what_the_thread_raises_is_raised_by_the_maker_and_nothing_waits() -> None:
    def full(frames: NDArray[np.uint8]) -> None:
        raise OSError("no space left on device")

    put = 0
    with pytest.raises(OSError, match="no space left"), FrameQueue(full) as queue:
        for value in range(1000):
            queue.put(portion(value % 255))
            put += 1
    assert put < 1000
    with pytest.raises(OSError, match="no space left"), FrameQueue(full) as queue:
        queue.put(portion(0))
        queue.finish()


def test_a_maker_that_raises_ends_the_thread_and_is_heard() -> None:
    may, seen = threading.Event(), []

    def slow(frames: NDArray[np.uint8]) -> None:
        assert may.wait(60)
        seen.append(int(frames[0, 0, 0, 0]))

    with pytest.raises(ValueError, match="the latent is cursed"), FrameQueue(slow) as queue:
        queue.put(portion(1))
        queue.put(portion(2))
        threading.Timer(0.05, may.set).start()
        raise ValueError("the latent is cursed")
    assert seen in ([1], [])  # the others were dropped
    assert not queue._thread.is_alive()


class Stream:
    """A stream of a GPU that copies at once, and says so."""

    def __init__(self, device: Any) -> None:
        self.events: list[Event] = []

    def wait_stream(self, other: Any) -> None: ...

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]


class Event:
    waited = False

    def synchronize(self) -> None:
        self.waited = True


class OnGpu(torch.Tensor):
    """A tensor of the host that says that it is a GPU's."""

    is_cuda = True

    def record_stream(self, stream: Any) -> None: ...


def test_a_gpus_frames_land_in_buffers_that_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: threading.Lock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    made, empty = [], torch.empty

    def pinned(*size: Any, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        made.append(size) if pin_memory else None
        return empty(*size, **how)

    monkeypatch.setattr(frame_queue.torch, "empty", pinned)
    landing = Landing()
    sizes = [1, 4, 4, 4, 4, 4]
    for value, frames in enumerate(sizes):
        arrival = landing.start(portion(value, frames).as_subclass(OnGpu))
        arrival.wait()
        assert torch.equal(arrival.frames, portion(value, frames))
        landing.give_back(arrival)
    assert [event.waited for event in landing._stream.events] == [True] * len(sizes)
    # Two of the first chunk's size, and each once more when the larger ones come.
    assert [size[0] for size in made] == [45, 45, 180, 180]
