"""Runs a function on N real gloo ranks on this machine and returns what each returned, within a time limit."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# A process forked from this server has torch and diffusers imported already, and no threads yet.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "diffusers.models.autoencoders.autoencoder_kl_wan"])
# Limit for the CPU seconds of all ranks together: several times what the slowest test needs.
CPU_LIMIT = 240.0
# If in STILL_SECONDS no rank computes for more than the share STILL_SHARE of the time, the ranks wait for each
# other. A rank that works gets far more: with four other programs on its core, still a fifth of the time.
STILL_SECONDS, STILL_SHARE = 20.0, 0.02


class RanksHang(AssertionError):
    """Some ranks did not end in time: they wait for each other, or for a message that no rank sends."""


class RankBroke(AssertionError):
    """A rank raised an exception that the test does not expect, or its process died."""


def run_on_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """`[function(*args) on each rank]`, in `ranks` processes of one gloo world. Arguments and results must pickle.

    Raises RanksHang if the ranks do not progress or compute without end; the limits do not depend on how busy the
    machine is. Raises RankBroke with the traceback of a rank that raised.
    """
    with tempfile.TemporaryDirectory(prefix="cosmos3_kit_") as folder:
        results = _CONTEXT.Queue()
        store = str(Path(folder) / "store")
        processes = [
            _CONTEXT.Process(target=_rank, args=(function, rank, ranks, store, results, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(
    function: Callable[..., Any], rank: int, ranks: int, store: str, results: Any, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(hours=1),
        )
        answer: tuple[int, Any, str | None] = (rank, function(*args), None)
    # The parent reports any exception of a rank.
    except BaseException:
        answer = (rank, None, traceback.format_exc())
    results.put(answer)
    results.close()
    results.join_thread()
    # The interpreter's normal exit would wait for connections to ranks that may be gone.
    os._exit(0)


class _Watch:
    """Watches the CPU seconds of processes."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._since = time.monotonic()
        self._before = [0.0] * len(pids)

    def problem(self) -> str:
        """Why the processes will not end; empty if they may still end."""
        now = time.monotonic()
        used = list(map(_cpu_seconds, self._pids))
        if sum(used) > CPU_LIMIT:
            return f"did not end after {sum(used):.0f} s of computing"
        seconds = now - self._since
        if seconds < STILL_SECONDS:
            return ""
        most = max(after - before for after, before in zip(used, self._before, strict=True))
        self._before, self._since = used, now
        if most < STILL_SHARE * seconds:
            return f"did not end: for {seconds:.0f} s they have computed next to nothing"
        return ""


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far; 0 if it has ended.

    gloo's threads do not count, because they wake a hundred times a second even if there is nothing to do.
    """
    process = Path(f"/proc/{pid}")
    try:
        threads = [(path / "stat").read_text() for path in (process / "task").iterdir()]
        waking = sum(_ticks(stat) for stat in threads if "(gloo_tcp_loop)" in stat)
        return (_ticks((process / "stat").read_text()) - waking) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


def _ticks(stat: str) -> int:
    """utime + stime of a /proc stat line: fields 12 and 13 after the name. The name may contain spaces."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _collect(processes: list[Any], results: Any) -> list[Any]:
    watch = _Watch([process.pid for process in processes])
    found: dict[int, Any] = {}
    while len(found) < len(processes):
        missing = [rank for rank in range(len(processes)) if rank not in found]
        if problem := watch.problem():
            raise RanksHang(f"ranks {missing} of {len(processes)} {problem}")
        # Checked before the queue is read, so that the result of a rank that has just ended is still seen below.
        dead = [rank for rank in missing if not processes[rank].is_alive()]
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            if dead:
                code = processes[dead[0]].exitcode
                raise RankBroke(f"the process of rank {dead[0]} ended with exit code {code}") from None
            continue
        if error is not None:
            raise RankBroke(f"rank {rank} of {len(processes)} failed:\n{error}")
        found[rank] = value
    return [found[rank] for rank in range(len(processes))]
