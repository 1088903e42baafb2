"""How a process ends before its work is done: by a signal, or with the process that started it.

A signal raises `Stopped` in the main thread, so that every `finally` tidies up. Code that swallows it, or a call
into a library that does not return, must not keep the process: a thread hears of the signal as well, and ends the
process after `GRACE_SECONDS`. Standard library only, because it is imported before anything that takes time.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, parent_process
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What the main thread gets to end in order; a scheduler often kills after ten seconds.
GRACE_SECONDS = 4.0
# How often a process looks whether its parent has ended, where the system does not tell.
LOOK_SECONDS = 0.5

_stopped_by: int | None = None  # the signal that has arrived
_listens = False
_unwinds = False  # whether the main thread is where an exception ends the process in order
_told = False
_leftovers = set[Path]()

# The other ranks of this machine, and the processes that they are, as far as they are known. They end with the
# same parent, but one that is stopped cannot see to it itself.
neighbours = dict[int, int]()


class Stopped(KeyboardInterrupt):
    """A signal ends the process. Libraries treat it as the interrupt that it often is."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def on_signals() -> None:
    """From now on a signal ends this process as the module says; called in the main thread.

    A signal that is ignored stays so: `nohup` and shells ask for that. Under torchrun the process ends with its
    agent, too.
    """
    global _listens
    if _listens:
        return
    _listens = True
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_end_in_time, args=(heard,), name="cosmos3-stopping", daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def stoppable(main: Callable[[], int]) -> int:
    """What `main` returns, an exit code; or that of a process that a signal has ended, told in one line."""
    global _unwinds
    _unwinds = True
    try:
        code = main()
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        tell_stopped(number)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        # Not through the interpreter's own end, which on a busy machine takes longer than a scheduler waits.
        end(128 + number)
    finally:
        _unwinds = False
    return code


def tell_stopped(number: int) -> None:
    """Say once, on the root alone, that a signal has ended the run."""
    global _told
    if _told or os.environ.get("RANK", "0") != "0":
        return
    _told = True
    with suppress(OSError, ValueError):  # the terminal may be what has gone
        print(f"\nstopped by {signal.Signals(number).name}; nothing half-written is left", file=sys.stderr)
        sys.stderr.flush()


@contextmanager
def leftover(path: Path) -> Iterator[None]:
    """A file or folder that is of no use outside the block: it is removed when the process ends inside it."""
    _leftovers.add(path)
    try:
        yield
    finally:
        _leftovers.discard(path)


def add_leftover(path: Path) -> None:
    """A file or folder that is of no use once this process has ended early."""
    _leftovers.add(path)


def leftovers() -> list[Path]:
    """What `end` would remove now."""
    return list(_leftovers)


def reset_signals() -> None:
    """Let a signal end this process at once, as the system does: its parent sees which, and tidies up."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def inherited_blocked() -> Iterator[None]:
    """Processes that are started in the block hear of no signal before they call `reset_signals`.

    Without, one that has only begun to import would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(
    others: Callable[[], Iterable[int]] = neighbours.values, leftovers: Iterable[Path] = ()
) -> None:
    """End this process soon after the one that started it, however that has ended.

    `others` are the processes with the same fate. `leftovers` are the parent's, which could not remove them.
    """
    arguments = (os.getppid(), others, leftovers)
    threading.Thread(target=_watch_parent, args=arguments, name="cosmos3-parent", daemon=True).start()


def end(code: int, others: Iterable[int] = ()) -> NoReturn:
    """End this process now, and `others` with it, and remove what is of no use without it."""
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
        return  # it is ending already
    _stopped_by = number
    if not _unwinds:
        tell_stopped(number)
        end(128 + number)
    raise Stopped(number)


def _end_in_time(heard: int) -> None:
    while (number := os.read(heard, 1)[0]) not in SIGNALS:
        pass
    time.sleep(GRACE_SECONDS)
    tell_stopped(number)
    end(128 + number)


def _watch_parent(parent: int, others: Callable[[], Iterable[int]], leftovers: Iterable[Path]) -> None:
    # multiprocessing knows who has started it: its parent is the server from which it was forked.
    starter = parent_process()
    while os.getppid() == parent:
        if starter is None:
            time.sleep(LOOK_SECONDS)
        elif connection.wait([starter.sentinel], LOOK_SECONDS):
            break
    doomed = list(others())
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(LOOK_SECONDS)  # the first one has files to remove, so it is not killed unless it is stopped
    _leftovers.update(leftovers)
    end(1, doomed)
