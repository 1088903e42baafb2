"""The thread that ends a run on a rank that waits for its accelerator: by whom it hears, and what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.distributed import HashStore

from cosmos3_pipeline.distributed import watch as watch_module
from cosmos3_pipeline.distributed.board import PeerFailed, PeerLost
from cosmos3_pipeline.distributed.watch import Watch


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(watch_module, "TELL_SECONDS", 0.0)


@contextmanager
def watching(look: Callable[[], None], aborted: threading.Event, **more: Any) -> Iterator[Watch]:
    asked = {"store": HashStore(), "rank": 0, "size": 3, "patience": 1e9} | more
    watch = Watch(look, aborted.set, **asked)
    yield watch
    watch.stop()
    assert not watch._thread.is_alive()


def test_it_aborts_when_another_rank_has_ended_the_run() -> None:
    aborted, over = threading.Event(), threading.Event()

    def look() -> None:
        if over.is_set():
            raise PeerFailed(2, "no paint left")

    with watching(look, aborted) as watch:
        watch.check()
        assert not aborted.wait(0.1)
        over.set()
        assert aborted.wait(60)
        with pytest.raises(PeerFailed, match="no paint left"):
            watch.check()


@pytest.mark.parametrize("arrived", [True, False])
def test_a_message_that_is_late_names_the_rank_that_waits_for_nobody(arrived: bool) -> None:
    aborted, store = threading.Event(), HashStore()
    store.set("waits/1", "[2]")
    store.set("waits/2", "[]")
    with watching(lambda: None, aborted, store=store, patience=0.05) as watch:
        watch.waits_for(lambda: arrived, [1])
        assert aborted.wait(0.5 if arrived else 60) != arrived
        if arrived:
            watch.check()
            return
        with pytest.raises(PeerLost, match=r"rank 0 of 3 has waited for rank 1 for 0 s; rank 2 waits for nobody"):
            watch.check()
        assert store.get("waits/0") == b"[1]"


def test_a_rank_that_never_told_anything_is_named() -> None:
    aborted = threading.Event()
    with watching(lambda: None, aborted, patience=0.02, size=2) as watch:
        watch.waits_for(lambda: False, [1])
        assert aborted.wait(60)
        with pytest.raises(PeerLost, match=r"rank 1 waits for nobody"):
            watch.check()


def test_ranks_that_wait_for_each_other_are_told() -> None:
    aborted, store = threading.Event(), HashStore()
    store.set("waits/1", "[2]")
    store.set("waits/2", "[0, 1]")
    with watching(lambda: None, aborted, store=store, patience=0.02) as watch:
        watch.waits_for(lambda: False, [1, 2])
        assert aborted.wait(60)
        with pytest.raises(PeerLost, match=r"rank 1 and 2 for 0 s; all of these ranks wait for each other"):
            watch.check()


def test_messages_that_go_on_are_not_late() -> None:
    aborted = threading.Event()
    with watching(lambda: None, aborted, patience=30) as watch:
        for _ in range(20):
            watch.waits_for(lambda: False, [1])
            time.sleep(0.005)
        assert not aborted.is_set()
