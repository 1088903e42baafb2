"""Starting ranks: real processes through torch's elastic launcher, or joining a world that exists already.

A rank that raises brings the others down at once, and its own traceback is what the user sees.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cosmos3_pipeline.distributed.board import PeerFailed, PeerLost, RunStopped
from cosmos3_pipeline.distributed.device import gpu, use
from cosmos3_pipeline.distributed.failure import RankFailed
from cosmos3_pipeline.distributed.interface import use_interface_of_store
from cosmos3_pipeline.distributed.machine import can_fork_ranks
from cosmos3_pipeline.errors import Fault, Refusal

# The seconds that ranks of a broken world get to end by themselves before they are killed.
SHUTDOWN_SECONDS = 5

# How often the launcher looks whether a rank has ended.
LOOK_SECONDS = 0.1

# What a rank raises because another one has failed.
_CONSEQUENCES = {kind.__name__ for kind in (PeerFailed, PeerLost, RunStopped)}
_OF_GLOO = "gloo/transport"  # where its errors say that they come from: a connection is gone


def run_ranks(entry: Callable[..., None], *payload: Any, ranks: int, device: str = "cpu") -> None:
    """Run `entry(*payload)` in `ranks` new processes on this machine; both must pickle.

    Ranks on CPU are forked from one process, which may have imported already what they need. An import may touch
    CUDA, which does not survive a fork: ranks for it are new processes.
    Raises RankFailed with the first failing rank's own traceback, after every process has ended.
    """
    # The launcher's own log repeats in its words what RankFailed says with the traceback. Its loggers have
    # levels of their own, so each has to be told.
    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # A new process is told this one's start method, and joblib's, which its workers have, Python does not know.
    start_method = "forkserver" if device == "cpu" and can_fork_ranks() else "spawn"
    multiprocessing.set_start_method(start_method, force=True)
    # Until torch 2.12 a launcher waits 30 seconds, and cannot be told otherwise.
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    patience: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS} if "shutdown_timeout" in known else {}
    with TemporaryDirectory(prefix="cosmos3_ranks_") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="cosmos3",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            # Otherwise the ranks meet at this machine's name, which may have no address.
            local_addr="localhost",
            start_method=start_method,
            monitor_interval=LOOK_SECONDS,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **patience,
        )
        _launch(config, entry, payload, ranks, Path(folder))


def _launch(
    config: LaunchConfig, entry: Callable[..., None], payload: tuple[Any, ...], ranks: int, folder: Path
) -> None:
    try:
        elastic_launch(config, _recorded)(entry, *payload)
    except SignalException as stop:
        # The launcher has ended the ranks; from here on it is as if a person had stopped this process alone.
        if stop.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:
        rank, words = _cause(error, folder, ranks)
        raise RankFailed(rank, ranks, words) from None


@record  # writes the traceback of a rank that raises to where the launcher finds it
def _recorded(entry: Callable[..., None], *payload: Any) -> None:
    try:
        entry(*payload)
    except Exception as error:
        if type(error).__name__ in _CONSEQUENCES or _OF_GLOO in str(error):
            # The launcher names whom it sees ended first: that shall be the one who was killed.
            time.sleep(5 * LOOK_SECONDS)
        raise


def _cause(error: ChildFailedError, folder: Path, ranks: int) -> tuple[int, str]:
    """The rank that failed by itself and before any other, and its words. `folder` has what the ranks wrote.

    The launcher names the one whose process had ended first. That may be one that only lost its peer: a rank that
    raises takes a while to end, and its connections are closed long before; and one that is killed may end between
    two looks of the launcher, together with who noticed.
    """
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        return rank, _words(failure)
    raised = [
        ProcessFailure(int(file.parent.name), -1, failure.exitcode, str(file))
        for file in sorted(folder.rglob("error.json"), key=lambda file: file.stat().st_mtime_ns)
        if _is_whole(file)
    ]
    for each in raised:
        if _kind(each) not in _CONSEQUENCES:
            return each.local_rank, _words(each)
    silent = sorted(set(range(ranks)) - {each.local_rank for each in raised})
    if raised and len(silent) == 1:
        return silent[0], (
            "it ended without a traceback; the system kills a process like that when memory runs out; "
            f"rank {raised[0].local_rank} noticed:\n{_words(raised[0])}"
        )
    return rank, _words(failure)


def _is_whole(file: Path) -> bool:
    """Whether the rank that wrote it came to its end, before it was stopped because another one had failed."""
    try:
        json.loads(file.read_text())
    except ValueError:
        return False
    return True


def _kind(failure: ProcessFailure) -> str:
    """The name of the exception that `record` wrote."""
    return str(failure.error_file_data["message"]["message"]).partition(":")[0]


def _words(failure: ProcessFailure) -> str:
    """The traceback that `record` wrote (of a refusal its words), or how the process ended where it could not."""
    written = failure.error_file_data.get("message")
    if isinstance(written, dict) and "extraInfo" in written:
        # A refusal is the user's to mend, and says how; where in the code it was raised would only hide that.
        kind, _, text = str(written["message"]).partition(": ")
        return (
            text
            if kind in (Refusal.__name__, Fault.__name__)
            else str(written["extraInfo"]["py_callstack"]).strip()
        )
    if failure.exitcode < 0:
        return f"it was killed by signal {-failure.exitcode} ({failure.signal_name()})"
    return f"it ended with exit code {failure.exitcode}"


@contextmanager
def joined_world(*, device: str, threads: int, patience: float | None = None) -> Iterator[torch.device]:
    """Join the world that RANK and WORLD_SIZE describe, and leave it at the end.

    Without RANK in the environment this process is a world of one and no process group is made. The world is
    gloo's, also on cuda: in it ranks agree, and each Comm makes the connections of its tensors. `patience` are the
    seconds that a rank waits for the slowest; without it PyTorch's default.
    Yields the device of this rank. Raises Refusal where there is no such device. The process has its own number of
    threads again afterwards: a notebook that runs a clip goes on with other work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _joined(device, patience) as local:
            yield local
    finally:
        torch.set_num_threads(before)


@contextmanager
def _joined(device: str, patience: float | None) -> Iterator[torch.device]:
    local = torch.device("cpu")
    if device == "cuda":
        local = gpu(int(os.environ.get("LOCAL_RANK", "0")))
        use(local)
    if "RANK" not in os.environ:
        yield local
        return
    use_interface_of_store(os.environ)
    dist.init_process_group("gloo", timeout=None if patience is None else timedelta(seconds=patience))
    yield local
    # Not in a `finally`: after an error the peers may be gone, and leaving would wait for them.
    dist.destroy_process_group()
