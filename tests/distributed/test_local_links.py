"""Messages between ranks of one machine: whole, in order, of all sizes, and ended by whoever leaves."""

from __future__ import annotations

import ctypes
import math
import os
import random
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks

from cosmos3_pipeline.distributed import channel, peer_memory
from cosmos3_pipeline.distributed import comm as comm_module
from cosmos3_pipeline.distributed.board import PeerFailed, PeerLost
from cosmos3_pipeline.distributed.channel import MOST_PLACES, SMALL_BYTES
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.distributed.peer_memory import Process

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


def _messages(source: int, target: int) -> list[torch.Tensor]:
    """Of all sizes around the limit, the same on both ranks."""
    generator = torch.Generator().manual_seed(10 * source + target)
    sizes = [1, 7, 4096, SMALL_BYTES - 1, SMALL_BYTES, SMALL_BYTES + 1, 3 * SMALL_BYTES, 5, SMALL_BYTES]
    random.Random(source - target).shuffle(sizes)
    made = []
    for i, size in enumerate(sizes):
        dtype = DTYPES[i % len(DTYPES)]
        count = max(1, size // dtype.itemsize)
        made.append(torch.randint(0, 255, (count,), generator=generator).to(dtype))
    return made


def _no_reading(*blind: int) -> None:
    """From now on these ranks may not read the memory of others."""
    if dist.get_rank() in blind:
        Process.is_readable = property(lambda self: False)  # type: ignore[assignment, method-assign]


def _everyone_to_everyone(rank: int, blind: tuple[int, ...]) -> bool:
    _no_reading(*blind)
    comm = Comm()
    others = [peer for peer in range(comm.size) if peer != rank]
    assert comm.reads_memory == (not blind)
    for size in (1, SMALL_BYTES, SMALL_BYTES + 1):
        message = torch.empty(size, dtype=torch.uint8)
        for peer in others:
            assert comm._local.carries(message, peer) == (size <= SMALL_BYTES or not {rank, peer} & {*blind})
    with comm.run():
        arriving = {peer: [torch.empty_like(m) for m in _messages(peer, rank)] for peer in others}
        receives = [(buffer, peer) for peer in others for buffer in arriving[peer]]
        comm.exchange([(message, peer) for peer in others for message in _messages(rank, peer)], receives).wait()
    return all(
        torch.equal(got, sent)
        for peer in others
        for got, sent in zip(arriving[peer], _messages(peer, rank), strict=True)
    )


def _agree_beside_payload(rank: int) -> list[list[str]]:
    """Agreements of all sizes while payload is under way that nobody has asked for yet."""
    comm, agreed = Comm(), []
    with comm.run():
        buffers = [torch.empty(8) for peer in range(comm.size) if peer != rank]
        others = [peer for peer in range(comm.size) if peer != rank]
        leaving = comm.exchange(sends=[(torch.full((8,), float(rank)), peer) for peer in others])
        for size in (0, 10, 2 * SMALL_BYTES * rank):
            agreed.append([f"{len(text)} of {text[:1]}" for text in comm.agree(str(rank) * size)])
        comm.exchange(receives=list(zip(buffers, others, strict=True))).wait()
        leaving.wait()
    assert [float(buffer[-1]) for buffer in buffers] == others
    return agreed


def _one_leaves(rank: int) -> str:
    comm = Comm()
    try:
        with comm.run():
            if rank == 1:
                raise ValueError("no paint left")
            comm.exchange(receives=[(torch.empty(8), 1)]).wait()
    except (PeerFailed, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# What halos, rows of a whole and columns look like: (shape of a whole, its part), small and large, in few places
# and in many.
PARTS = [
    ((1, 2, 6, 40, 3), (slice(None), slice(None), slice(1, 2))),
    ((1, 2, 6, 40, 3), (slice(None), slice(None), slice(None), slice(4, 5))),
    ((1, 3, 90, 50, 8), (slice(None), slice(None), slice(20, 89))),
    ((1, MOST_PLACES + 1, 4, 2), (slice(None), slice(None), slice(1, 3))),
    ((1, MOST_PLACES + 1, 400, 8), (slice(None), slice(None), slice(1, 399))),
    ((1, 4, 300, 100), (slice(None), slice(None), slice(7, 300), slice(0, 99))),
    ((5, 4), (slice(2, 2),)),
]


def _parts(rank: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, tuple[slice, ...]]]:
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(shape, generator=generator).to(dtype), part) for shape, part in PARTS]


