"""End a process in order before its work is done: after a signal, or after its parent process has ended.

A signal raises `Stopped` in the main thread, so that every `finally` cleans up. The main thread may swallow this
exception, or may be in a library call that does not return. So a second thread also receives the signal, and ends
the process after `GRACE_SECONDS`. Standard library only, because this module is imported before slow imports.
"""

from __future__ import annotations

import atexit
import errno
import io
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection, parent_process
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

if TYPE_CHECKING:
    from cosmos3_pipeline.errors import Problem

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The time for the main thread to end in order. A scheduler often kills after ten seconds.
GRACE_SECONDS = 4.0
# The interval at which a process checks whether its parent has ended.
LOOK_SECONDS = 0.5
# The time after which a signal comes once more, whose exception was dropped.
AGAIN_SECONDS = 0.05

_stopped_by: int | None = None  # the signal that has arrived
_listens = False
_unwinds = False  # whether an exception in the main thread now ends the process in order
_told = False
_code = 1  # the exit code of this process, once it is known
_leftovers: set[Path] = set()
_remover: subprocess.Popen[bytes] | None = None
# The time for ranks to read each other's process ids from a folder that a killed launcher leaves.
REMOVE_SECONDS = 2.0

# Process ids of the other ranks on this machine, by rank, as far as they are known. All end with the same parent,
# but a suspended process cannot end itself.
neighbours: dict[int, int] = {}


