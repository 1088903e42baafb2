"""Starting ranks: processes of multiprocessing that this one watches, or joining a world that exists already.

A rank that raises, or is killed, brings the others down at once, and its own traceback is what the user sees.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from cosmos3_pipeline import stopping
from cosmos3_pipeline.distributed.board import PeerFailed, PeerLost, RunStopped
from cosmos3_pipeline.distributed.device import gpu, use
from cosmos3_pipeline.distributed.failure import RankFailed
from cosmos3_pipeline.distributed.interface import use_interface_of_store
from cosmos3_pipeline.distributed.life import Life
from cosmos3_pipeline.distributed.links import Links
from cosmos3_pipeline.distributed.machine import can_fork_ranks
from cosmos3_pipeline.errors import Fault, Problem

# How long a rank that was killed may take to be gone, which it takes in the middle of a call to the system.
KILLED_SECONDS = 5.0

# What multiprocessing says of a process whose fork server has gone.
LOST_SERVER = 255

# A rank that fails because of another one lets that one end first.
CONSEQUENCE_SECONDS = 0.5

# What a rank raises because another one has failed.
_CONSEQUENCES = (PeerFailed, PeerLost, RunStopped)
_OF_GLOO = "gloo/transport"  # where its errors say that they come from: a connection is gone


@dataclass(frozen=True)
class Raised:
    """What ended a rank: the name of its exception, what a person is told, and whom it blames."""

    rank: int
    kind: str
    words: str


def run_ranks(entry: Callable[..., None], *payload: Any, ranks: int, device: str = "cpu") -> None:
    """Run `entry(*payload)` in `ranks` new processes on this machine; both must pickle.

    Ranks on CPU are forked from one process, which may have imported already what they need. An import may touch
    CUDA, which does not survive a fork: ranks for it are new processes.
    Raises RankFailed with the first failing rank's own traceback, after every process has ended.
    """
    # A new process is told this one's start method, and joblib's, which its workers have, Python does not know.
    start_method = "forkserver" if device == "cpu" and can_fork_ranks() else "spawn"
    multiprocessing.set_start_method(start_method, force=True)
    with TemporaryDirectory(prefix="cosmos3_ranks_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # The ranks meet at this process, and not at this machine's name, which may have no address.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        processes: list[BaseProcess] = []
        with stopping.leftover(folder):
            leftovers = stopping.leftovers()  # the ranks remove them where this process is killed
            try:
                for rank in range(ranks):
                    environ = _environ(rank, ranks, store.port)
                    processes.append(_started(environ, folder, leftovers, entry, payload))
                _watch(processes, folder)
            finally:
                _end(processes)


def _environ(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank, whose world meets in the store of its launcher."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _started(environ: dict[str, str], *arguments: Any) -> BaseProcess:
    process = multiprocessing.Process(target=_rank, args=(environ, *arguments), name=f"rank {environ['RANK']}")
    resource_tracker.ensure_running()  # it lets signals through when it has started
    # The start of a fork takes as long as what the server still imports, and that shall hear of signals.
    spawned = multiprocessing.get_start_method() == "spawn"
    try:
        with stopping.inherited_blocked() if spawned else nullcontext():
            process.start()
    except (OSError, EOFError) as error:
        raise Fault(
            what=f"{process.name} could not be started",
            why=f"the process that it is forked from has ended, or the system starts no more ({error!r})",
            works="the same command again; `ulimit -u` and the memory that is free say how many processes fit",
        ) from error
    return process


def _rank(
    environ: Mapping[str, str], folder: Path, leftovers: list[Path], entry: Callable[..., None], payload: Any
) -> None:
    """One rank, in its own process: does `entry` and leaves in `folder` that it has, or what it raised."""
    os.environ.update(environ)
    rank, ranks = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    _pid_file(folder, rank).write_text(str(os.getpid()))
    others = [_pid_file(folder, other) for other in range(ranks) if other != rank]
    stopping.end_with_parent(lambda: [int(file.read_text()) for file in others if file.is_file()], leftovers)
    stopping.reset_signals()
    Links.folder = str(folder)
    Life.tell = lambda silent, problem: _leave(folder, rank, Raised(silent, Fault.__name__, str(problem)))
    try:
        entry(*payload)
    except BaseException as error:
        if is_consequence(error):
            # The launcher names whom it sees ended first: that shall be the one who was killed.
            time.sleep(CONSEQUENCE_SECONDS)
        _leave(folder, rank, Raised(rank, type(error).__name__, _words(error)))
        raise SystemExit(1) from None
    _done_file(folder, rank).touch()


def is_consequence(error: BaseException) -> bool:
    """Whether `error` is how a rank ends because another one has."""
    return isinstance(error, (*_CONSEQUENCES, dist.DistNetworkError)) or _OF_GLOO in str(error)


def _words(error: BaseException) -> str:
    """A refusal is the user's to mend, and says how; where in the code it was raised would only hide that."""
    if isinstance(getattr(error, "problem", None), Problem):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()


def _pid_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pid"


def _done_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.done"


