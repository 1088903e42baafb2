"""Ranks through the elastic launcher: they talk, and a broken one ends the run with its own traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from multiprocessing.util import Finalize
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cosmos3_pipeline.distributed.failure import RankFailed
from cosmos3_pipeline.distributed.launch import _cause, joined_world, run_ranks
from cosmos3_pipeline.errors import Refusal


def add_up(folder: str) -> None:
    with joined_world(device="cpu", threads=1) as device:
        value = torch.tensor([dist.get_rank() + 1.0], device=device)
        dist.all_reduce(value)
        (Path(folder) / f"rank{dist.get_rank()}").write_text(str(value.item()))


def tell_where_ranks_meet(folder: str) -> None:
    (Path(folder) / f"rank{os.environ['RANK']}").write_text(os.environ["MASTER_ADDR"])


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with (
        pytest.raises(Refusal, match=r"no GPU for rank 0 of this machine\n.* built for the CPU"),
        joined_world(device="cuda", threads=1),
    ):
        pass


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


RAISED = "RuntimeError: connection closed"
LOST, FAILED, STOPPED = "PeerLost: rank 0 lost the connection", "PeerFailed: by rank 1", "RunStopped: by rank 1"


@pytest.mark.parametrize(
    ("written", "exit_code", "cause", "says"),
    [
        ({0: RAISED, 1: "ValueError: cursed"}, 1, 0, RAISED),
        ({1: "ValueError: cursed", 0: RAISED}, 1, 1, "ValueError: cursed"),
        ({0: FAILED, 1: "ValueError: cursed"}, 1, 1, "ValueError: cursed"),
        ({1: "", 0: RAISED}, 1, 0, RAISED),
        ({1: "cut off", 0: RAISED}, 1, 0, RAISED),
        ({1: RAISED}, -9, 0, "it was killed by signal 9 (SIGKILL)"),
        ({}, 3, 0, "it ended with exit code 3"),
        # Killed, and its peers had ended before the launcher looked.
        ({0: LOST, 2: STOPPED}, 1, 1, f"it ended without a traceback; .* rank 0 noticed:\n{LOST}"),
        # It may have been either of those that wrote nothing.
        ({0: LOST}, 1, 0, LOST),
    ],
)
def test_the_cause_is_whoever_failed_first_and_by_itself(
    written: dict[int, str], exit_code: int, cause: int, says: str, tmp_path: Path
) -> None:
    """Three ranks have `written` in this order; of rank 0 the launcher saw first that it had ended."""
    for second, (rank, words) in enumerate(written.items()):
        file = tmp_path / "run" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        told = {"message": words, "extraInfo": {"py_callstack": words, "timestamp": "7"}}
        whole = json.dumps({"message": told})
        file.write_text({"": "", "cut off": whole[:-5]}.get(words, whole))
        os.utime(file, ns=(second, second))
    seen = ProcessFailure(0, 4711, exit_code, str(tmp_path / "run" / "0" / "error.json"))
    rank, words = _cause(ChildFailedError("ranks", {0: seen}), tmp_path, ranks=3)
    assert rank == cause
    assert re.fullmatch(says.replace("(", r"\(").replace(")", r"\)"), words, re.DOTALL)