def _parts_into_parts(rank: int, blind: tuple[int, ...], dtype: torch.dtype, gaps: str, accelerator: bool) -> bool:
    """Parts of tensors go straight into parts of others, and nothing beside those changes.

    With gaps on both sides, where they are sent or where they arrive. `accelerator`: as between its tensors, by
    PyTorch's own calls.
    """
    _no_reading(*blind)
    if accelerator:
        comm_module._on_cpu = lambda *tensors: False
    comm, given, expected = Comm(), _parts(rank, dtype), _parts(1 - rank, dtype)
    if accelerator:  # which have no message of nothing
        given, expected = (
            [(whole, part) for whole, part in parts if whole[part].numel()] for parts in (given, expected)
        )
    for _ in range(3):
        with comm.run():
            wholes = [torch.full_like(whole, -1.0) for whole, _ in expected]
            sends = [whole[part] for whole, part in given]
            receives = [whole[part] for whole, (_, part) in zip(wholes, expected, strict=True)]
            if gaps == "there":
                sends = [part.contiguous() for part in sends]
            if gaps == "here":
                receives = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in receives]
            comm.exchange([(part, 1 - rank) for part in sends], [(part, 1 - rank) for part in receives]).wait()
        for whole, received, (there, part) in zip(wholes, receives, expected, strict=True):
            right = torch.full_like(there, -1.0)
            if gaps != "here":
                right[part] = there[part]
            if not (torch.equal(received, there[part]) and torch.equal(whole, right)):
                return False
    return True


