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
def test_a_message_that_is_late_names_the_rank_that_has_begun_the_fewest(arrived: bool) -> None:
    aborted, store = threading.Event(), HashStore()
    store.set("begun/1", "7")
    store.set("begun/2", "3")
    with watching(lambda: None, aborted, store=store, patience=0.05) as watch:
        watch.begun = 8
        watch.waits_for(lambda: arrived)
        assert aborted.wait(0.5 if arrived else 60) != arrived
        if arrived:
            watch.check()
            assert store.get("begun/0") == b"8"
            return
        with pytest.raises(PeerLost, match=r"rank 2 has begun the fewest messages, 3 where this one has begun 8"):
            watch.check()


def test_a_rank_that_never_began_is_named() -> None:
    aborted = threading.Event()
    with watching(lambda: None, aborted, patience=0.02, size=2) as watch:
        watch.begun = 1
        watch.waits_for(lambda: False)
        assert aborted.wait(60)
        with pytest.raises(PeerLost, match=r"rank 1 has begun the fewest messages, 0 where"):
            watch.check()


def test_messages_that_go_on_are_not_late() -> None:
    aborted = threading.Event()
    with watching(lambda: None, aborted, patience=30) as watch:
        for _ in range(20):
            watch.waits_for(lambda: False)
            time.sleep(0.005)
        assert not aborted.is_set()
