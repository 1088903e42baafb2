"""Messages of a Comm: whole, in order, of all sizes, and ended by a rank that leaves."""

from __future__ import annotations

import gc
import os
import random
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch.distributed.distributed_c10d import _get_default_store

from cosmos3_pipeline.distributed import links
from cosmos3_pipeline.distributed.board import PeerError, PeerFailed
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.distributed.host_path import FORCED
from cosmos3_pipeline.distributed.links import SLOT_BYTES, SMALL_BYTES

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]
FEW_SLOTS = 3


def _comm(*, apart: tuple[int, ...] = (), slots: int = links.SLOTS) -> Comm:
    """A Comm whose ranks `apart` are as if each was on a machine of its own."""
    links.SLOTS = slots
    connected = links._connected
    links._connected = lambda address, rank, peer, lanes: (
        None if {rank, peer} & {*apart} else connected(address, rank, peer, lanes)
    )
    return Comm()


def _messages(source: int, target: int) -> list[torch.Tensor]:
    """Messages of all sizes around the limits. Both ranks compute the same messages."""
    generator = torch.Generator().manual_seed(10 * source + target)
    sizes = [0, 1, 7, 4096, *(n + d for n in (SMALL_BYTES, SLOT_BYTES, 2 * SLOT_BYTES) for d in (-1, 0, 1))]
    sizes += [(FEW_SLOTS + 2) * SLOT_BYTES + 5, 5]
    random.Random(source - target).shuffle(sizes)
    return [
        torch.randint(0, 255, (size // dtype.itemsize,), generator=generator).to(dtype)
        for size, dtype in zip(sizes, DTYPES * len(sizes), strict=False)
    ]


def _everyone_to_everyone(rank: int, apart: tuple[int, ...], slots: int) -> bool:
    comm = _comm(apart=apart, slots=slots)
    others = [peer for peer in range(comm.size) if peer != rank]
    assert [peer in comm._links for peer in others] == [not {rank, peer} & {*apart} for peer in others]
    with comm.run():
        arriving = {peer: [torch.empty_like(m) for m in _messages(peer, rank)] for peer in others}
        receives = [(buffer, peer) for peer in others for buffer in arriving[peer]]
        comm.exchange([(message, peer) for peer in others for message in _messages(rank, peer)], receives).wait()
        # A picture: large, from one rank to all.
        picture = torch.arange(SLOT_BYTES)
        given = picture.clone() if rank == 1 else torch.zeros_like(picture)
        comm.broadcast(given, source=1)
        gathered = comm.all_gather(given + rank)
    assert torch.equal(given, picture)
    assert all(torch.equal(part, picture + peer) for peer, part in enumerate(gathered))
    assert comm.ledger.counts.get("broadcast") == (comm.ledger.counts["all_gather"] if rank == 1 else None)
    return all(
        torch.equal(got, sent)
        for peer in others
        for got, sent in zip(arriving[peer], _messages(peer, rank), strict=True)
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("ranks", "apart", "slots"),
    [(2, (), links.SLOTS), (2, (1,), links.SLOTS), (3, (), FEW_SLOTS), (3, (1,), FEW_SLOTS)],
)
def test_messages_arrive_whole_and_in_order(ranks: int, apart: tuple[int, ...], slots: int) -> None:
    assert run_on_ranks(_everyone_to_everyone, ranks, apart, slots) == [True] * ranks


# Shapes of messages, small and large, as (shape of the whole tensor, part that is sent): halos, rows, columns.
PARTS = [
    ((1, 2, 6, 40, 3), (slice(None), slice(None), slice(1, 2))),
    ((1, 2, 6, 40, 3), (slice(None), slice(None), slice(None), slice(4, 5))),
    ((1, 3, 90, 50, 80), (slice(None), slice(None), slice(20, 89))),
    ((5, 4), (slice(2, 2),)),
]


def _parts(rank: int) -> list[tuple[torch.Tensor, tuple[slice, ...]]]:
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(shape, generator=generator), part) for shape, part in PARTS]