class Stopped(KeyboardInterrupt):
    """A signal ends the process. It is a KeyboardInterrupt, so that libraries let it pass."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def on_signals() -> None:
    """Make signals end this process as the module's docstring says. Called in the main thread.

    A signal that is ignored stays ignored, because `nohup` and shells ask for that. Under torchrun the process
    also ends with its agent.
    """
    global _listens
    if _listens:
        return
    _listens = True
    guard_streams()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_end_in_time, args=(heard,), name="cosmos3-stopping", daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    sys.unraisablehook = partial(_raise_again, sys.unraisablehook)
    atexit.register(_leave)  # before all others are registered, so it runs after them


class _Stdout(io.FileIO):
    """The standard output, which remembers an error of a write. Hydra's and others' loggers drop such an error."""

    error: ClassVar[OSError | None] = None
    closed_by_caller: ClassVar[bool] = False

    def write(self, content: Any, /) -> int:
        """Write bytes. Raises OSError."""
        try:
            return super().write(content)
        except OSError as error:
            _Stdout.error = error
            raise


class _Stderr(io.FileIO):
    """The standard error, which drops what cannot be written: no stream is left to say so."""

    def write(self, content: Any, /) -> int:
        """Write bytes, or do as if."""
        try:
            return super().write(content)
        except OSError:
            return len(content)


def guard_streams() -> None:
    """Make the standard streams survive what takes nothing: a full disk, or a stream that the caller has closed.

    The null device takes the place of a closed stream, as by `>&-`. Otherwise the next file that is opened would
    take the stream's number, and prints would go into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as this process
            _Stdout.closed_by_caller |= name == "stdout"
    # Loggers drop errors of their streams anyway, and would print a traceback for each.
    logging.raiseExceptions = False
    for name, kind in (("stdout", _Stdout), ("stderr", _Stderr)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # else a test, or a notebook, has its own
            stream.flush()
            raw: Any = kind(stream.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(
                raw if stream.write_through else io.BufferedWriter(raw),  # the first with PYTHONUNBUFFERED
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, text)


def stdout_needed() -> None:
    """Tell at the end of this process that its standard output was closed, because it does nothing but print."""
    if _Stdout.closed_by_caller:
        _Stdout.error = OSError(errno.EBADF, "it was closed by the shell or the program that started this")


def stdout_problem() -> Problem | None:
    """The problem of a standard output that takes nothing more, else None."""
    from cosmos3_pipeline.errors import Problem

    if _Stdout.error is None:
        return None
    why = _Stdout.error.strerror or str(_Stdout.error)
    works = "the same command with its output on a terminal, or in a file on a disk with space"
    return Problem("standard output cannot be written", why, works)


def stoppable(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code. If a signal arrives, print one line and end the process.

    A standard output that took not all makes an exit code of 1 from 0, and is told in three parts.
    """
    global _unwinds, _code
    _unwinds, code = True, 0
    try:
        _code = code = main()
        sys.stdout.flush()  # else the interpreter would print a traceback when it ends
    except OSError as error:
        if _Stdout.error is None or error.errno != _Stdout.error.errno:
            raise
    except SystemExit as left:
        _code = code = left.code if isinstance(left.code, int) else int(left.code is not None)
        with suppress(OSError):
            sys.stdout.flush()
        if _Stdout.error is None:
            raise
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        tell_stopped(number)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        # The interpreter's own shutdown is skipped: on a busy machine it takes longer than a scheduler waits.
        end(128 + number)
    finally:
        _unwinds = False
    if isinstance(_Stdout.error, BrokenPipeError):
        # As other programs end when `head` has what it wants: without a word.
        end(128 + signal.SIGPIPE)
    if (problem := stdout_problem()) is not None:
        if not code:  # else `main` has told it, or worse
            print(f"the run has stopped\n\n{problem}", file=sys.stderr, flush=True)
        end(code or 1)
    return code


def tell_stopped(number: int) -> None:
    """Print once, on rank 0 only, that a signal has ended the run."""
    global _told
    if _told or os.environ.get("RANK", "0") != "0":
        return
    _told = True
    with suppress(OSError, ValueError):  # the terminal may be gone
        print(f"\nstopped by {signal.Signals(number).name}; nothing half-written is left", file=sys.stderr)
        sys.stderr.flush()


@contextmanager
def leftover(path: Path) -> Iterator[None]:
    """Remove the file or folder `path` if the process ends inside the block, because it would be half-written.

    After `on_signals` this is also true of a process that is killed.
    """
    add_leftover(path)
    try:
        yield
    finally:
        _leftovers.discard(path)
        _tell_remover(b"-", path)


def add_leftover(path: Path) -> None:
    """Remove the file or folder `path` if this process ends early."""
    _leftovers.add(path)
    _tell_remover(b"+", path)


def _tell_remover(sign: bytes, path: Path) -> None:
    """Tell the process that removes leftovers about one of them. It is started for the first."""
    global _remover
    if not _listens or (_remover is None and sign != b"+"):
        return
    with suppress(OSError):  # the machine starts no more processes, or somebody has killed or suspended it
        if _remover is None:
            program = str(Path(__file__).with_name("remover.py"))
            nowhere = subprocess.DEVNULL  # a pipe of this process would otherwise stay open as long
            _remover = subprocess.Popen(
                [sys.executable, "-I", "-S", program, str(REMOVE_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=nowhere,
                stderr=nowhere,
                bufsize=0,
                cwd="/",
                start_new_session=True,  # so that a signal to all processes of a terminal does not reach it
            )
            assert _remover.stdin is not None
            os.set_blocking(_remover.stdin.fileno(), False)
        assert _remover.stdin is not None
        _remover.stdin.write(sign + os.fsencode(path.absolute()) + b"\0")


def _forget_parents_leftovers() -> None:
    """In a forked process: what the parent left unfinished is the parent's to remove, and so is its remover.

    A process that closes inherited files would otherwise write to another file or socket of the same number.
    """
    global _remover
    _leftovers.clear()
    if _remover is not None:
        assert _remover.stdin is not None
        with suppress(OSError):
            _remover.stdin.close()
        _remover.returncode = 0  # it is not a child of this process, so nobody has to wait for it
        _remover = None


os.register_at_fork(after_in_child=_forget_parents_leftovers)


def reset_signals() -> None:
    """Let a signal end this process at once. Its parent sees the signal, and cleans up."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def inherited_blocked() -> Iterator[None]:
    """Block signals in processes that are started in the block, until they call `reset_signals`.

    Otherwise a process that is still importing would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave() -> None:
    """Prepare for the interpreter's own shutdown, which collects torch's objects for seconds on a busy machine.

    The shutdown gives signals back their default action, so a late signal would end a run that is done without a
    word and without its exit code. It also stops all threads, among them the thread that ends a rank of torchrun
    with its agent, so such a rank leaves without the shutdown.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.SIG_IGN)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    end(_code)


def end_with_parent(others: Callable[[], Iterable[int]] = neighbours.values) -> None:
    """End this process soon after its parent, however the parent ended. `others` are processes to end too."""
    arguments = (os.getppid(), others)
    threading.Thread(target=_watch_parent, args=arguments, name="cosmos3-parent", daemon=True).start()


def end(code: int, others: Iterable[int] = ()) -> NoReturn:
    """End this process and `others` now, and remove the leftovers."""
    for path in list(_leftovers):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    for process in others:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    os._exit(code)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _stopped_by
    if _stopped_by is not None:
        return  # the process is ending already
    _stopped_by = number
    if not _unwinds:
        tell_stopped(number)
        end(128 + number)
    raise Stopped(number)


def _raise_again(others: Callable[[sys.UnraisableHookArgs], Any], swallowed: sys.UnraisableHookArgs) -> None:
    """Let the signal come once more, because the interpreter drops an exception that a `__del__` has raised."""
    global _stopped_by
    if not isinstance(swallowed.exc_value, Stopped):
        others(swallowed)
        return
    _stopped_by = None
    # Later, because this function is a part of the same call that cannot raise.
    again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), swallowed.exc_value.number))
    again.daemon = True
    again.start()


def _end_in_time(heard: int) -> None:
    while (number := os.read(heard, 1)[0]) not in SIGNALS:
        pass
    time.sleep(GRACE_SECONDS)
    tell_stopped(number)
    end(128 + number)


def _watch_parent(parent: int, others: Callable[[], Iterable[int]]) -> None:
    # The system's parent of a forked child is the fork server. multiprocessing knows which process started it.
    starter = parent_process()
    orphan = starter is None and _agent_has_gone()
    while not orphan and os.getppid() == parent:
        if starter is None:
            time.sleep(LOOK_SECONDS)
        elif connection.wait([starter.sentinel], LOOK_SECONDS):
            break
    doomed = list(others())
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(LOOK_SECONDS)  # local rank 0 has files to remove, so it gets time to end itself
    end(1, doomed)


def _agent_has_gone() -> bool:
    """Whether torchrun's agent had ended before this process asked for its parent, which then is another process.

    The agent keeps the store of its ranks, so a store that cannot be reached has gone with its agent.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except (OSError, KeyError, ValueError):  # not known; `world_problems` tells what is wrong with the variables
        return False
    return False