@pytest.mark.parametrize("gaps", ["here and there", "here", "there"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blind", [(), (0, 1)], ids=["all_may_read", "none_may"])
def test_parts_of_tensors_arrive_in_parts_of_others(blind: tuple[int, ...], dtype: torch.dtype, gaps: str) -> None:
    assert run_on_ranks(_parts_into_parts, 2, blind, dtype, gaps, False) == [True, True]


def test_parts_of_an_accelerators_tensors_arrive_in_parts_of_others() -> None:
    assert run_on_ranks(_parts_into_parts, 2, (), torch.float32, "here and there", True) == [True, True]


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


def _flood(rank: int) -> bool:
    """Small messages, each in many places, of which none is taken at first: the socket is full midway."""
    comm, count = Comm(), 100
    whole = torch.arange(2 * MOST_PLACES * 300, dtype=torch.int32).view(2 * MOST_PLACES, 300)
    part = whole[::2, :299]
    assert part.nbytes < SMALL_BYTES < count * part.nbytes
    with comm.run():
        if rank == 0:
            leaving = comm.exchange(sends=[(part, 1)] * count)
            comm.agree(None)
            leaving.wait()
            return True
        comm.agree(None)
        buffers = [torch.zeros_like(whole) for _ in range(count)]
        comm.exchange(receives=[(buffer[::2, :299], 0) for buffer in buffers]).wait()
    return all(torch.equal(buffer[::2, :299], part) and not buffer[1::2].any() for buffer in buffers)


def test_messages_in_many_places_go_on_where_a_full_socket_stopped_them() -> None:
    assert run_on_ranks(_flood, 2) == [True, True]


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    random=st.randoms(use_true_random=False),
    dtype=st.sampled_from([*DTYPES, torch.int64]),
)
def test_the_places_of_a_tensor_hold_its_elements_in_order(
    shape: list[int], random: random.Random, dtype: torch.dtype
) -> None:
    tensor = torch.arange(math.prod(shape)).to(dtype).reshape(shape)
    for dim, size in enumerate(shape):
        start = random.randrange(size)
        tensor = tensor.narrow(dim, start, random.randint(1, size - start))
    if random.random() < 0.5:
        tensor = tensor.permute(random.sample(range(tensor.dim()), tensor.dim()))
    offsets = channel._offsets(tensor.shape, tensor.stride(), tensor.element_size())
    length, start = tensor.nbytes // len(offsets), tensor.data_ptr()
    held = b"".join(ctypes.string_at(start + offset, length) for offset in offsets)
    assert held == bytes(torch.tensor(tensor.flatten().tolist(), dtype=dtype).view(torch.uint8).tolist())
    assert len(offsets) == 1 or not tensor.is_contiguous()


def test_only_what_must_be_is_copied() -> None:
    whole = torch.zeros(2, 64, 400, 8)
    small, large = whole[:, :1], whole[:, :60]
    assert small.nbytes <= SMALL_BYTES < large.nbytes and not small.is_contiguous() and not large.is_contiguous()
    for part, arrives in ((small, False), (small, True), (large, True), (large[:1], False)):
        assert channel.Message(part, arrives=arrives)._memory is part
    columns = whole[:, :, :, :1]
    for part, arrives in ((large, False), (columns, False), (columns, True)):
        assert channel.Message(part, arrives=arrives)._memory is not part


def test_of_a_tensor_in_very_many_places_none_is_told() -> None:
    for shape, strides in (
        ((MOST_PLACES + 1, 3), (4, 1)),
        ((1 << 40, 3), (4, 1)),
        ((2, MOST_PLACES, 2), (999, 3, 1)),
    ):
        assert channel._offsets(shape, strides, 4) == ()
    assert len(channel._offsets((MOST_PLACES, 3), (4, 1), 4)) == MOST_PLACES


@pytest.mark.parametrize("blind", [(), (1,), (0, 1, 2)], ids=["all_may_read", "one_may_not", "none_may"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_messages_arrive_whole_and_in_order(ranks: int, blind: tuple[int, ...]) -> None:
    assert run_on_ranks(_everyone_to_everyone, ranks, blind) == [True] * ranks


def _waits_for_one_who_waits(rank: int) -> bool:
    """The receiver waits for something else, which the sender only does when its large message has left."""
    comm, message = Comm(), torch.arange(SMALL_BYTES)
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


def _many_at_once(rank: int) -> bool:
    """More large messages than receipts fit a socket's buffer."""
    comm, count = Comm(), 1000
    message = torch.arange(SMALL_BYTES // 4, dtype=torch.int64)
    with comm.run():
        if rank == 0:
            comm.exchange(sends=[(message, 1)] * count).wait()
            return True
        buffer = torch.empty_like(message)
        comm.exchange(receives=[(buffer, 0)] * count).wait()
        return torch.equal(buffer, message)


def test_a_thousand_large_messages_may_be_under_way() -> None:
    assert run_on_ranks(_many_at_once, 2) == [True, True]


def _sender_goes(rank: int, dies: bool, forks: bool) -> str:
    """The sender of a large message is gone before its receiver looks for it, but perhaps for a fork of it."""
    comm = Comm()
    if forks and rank == 1 and os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    taken = ""
    try:
        with comm.run():
            if rank == 1:
                leaving = comm.exchange(sends=[(torch.ones(SMALL_BYTES), 0)])
                if dies:
                    os._exit(1)
                del leaving
                raise ValueError("no paint left")
            time.sleep(1)
            comm.exchange(receives=[(torch.empty(SMALL_BYTES), 1)]).wait()
            taken = " after it was taken"
    except (PeerFailed, PeerLost, ValueError) as error:
        time.sleep(2 * rank)  # its memory could still be read
        return type(error).__name__ + taken
    return "nothing"


def test_nobody_takes_a_message_whose_sender_has_gone() -> None:
    assert run_on_ranks(_sender_goes, 2, False, False) == ["PeerFailed", "ValueError"]
    assert run_on_ranks(_sender_goes, 2, False, True) == ["PeerFailed", "ValueError"]
    assert run_on_ranks(_sender_goes, 2, True, False, may_die=(1,)) == ["PeerLost", None]


def test_a_process_is_readable_only_if_it_is_the_one_that_was_meant() -> None:
    own = Process.this()
    assert own.is_readable
    assert not replace(own, probe="00" * 16).is_readable
    assert not replace(own, probe_address=8).is_readable
    assert not replace(own, pid=2**22 + 1).is_readable
    into = torch.empty(8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"the memory of process {own.pid} cannot be read"):
        own.read(8, into.data_ptr(), 8)


def test_without_the_system_call_nothing_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "_libc", lambda: None)
    assert not Process.this().is_readable


def test_waiting_ends_when_the_sender_fails() -> None:
    waiting, failing = run_on_ranks(_one_leaves, 2)
    assert waiting.startswith("PeerFailed") and "no paint left" in waiting
    assert failing == "ValueError: no paint left"


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_agreement_is_of_any_size_and_not_mixed_up_with_payload(ranks: int) -> None:
    everyone = range(ranks)
    expected = [
        ["0 of " for _ in everyone],
        [f"10 of {rank}" for rank in everyone],
        [f"{2 * SMALL_BYTES * rank} of {rank if rank else ''}" for rank in everyone],
    ]
    assert run_on_ranks(_agree_beside_payload, ranks) == [expected] * ranks