def _leave(folder: Path, rank: int, raised: Raised) -> None:
    """Write down what ended `rank`, whole."""
    partial = folder / f"{rank}.partial"
    partial.write_text(json.dumps(asdict(raised)), encoding="utf-8")
    partial.replace(folder / f"{rank}.json")


def _watch(processes: list[BaseProcess], folder: Path) -> None:
    """Return when all ranks have done their work. Raises RankFailed as soon as one has ended without."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        for sentinel in connection.wait(list(running)):
            assert isinstance(sentinel, int)
            rank = running.pop(sentinel)
            processes[rank].join()
            code = processes[rank].exitcode
            if code != 0 or not _done_file(folder, rank).is_file():
                raise RankFailed(*_cause(rank, code or 0, folder, len(processes)))


def _end(processes: list[BaseProcess]) -> None:
    """End what still runs. Ranks have nothing to tidy up that their launcher would not."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(KILLED_SECONDS)


def _cause(ended: int, code: int, folder: Path, ranks: int) -> tuple[int, int, str]:
    """The rank that failed by itself and before any other, of how many, and its words.

    `ended` is whose process has ended first, with exit code `code`. That may be one that only lost its peer: a
    rank that raises takes a while to end, and its connections are closed long before; and one that is killed may
    end between two looks of the launcher, together with who noticed.
    """
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    raised = {int(file.stem): Raised(**json.loads(file.read_text(encoding="utf-8"))) for file in files}
    for writer, each in raised.items():
        if each.rank == ended != writer:
            return ended, ranks, each.words  # it gave no sign of life, and was killed for that
    if code < 0:
        return ended, ranks, _killed(-code)
    consequences = {kind.__name__ for kind in (*_CONSEQUENCES, dist.DistNetworkError)}
    for each in raised.values():
        if each.kind not in consequences and _OF_GLOO not in each.words:
            return each.rank, ranks, each.words
    silent = sorted(set(range(ranks)) - set(raised))
    if raised and len(silent) == 1:
        witness, first = next(iter(raised.items()))
        return silent[0], ranks, f"{_killed(signal.SIGKILL)}\n\nrank {witness} noticed:\n{first.words}"
    if ended in raised:
        return ended, ranks, raised[ended].words
    why = "something in it has ended the process"
    if code == LOST_SERVER:
        why = "that is how it looks when the process that ranks are forked from has ended"
    what = f"it ended with exit code {code} before its work was done"
    return ended, ranks, str(Problem(what, why, "its own words above, if any; else the same command again"))


def _killed(number: int) -> str:
    name = signal.Signals(number).name
    why = "somebody or something has sent it that signal"
    works = "the same command again"
    if number == signal.SIGKILL:
        why = "the system kills a process like that when memory runs out; a person or a scheduler can do it, too"
        works = "more memory, fewer ranks or a smaller clip where memory ran out (`dmesg`); else the same again"
    elif number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT):
        why = "a library has crashed in it; SIGBUS can mean that /dev/shm or a disk is full"
        works = "the same command with PYTHONFAULTHANDLER=1 says where"
    return str(Problem(f"it was killed by signal {number} ({name})", why, works))


@contextmanager
def joined_world(
    *, device: str, threads: int, patience: float | None = None, silence: float | None = None
) -> Iterator[torch.device]:
    """Join the world that RANK and WORLD_SIZE describe, and leave it at the end.

    Without RANK in the environment this process is a world of one and no process group is made. The world is
    gloo's, also on cuda: in it ranks agree, and each Comm makes the connections of its tensors. `patience` are the
    seconds that a rank waits for the slowest; without it PyTorch's default. With `silence` the run ends when a
    rank gives no sign of life for so many seconds.
    Yields the device of this rank. Raises Refusal where there is no such device, PeerLost where another rank is
    gone. The process has its own number of threads again afterwards: a notebook that runs a clip goes on with
    other work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _joined(device, patience, silence) as local:
            yield local
    except RuntimeError as error:
        if not is_consequence(error) or isinstance(error, PeerFailed | PeerLost):
            raise
        raise PeerLost(
            what=f"rank {os.environ.get('RANK')} has lost its connection to another rank",
            why=str(error).splitlines()[0],
            works="see the first rank that ended; the system kills a rank for which memory ran out",
        ) from error
    finally:
        torch.set_num_threads(before)


@contextmanager
def _joined(device: str, patience: float | None, silence: float | None) -> Iterator[torch.device]:
    local = torch.device("cpu")
    if device == "cuda":
        local = gpu(int(os.environ.get("LOCAL_RANK", "0")))
        use(local)
    if "RANK" not in os.environ:
        yield local
        return
    use_interface_of_store(os.environ)
    with nullcontext() if silence is None else _life(silence):
        dist.init_process_group("gloo", timeout=None if patience is None else timedelta(seconds=patience))
        yield local
        # Not in a `finally`: after an error the peers may be gone, and leaving would wait for them.
    dist.destroy_process_group()


@contextmanager
def _life(silence: float) -> Iterator[None]:
    life = Life(patience=silence)
    try:
        yield
    finally:
        life.stop()
