"""Small messages between ranks of one machine: whole, in order, beside large ones, and ended by whoever leaves."""

from __future__ import annotations

import random

import pytest
import torch
from ranks import run_on_ranks

from cosmos3_pipeline.distributed.board import PeerFailed
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.distributed.local import SMALL_BYTES

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


def _everyone_to_everyone(rank: int) -> bool:
    comm = Comm()
    others = [peer for peer in range(comm.size) if peer != rank]
    for size, small in [(1, True), (SMALL_BYTES, True), (SMALL_BYTES + 1, False)]:
        message = torch.empty(size, dtype=torch.uint8)
        assert all(links.carries(message, peer) == small for links in comm._lanes for peer in others)
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


def _scattered(rank: int) -> str:
    comm, columns = Comm(), torch.zeros(4, 4)[:, :2]
    try:
        with comm.run():
            if rank == 1:
                comm.exchange(sends=[(columns, 0)]).wait()
            comm.exchange(receives=[(torch.empty(4, 2), 1)]).wait()
    except (PeerFailed, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_tensor_with_gaps_is_refused_by_whoever_sends_it() -> None:
    waiting, sending = run_on_ranks(_scattered, 2)
    assert sending.startswith("ValueError: a tensor of shape (4, 2) and strides (4, 1) in a message;")
    assert waiting.startswith("PeerFailed") and "send tensor.contiguous()" in waiting


@pytest.mark.parametrize("ranks", [2, 3])
def test_messages_arrive_whole_and_in_order(ranks: int) -> None:
    assert run_on_ranks(_everyone_to_everyone, ranks) == [True] * ranks


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
