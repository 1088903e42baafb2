"""Start ranks as multiprocessing processes that this process watches, or join a world that already exists.

If a rank raises or is killed, the launcher ends the others at once. The user sees the failed rank's traceback.
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

# How long to wait for a killed rank. A rank in the middle of a system call does not end at once.
KILLED_SECONDS = 5.0

# multiprocessing reports this exit code for a process whose fork server has ended.
LOST_SERVER = 255

# A rank that fails because of another rank waits this long, so that the other rank ends first.
CONSEQUENCE_SECONDS = 0.5

# The exceptions that a rank raises because another rank has failed.
_CONSEQUENCES = (PeerFailed, PeerLost, RunStopped)
_OF_GLOO = "gloo/transport"  # gloo's errors about a lost connection name this source folder


@dataclass(frozen=True)
class Raised:
    """The reason why a rank ended: the name of its exception, the text for the user, and the rank to blame."""

    rank: int
    kind: str
    words: str


def run_ranks(entry: Callable[..., None], *payload: Any, ranks: int, device: str = "cpu") -> None:
    """Run `entry(*payload)` in `ranks` new processes on this machine; both must pickle.

    Ranks on CPU are forked from a fork server, which may have imported their modules already. Ranks on CUDA are
    spawned, because an import may touch CUDA, and CUDA does not survive a fork.
    Raises RankFailed with the traceback of the first failed rank, after every process has ended.
    """
    # Set as this process's default, because new processes are told the default. In a joblib worker the default is
    # joblib's own method, which Python does not know.
    start_method = "forkserver" if device == "cpu" and can_fork_ranks() else "spawn"
    multiprocessing.set_start_method(start_method, force=True)
    with (
        TemporaryDirectory(prefix="cosmos3_ranks_", ignore_cleanup_errors=True) as name,
        stopping.leftover(Path(name)),
    ):
        folder = Path(name)
        # Ranks connect to localhost, because this machine's host name may have no address.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        processes: list[BaseProcess] = []
        try:
            for rank in range(ranks):
                processes.append(_started(_environ(rank, ranks, store.port), folder, entry, payload))
            _watch(processes, folder)
        finally:
            _end(processes)


def _environ(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment that torchrun would give a rank whose store is kept by its launcher."""
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
    resource_tracker.ensure_running()  # before the block below, because its start unblocks signals
    # With a fork server, start() waits until the server's imports are done. Signals must not be blocked that long.
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


def _rank(environ: Mapping[str, str], folder: Path, entry: Callable[..., None], payload: Any) -> None:
    """One rank, in its own process: runs `entry`, then writes to `folder` that it is done, or its error."""
    os.environ.update(environ)
    stopping.guard_streams()
    # diffusers' progress bars make a lock for processes. A killed rank would leave its file in /dev/shm until
    # multiprocessing warns of "leaked semaphore objects". With this method the lock has no file. A rank starts no
    # processes.
    multiprocessing.set_start_method("fork", force=True)
    rank, ranks = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    try:
        _pid_file(folder, rank).write_text(str(os.getpid()))
    except FileNotFoundError:
        stopping.end(1)  # the launcher has removed the folder: it ended while this process was forked
    others = [_pid_file(folder, other) for other in range(ranks) if other != rank]
    stopping.end_with_parent(lambda: [int(file.read_text()) for file in others if file.is_file()])
    stopping.reset_signals()
    Links.folder = str(folder)
    Life.tell = lambda silent, problem: _leave(folder, rank, Raised(silent, Fault.__name__, str(problem)))
    try:
        entry(*payload)
    except BaseException as error:
        if is_consequence(error):
            # The launcher blames the rank that ends first, which should be the rank that was killed.
            time.sleep(CONSEQUENCE_SECONDS)
        _leave(folder, rank, Raised(rank, type(error).__name__, _words(error)))
        raise SystemExit(1) from None
    _done_file(folder, rank).touch()


def is_consequence(error: BaseException) -> bool:
    """Whether `error` is only the consequence of another rank's end."""
    return isinstance(error, (*_CONSEQUENCES, dist.DistNetworkError)) or _OF_GLOO in str(error)


def _words(error: BaseException) -> str:
    """The text for the user. A refusal has no traceback, because it says itself what the user can do."""
    if isinstance(getattr(error, "problem", None), Problem):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()


def _pid_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.pid"


def _done_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.done"


def _leave(folder: Path, rank: int, raised: Raised) -> None:
    """Write what ended `rank` to its file; a reader never sees half of the file."""
    partial = folder / f"{rank}.partial"
    partial.write_text(json.dumps(asdict(raised)), encoding="utf-8")
    partial.replace(folder / f"{rank}.json")


def _watch(processes: list[BaseProcess], folder: Path) -> None:
    """Return when all ranks are done. Raises RankFailed as soon as a rank has ended before it was done."""
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
    """Kill all ranks that still run. The launcher cleans up for them."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(KILLED_SECONDS)


def _cause(ended: int, code: int, folder: Path, ranks: int) -> tuple[int, int, str]:
    """The first rank that failed by itself, the number of ranks, and the text for the user.

    `ended` is the rank whose process ended first, with exit code `code`. It may have failed only because it lost a
    peer, for two reasons. A rank that raises closes its connections long before its process ends. And if a rank is
    killed, the launcher may see its end and the end of its peers at the same time.
    """
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    raised = {int(file.stem): Raised(**json.loads(file.read_text(encoding="utf-8"))) for file in files}
    for writer, each in raised.items():
        if each.rank == ended != writer:
            return ended, ranks, each.words  # another rank killed it, because it gave no sign of life
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

    Without RANK in the environment this process is a world of one, and no process group is made. The process group
    uses gloo even on cuda, because ranks use it only to agree; each Comm makes its own connections for tensors.
    `patience` is how many seconds a rank waits for the slowest rank; None is PyTorch's default. With `silence` the
    run ends when a rank gives no sign of life for this many seconds.

    Yields the device of this rank. At the end the process gets its former number of threads back, because a
    notebook may continue with other work. Raises Refusal if there is no such device, and PeerLost if another rank
    is gone.
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
        # The world is not left after an error, because peers may be gone and leaving would wait for them.
    dist.destroy_process_group()


@contextmanager
def _life(silence: float) -> Iterator[None]:
    life = Life(patience=silence)
    try:
        yield
    finally:
        life.stop()
