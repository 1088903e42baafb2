"""Ranks and their launcher: they talk, a broken one ends the run with its own traceback, and none stays."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import HANGS

from cosmos3_pipeline.distributed.failure import RankFailed
from cosmos3_pipeline.distributed.launch import Raised, _cause, _leave, joined_world, run_ranks
from cosmos3_pipeline.distributed.life import Life
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.jobs.ranks import import_for_ranks


@pytest.fixture(scope="module", autouse=True)
def forked_from_torch() -> None:
    """Ranks need not import it each."""
    import_for_ranks("cosmos3_pipeline.distributed.launch:run_ranks")


def add_up(folder: str) -> None:
    with joined_world(device="cpu", threads=1) as device:
        value = torch.tensor([dist.get_rank() + 1.0], device=device)
        dist.all_reduce(value)
        (Path(folder) / f"rank{dist.get_rank()}").write_text(str(value.item()))


def tell_where_ranks_meet(folder: str) -> None:
    (Path(folder) / f"rank{os.environ['RANK']}").write_text(os.environ["MASTER_ADDR"])


def make_a_lock(folder: str) -> None:
    lock = multiprocessing.RLock()
    (Path(folder) / "name").write_text(str(lock._semlock.name))  # type: ignore[attr-defined]


def break_one(folder: str, how: str) -> None:
    with joined_world(device="cpu", threads=1):
        (Path(folder) / f"pid{dist.get_rank()}").write_text(str(os.getpid()))
        dist.barrier()
        if dist.get_rank() == 1:
            if how == "linger":
                # Its connections are closed long before it has ended.
                Finalize(None, dist.destroy_process_group, exitpriority=1)
                Finalize(None, time.sleep, (60,), exitpriority=0)
            if how in ("raise", "linger"):
                raise ValueError("the latent is cursed")
            os.kill(os.getpid(), signal.SIGKILL)
        dist.recv(torch.zeros(1), src=1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_form_one_world(tmp_path: Path) -> None:
    run_ranks(add_up, str(tmp_path), ranks=3)
    assert [(tmp_path / f"rank{r}").read_text() for r in range(3)] == ["6.0"] * 3


def test_ranks_meet_without_the_name_of_the_machine(tmp_path: Path) -> None:
    """That of a container may have no address, and then they would wait until the rendezvous gives up."""
    run_ranks(tell_where_ranks_meet, str(tmp_path), ranks=2)
    assert {(tmp_path / f"rank{r}").read_text() for r in range(2)} == {"localhost"}


def test_a_lock_of_a_rank_has_no_file_that_a_kill_would_leave(tmp_path: Path) -> None:
    """diffusers' progress bars make such locks."""
    run_ranks(make_a_lock, str(tmp_path), ranks=1)
    assert (tmp_path / "name").read_text() == "None"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with (
        pytest.raises(Refusal, match=r"no GPU for rank 0 of this machine\n.* (built for the CPU|sees none)"),
        joined_world(device="cuda", threads=1),
    ):
        pass


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("how", "said"), [("raise", "the latent is cursed"), ("linger", "the latent is cursed"), ("kill", "signal 9")]
)
def test_a_broken_rank_ends_the_run_with_its_own_words(tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(break_one, str(tmp_path), how, ranks=3)
    assert caught.value.rank == 1
    assert said in caught.value.traceback
    assert ("break_one" in caught.value.traceback) == (how != "kill")
    pids = [int((tmp_path / f"pid{r}").read_text()) for r in range(3)]
    assert not any(alive(pid) for pid in pids)


def end_in_time(folder: str, how: str) -> None:
    """Rank 1 ends, or stops, as `how` says; nobody waits for it, as after the last message of a run."""
    with joined_world(device="cpu", threads=1, silence=10.0):  # a busy machine takes seconds to start a rank
        Life.stage = "decode"
        (Path(folder) / f"pid{dist.get_rank()}").write_text(str(os.getpid()))
        dist.barrier()
        if dist.get_rank() == 1:
            if how == "leave":
                os._exit(0)
            time.sleep(1.5)  # its stage is heard of
            os.kill(os.getpid(), getattr(signal, how))
        if how != "SIGKILL":
            dist.recv(torch.zeros(1), src=1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGINT", r"it was killed by signal 2 \(SIGINT\)"),
        ("SIGKILL", r"it was killed by signal 9 \(SIGKILL\)\n .*memory"),
        ("leave", "it ended with exit code 0 before its work was done"),
        ("SIGSTOP", "rank 1 of 2 gives no sign of life for 10 s, last heard of in stage decode"),
    ],
)
def test_a_rank_that_ends_or_stops_is_named(tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(RankFailed, match=said) as caught:
        run_ranks(end_in_time, str(tmp_path), how, ranks=2)
    assert caught.value.rank == 1
    assert not any(alive(int((tmp_path / f"pid{r}").read_text())) for r in range(2))


def come_late(folder: str) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    with joined_world(device="cpu", threads=1, silence=2.0):
        pass


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="rank 1 of 2 has not come in 2 s"):
        run_ranks(come_late, str(tmp_path), ranks=2)


RAISED = "RuntimeError: connection closed"
LOST, FAILED, STOPPED = "PeerLost: rank 0 lost the connection", "PeerFailed: by rank 1", "RunStopped: by rank 1"


@pytest.mark.parametrize(
    ("written", "exit_code", "cause", "says"),
    [
        ({0: RAISED, 1: "ValueError: cursed"}, 1, 0, RAISED),
        ({1: "ValueError: cursed", 0: RAISED}, 1, 1, "ValueError: cursed"),
        ({0: FAILED, 1: "ValueError: cursed"}, 1, 1, "ValueError: cursed"),
        ({1: RAISED}, -9, 0, r"it was killed by signal 9 \(SIGKILL\)\n .*"),
        ({}, 3, 0, "it ended with exit code 3 .*"),
        ({}, 255, 0, ".* the process that ranks are forked from has ended.*"),
        # Killed, and its peers had ended before the launcher looked.
        ({0: LOST, 2: STOPPED}, 1, 1, f"it was killed .*rank 0 noticed:\n{LOST}"),
        # It may have been either of those that wrote nothing.
        ({0: LOST}, 1, 0, LOST),
    ],
)
def test_the_cause_is_whoever_failed_first_and_by_itself(
    written: dict[int, str], exit_code: int, cause: int, says: str, tmp_path: Path
) -> None:
    """Three ranks have `written` in this order; of rank 0 the launcher saw first that it had ended."""
    for second, (rank, words) in enumerate(written.items()):
        _leave(tmp_path, rank, Raised(rank, words.partition(":")[0], words))
        os.utime(tmp_path / f"{rank}.json", ns=(second, second))
    rank, ranks, words = _cause(0, exit_code, tmp_path, ranks=3)
    assert (rank, ranks) == (cause, 3)
    assert re.fullmatch(says, words, re.DOTALL)


def start_and_wait(folder: str) -> None:
    """A launcher that will be killed; its second rank is stopped."""
    run_ranks(wait, folder, ranks=2)


def wait(folder: str) -> None:
    rank = os.environ["RANK"]
    (Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
    if rank == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(HANGS)


def test_ranks_end_with_their_launcher_also_one_that_is_stopped(tmp_path: Path) -> None:
    launcher = multiprocessing.get_context("spawn").Process(target=start_and_wait, args=(str(tmp_path),))
    launcher.start()
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    until(lambda: all(file.is_file() and file.read_text() for file in files))
    launcher.kill()
    launcher.join()
    until(lambda: not any(alive(int(file.read_text())) for file in files))


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + HANGS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
