"""Runs a function in N real gloo processes; returns what each returned, or raises the first failure."""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from limits import HANGS
from warm import CONTEXT

from cosmos3_pipeline.distributed.host_path import FORCED


class RankError(AssertionError):
    """A rank raised or died. Holds its traceback."""


def run_on_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, timeout: float = HANGS, may_die: tuple[int, ...] = ()
) -> list[Any]:
    """`[function(rank, *args) for each rank]`, in `ranks` processes that share a gloo process group.

    `function` must be importable. Results must pickle; those of ranks in `may_die`, which may end without one, are
    None. Raises RankError with the traceback of the rank that failed first, or when `timeout` seconds have passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = CONTEXT.Queue()
        store = str(Path(folder) / "store")
        processes = [
            CONTEXT.Process(
                target=_rank, args=(function, rank, ranks, store, results, args, _forced()), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, time.monotonic() + timeout, may_die)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _forced() -> dict[str, str]:
    """The transport that the test forces. A process forked from the server has the server's environment."""
    return {FORCED: os.environ[FORCED]} if FORCED in os.environ else {}


def _rank(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    store: str,
    results: Any,
    args: tuple[Any, ...],
    environ: dict[str, str],
) -> None:
    os.environ |= environ
    import torch
    import torch.distributed as dist

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=HANGS)
        )
        # Results are pickled, because a queue shares tensors, and these are gone when their process has ended.
        results.put((rank, pickle.dumps(function(rank, *args)), None))
        results.close()
        results.join_thread()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)


def _collect(processes: list[Any], results: Any, deadline: float, may_die: tuple[int, ...]) -> list[Any]:
    found: dict[int, Any] = {rank: None for rank in may_die}
    waiting = {p.sentinel: rank for rank, p in enumerate(processes)}
    reported: set[int] = set()
    while len(found) < len(processes) or not reported >= set(range(len(processes))) - set(may_die):
        if time.monotonic() > deadline:
            missing = sorted(set(range(len(processes))) - reported - set(may_die))
            raise RankError(f"ranks {missing} did not end in time")
        try:
            rank, value, error = results.get(timeout=0.05)
        except queue.Empty:
            for sentinel in wait(list(waiting), timeout=0):
                rank = waiting.pop(sentinel)
                if rank not in reported and rank not in may_die and processes[rank].exitcode and results.empty():
                    raise RankError(f"rank {rank} ended with exit code {processes[rank].exitcode}") from None
            continue
        reported.add(rank)
        if error is not None:
            raise RankError(f"rank {rank} of {len(processes)} failed:\n{error}")
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(len(processes))]
