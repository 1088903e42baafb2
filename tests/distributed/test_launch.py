"""Ranks through the elastic launcher: they talk, and a broken one ends the run with its own traceback."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cosmos3_pipeline.distributed.failure import RankFailed
from cosmos3_pipeline.distributed.launch import joined_world, run_ranks


def add_up(folder: str) -> None:
    with joined_world(device="cpu", threads=1) as device:
        value = torch.tensor([dist.get_rank() + 1.0], device=device)
        dist.all_reduce(value)
        (Path(folder) / f"rank{dist.get_rank()}").write_text(str(value.item()))


def break_one(folder: str, how: str) -> None:
    with joined_world(device="cpu", threads=1):
        (Path(folder) / f"pid{dist.get_rank()}").write_text(str(os.getpid()))
        dist.barrier()
        if dist.get_rank() == 1:
            if how == "raise":
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


@pytest.mark.parametrize(("how", "said"), [("raise", "the latent is cursed"), ("kill", "signal 9")])
def test_a_broken_rank_ends_the_run_with_its_own_words(tmp_path: Path, how: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(break_one, str(tmp_path), how, ranks=3)
    assert time.monotonic() - started < 60
    assert caught.value.rank == 1
    assert said in caught.value.traceback
    assert ("break_one" in caught.value.traceback) == (how == "raise")
    pids = [int((tmp_path / f"pid{r}").read_text()) for r in range(3)]
    assert not any(alive(pid) for pid in pids)