def _parts_into_parts(rank: int, way: str) -> bool:
    """Parts of tensors become parts of others, and nothing beside those changes."""
    given, expected = _parts(rank), _parts(1 - rank)
    if way == "accelerator":
        os.environ[FORCED] = "1"
        given, expected = given[:-1], expected[:-1]  # there is no message of nothing
    comm = _comm(apart=(1,) if way == "gloo" else ())
    wholes = [torch.full_like(whole, -1.0) for whole, _ in expected]
    with comm.run():
        receives = [(whole[part], 1 - rank) for whole, (_, part) in zip(wholes, expected, strict=True)]
        comm.exchange([(whole[part], 1 - rank) for whole, part in given], receives).wait()
    for whole, (there, part) in zip(wholes, expected, strict=True):
        right = torch.full_like(there, -1.0)
        right[part] = there[part]
        assert torch.equal(whole, right)
    return True


@pytest.mark.parametrize("way", ["links", "gloo", "accelerator"])
def test_parts_of_tensors_arrive_in_parts_of_others(way: str) -> None:
    assert run_on_ranks(_parts_into_parts, 2, way) == [True, True]


def _round(rank: int, slots: int) -> bool:
    """Every rank sends 64 MB to the next one before it asks for those of the rank before it."""
    comm, count = _comm(slots=slots), (64 << 20) // 8
    after, before = (rank + 1) % comm.size, (rank - 1) % comm.size
    buffer = torch.empty(count, dtype=torch.int64)
    with comm.run():
        leaving = comm.exchange(sends=[(torch.arange(count) + rank, after)])
        if slots * SLOT_BYTES >= buffer.nbytes:
            leaving.wait()
        arriving = comm.exchange(receives=[(buffer, before)])
        leaving.wait()
        arriving.wait()
    return torch.equal(buffer, torch.arange(count) + before)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("ranks", "slots"), [(2, FEW_SLOTS), (2, links.SLOTS), (3, FEW_SLOTS), (4, FEW_SLOTS)])
def test_ranks_that_send_to_each_other_do_not_block(ranks: int, slots: int) -> None:
    assert run_on_ranks(_round, ranks, slots) == [True] * ranks


def _flood(rank: int) -> bool:
    """So many messages that neither socket nor slots hold them, none of which is taken at first."""
    comm, count = Comm(), 600
    whole, large = torch.arange(SMALL_BYTES // 4).view(16, -1), torch.arange(SMALL_BYTES // 8 + 1)
    small = whole[:, : whole.shape[1] // 2]
    with comm.run():
        if rank == 0:
            leaving = comm.exchange(sends=[(small, 1), (large, 1)] * count)
            comm.agree(None)
            leaving.wait()
            return True
        comm.agree(None)  # rank 0, which waits for nothing else, must be able to say so
        for _ in range(count):
            buffers = [torch.zeros_like(whole)[:, : small.shape[1]], torch.zeros_like(large)]
            comm.exchange(receives=[(buffer, 0) for buffer in buffers]).wait()
            assert torch.equal(buffers[0], small) and torch.equal(buffers[1], large)
    return True


def test_more_messages_than_fit_may_be_in_flight() -> None:
    assert run_on_ranks(_flood, 2) == [True, True]


def _waits_for_one_who_waits(rank: int) -> bool:
    """The receiver waits for something else, which the sender only does when its large message has left."""
    comm, message = _comm(slots=FEW_SLOTS), torch.arange(SLOT_BYTES)
    with comm.run():
        if rank == 0:
            comm.exchange(sends=[(message, 1)]).wait()
            comm.agree(None)
            return True
        buffer = torch.empty_like(message)
        arriving = comm.exchange(receives=[(buffer, 0)])
        comm.agree(None)
        arriving.wait()
        return torch.equal(buffer, message)


def test_whoever_waits_moves_the_other_messages() -> None:
    assert run_on_ranks(_waits_for_one_who_waits, 2) == [True, True]


def _agree_beside_payload(rank: int) -> list[list[str]]:
    """Agreements of all sizes while payload is in flight that nobody has asked for yet."""
    comm, agreed = Comm(), []
    others = [peer for peer in range(comm.size) if peer != rank]
    buffers = [torch.empty(8) for _ in others]
    with comm.run():
        leaving = comm.exchange(sends=[(torch.full((8,), float(rank)), peer) for peer in others])
        for size in (0, 10, 2 * SMALL_BYTES * rank):
            agreed.append([f"{len(text)} of {text[:1]}" for text in comm.agree(str(rank) * size)])
        comm.exchange(receives=list(zip(buffers, others, strict=True))).wait()
        leaving.wait()
    assert [float(buffer[-1]) for buffer in buffers] == others
    return agreed


@pytest.mark.usefixtures("path")
def test_an_agreement_is_of_any_size_and_not_mixed_up_with_payload() -> None:
    long = [f"{2 * SMALL_BYTES * rank} of {rank or ''}" for rank in range(3)]
    expected = [["0 of "] * 3, [f"10 of {rank}" for rank in range(3)], long]
    assert run_on_ranks(_agree_beside_payload, 3) == [expected] * 3


def _memories() -> tuple[int, int]:
    """The memories of links that this process has open, and those that it maps."""
    files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.exists()]
    maps = Path("/proc/self/maps").read_text()
    return sum("memfd:cosmos3" in file for file in files), maps.count("memfd:cosmos3")


def _breaks_off(rank: int, how: str) -> list[str]:
    """A run in which one rank leaves in the middle of a large message, and a run after it."""
    comm, told = _comm(slots=FEW_SLOTS), []
    message = torch.arange(4 * FEW_SLOTS * SLOT_BYTES)
    forked = how.endswith("fork") and rank == 1 and os.fork() == 0
    if forked:  # it keeps the connections of its parent open until every rank has noticed
        _get_default_store().wait(["noticed"])
        os._exit(0)
    try:
        with comm.run():
            if rank == 1:
                if "sender" in how:
                    comm.exchange(sends=[(torch.ones(8), 0), (message, 0)])
                else:
                    comm.exchange(receives=[(torch.empty(8), 0), (torch.empty_like(message), 0)])
                if "dies" in how:
                    os._exit(1)
                raise ValueError("no paint left")
            if "sender" in how:
                comm.exchange(receives=[(torch.empty(8), 1), (torch.empty_like(message), 1)]).wait()
            else:
                comm.exchange(sends=[(torch.ones(8), 1), (message, 1)]).wait()
    except (PeerError, ValueError) as error:
        told.append(f"{type(error).__name__}: {error}")
        assert comm._links._links == {} and _memories() == (0, 0)
    if rank == 0:
        _get_default_store().set("noticed", "")
    elif "fork" in how:
        _get_default_store().wait(["noticed"])
    if "dies" in how:
        return told
    for _ in range(2):  # no message of the broken run is left
        with comm.run():
            received = torch.zeros(2 * SLOT_BYTES)
            comm.exchange([(torch.full_like(received, 1.0 + rank), 1 - rank)], [(received, 1 - rank)]).wait()
            assert torch.equal(received, torch.full_like(received, 2.0 - rank))
    assert _memories() == (1, 1)
    return told


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("how", ["sender raises", "receiver raises", "sender raises but for a fork"])
def test_a_rank_that_raises_ends_a_large_message_for_good(how: str) -> None:
    told, raised = run_on_ranks(_breaks_off, 2, how)
    assert raised == ["ValueError: no paint left"]
    assert len(told) == 1
    assert told[0].startswith("PeerFailed: rank 1 of the group failed (ValueError: no paint left)")


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("how", ["sender dies", "receiver dies"])
def test_a_rank_that_dies_ends_a_large_message(how: str) -> None:
    told, _ = run_on_ranks(_breaks_off, 2, how, may_die=(1,))
    assert len(told) == 1
    assert told[0].startswith("PeerLost: rank 0 of 2 lost the connection to another rank")


def _no_room(rank: int) -> list[str]:
    """One rank has no memory for the copy of a message; the next run goes on."""
    comm, told = Comm(), []
    columns = torch.arange(2.0 * SMALL_BYTES).view(-1, 2)[:, :1]
    contiguous = torch.Tensor.contiguous
    for full in (True, False):
        buffer = torch.zeros(SMALL_BYTES, 1)
        if full and rank == 1:
            torch.Tensor.contiguous = _out_of_memory  # type: ignore[assignment, method-assign]
        try:
            with comm.run():
                if rank == 1:
                    comm.exchange(sends=[(columns, 0)]).wait()
                else:
                    comm.exchange(receives=[(buffer, 1)]).wait()
            told.append("equal" if rank or torch.equal(buffer, columns) else "different")
        except RuntimeError as error:
            told.append(type(error).__name__)
        torch.Tensor.contiguous = contiguous  # type: ignore[method-assign]
    return told


def _out_of_memory(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("no paint left")


def test_a_rank_without_memory_for_a_message_is_not_one_that_was_lost() -> None:
    assert run_on_ranks(_no_room, 2) == [["PeerFailed", "equal"], ["OutOfMemoryError", "equal"]]


def _on_accelerators(rank: int, how: str) -> str:
    """Rank 0 waits for a message between accelerators, which never comes when rank 1 is gone."""
    os.environ[FORCED] = "1"
    comm = Comm()
    try:
        with comm.run():
            if rank == 1 and how == "dies":
                os._exit(1)
            if rank == 1 and how == "raises":
                raise ValueError("no paint left")
            comm.exchange([(torch.ones(8), 1 - rank)], [(torch.empty(8), 1 - rank)]).wait()
            if how == "raises late" and rank == 1:
                raise ValueError("no paint left")
            if how == "raises late":
                comm.exchange(receives=[(torch.empty(8), 1)]).wait()
    except (PeerError, ValueError) as error:
        if isinstance(error, PeerFailed):
            assert (error.rank, error.problem.works) == (1, "see rank 1's own error")
        return type(error).__name__
    return "done"


@pytest.mark.parametrize(
    ("how", "outcomes"),
    [
        ("arrives", ["done", "done"]),
        ("raises", ["PeerFailed", "ValueError"]),
        ("raises late", ["PeerFailed", "ValueError"]),
        ("dies", ["PeerLost", None]),
    ],
)
def test_who_waits_for_an_accelerators_message_hears_of_a_failed_rank(how: str, outcomes: list[Any]) -> None:
    assert run_on_ranks(_on_accelerators, 2, how, may_die=(1,) if how == "dies" else ()) == outcomes


def _stuck(rank: int) -> str:
    """Rank 1 begins its second message when the others have given up."""
    comm, store = Comm(patience=timedelta(seconds=2)), _get_default_store()
    try:
        with comm.run():
            for number in range(2):
                if rank == 1 and number == 1:
                    store.wait(["given up/0", "given up/2"])
                received = torch.empty(8)
                before, after = (rank - 1) % 3, (rank + 1) % 3
                comm.exchange([(torch.ones(8), after)], [(received, before)]).wait()
    except (PeerError, RuntimeError) as error:
        return str(error)
    finally:
        if rank != 1:
            store.set(f"given up/{rank}", "")
    return "done"


def test_a_rank_that_is_stuck_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, "1")
    first, stuck, last = run_on_ranks(_stuck, 3)
    # The one that gives up later hears it from the other.
    for words in (first, last, stuck):
        assert "for 2 s; rank 1 waits for nobody" in words, words


def _closed(rank: int) -> tuple[Any, ...]:
    """Connections and threads before and after the end."""
    comm = Comm()
    with comm.run():
        comm.broadcast(torch.ones(4))
    before = _memories(), {thread.name for thread in threading.enumerate()}
    comm.agree(None)
    comm.close()
    comm.close()
    return *before, _memories(), {thread.name for thread in threading.enumerate()}


def test_what_is_closed_leaves_nothing(path: str) -> None:
    watches = {"cosmos3-watch"} if path == "accelerator" else set()
    for open_links, threads, links_left, left in run_on_ranks(_closed, 2):
        assert (open_links, links_left) == ((1, 1), (0, 0))
        assert threads - left == watches


def _watches() -> int:
    return sum(thread.name == "cosmos3-watch" for thread in threading.enumerate())


def _forgotten(rank: int, how: str) -> tuple[int, int]:
    """Threads that watch, and links that are open, after a Comm is dropped, or a run is left in the middle."""
    comm = Comm()
    if how == "dropped":
        comm.agree(None)
        del comm
        gc.collect()
        return _watches(), _memories()[0]
    left = comm.run()
    left.__enter__()
    comm.broadcast(torch.ones(4))
    with comm.run():
        comm.broadcast(torch.ones(4))
    return _watches(), _memories()[0]


def test_a_comm_that_is_dropped_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, "1")
    assert [watches for watches, _ in run_on_ranks(_forgotten, 2, "dropped")] == [0, 0]


def test_a_run_that_is_left_in_the_middle_leaves_no_second_thread(path: str) -> None:
    assert run_on_ranks(_forgotten, 2, "left") == [(int(path == "accelerator"), 1)] * 2
