"""Errors of the machine during a run (no disk space, memory or descriptors) as `Problem`s. Imports no torch."""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosmos3_pipeline.errors import Fault, Problem
from cosmos3_pipeline.stopping import stdout_problem

LEAST_FREE_BYTES = 1 << 20  # a picture, its plan and its metrics take less
MOST_ADDRESS_BYTES = 104  # limit for the address of a Unix socket on macOS; Linux allows a few more
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory|std::bad_alloc")
_NO_PROCESS = re.compile(r"can't start new thread|Resource temporarily unavailable")
# Error numbers in the messages of a library written in Rust, and of torch's store.
_NUMBER = re.compile(r"\(os error (\d+)\)|code: -(\d+), name: E")
_CACHES = ("HF_HUB_CACHE", "HF_HOME", "COSMOS3_CACHE", "XDG_CACHE_HOME")
_MEMORY = "fewer ranks or a smaller clip, or more memory (ulimit -v, the container's limit)"


@contextmanager
def told_as_fault(place: str) -> Iterator[None]:
    """Raise errors of the machine in the block as a Fault, which is shown without a traceback.

    `place` is the folder that the block writes to; it is named for errors that name no file.
    """
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        problem = machine_problem(error, place)
        if problem is None:
            raise
        raise Fault(problem.what, problem.why, problem.works) from error


def machine_problem(error: BaseException, place: str = "the folder of the run") -> Problem | None:
    """The problem behind `error`; None if it is no error of the machine. `place` is used if it names no file."""
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return Problem("this machine gives no more memory", text.partition("\n")[0] or "it has none left", _MEMORY)
    if isinstance(error, RuntimeError) and _NO_PROCESS.search(text):
        return _of_number(errno.EAGAIN, None, text, place)
    if isinstance(error, OSError) and error.errno is not None:
        return _of_number(error.errno, error.filename, error.strerror or text, place)
    number = _NUMBER.search(text)
    return (
        None if number is None else _of_number(int(number[1] or number[2]), None, text.partition("\n")[0], place)
    )


def _of_number(number: int, file: str | bytes | int | None, words: str, place: str) -> Problem:
    name = None if file is None or isinstance(file, int) else os.fsdecode(file)
    place = name or place
    # Python names no file in the error of a stream.
    if name is None and number in (*_FULL, errno.EFBIG, errno.EIO) and (problem := stdout_problem()):
        return problem
    if number in _FULL:
        return Problem(f"{place} has no space left", words, f"space there, or another place: {_elsewhere(name)}")
    if number == errno.EFBIG:
        file = name or "a file"
        return Problem(f"{file} may not grow", f"{words} (a limit of this shell)", "ulimit -f unlimited")
    if number in (errno.EMFILE, errno.ENFILE):
        return Problem(
            "no more files can be opened", words, "ulimit -n 1024 or more, or fewer ranks on one machine"
        )
    if number == errno.ENOMEM:
        return Problem("this machine gives no more memory", words, _MEMORY)
    if number == errno.EAGAIN:
        return Problem(
            "no more processes or threads can be started",
            words,
            "ulimit -u and ulimit -v with higher numbers, fewer ranks, or topology.threads_per_rank=1",
        )
    if number == errno.EPIPE:
        return Problem("nobody reads what is printed", words, "a terminal or a file that stays open")
    return Problem(f"{place} cannot be used", words, f"a path that can be: {_elsewhere(name)}")


def _elsewhere(file: str | None) -> str:
    """How to choose another folder for `file`."""
    if file is None:
        return "hydra.run.dir=FOLDER for what a run leaves, TMPDIR=FOLDER for what it needs meanwhile"
    caches = [os.environ.get(name) for name in _CACHES]
    if any(cache and file.startswith(cache) for cache in [*caches, str(Path.home() / ".cache")]):
        return "HF_HOME=FOLDER for checkpoints of the hub, COSMOS3_CACHE=FOLDER for what is made here"
    try:
        temporary = tempfile.gettempdir()
    except OSError:
        return "TMPDIR=FOLDER"
    # An output folder below /tmp was named by the user; our own temporary files there have "cosmos3" in their
    # name.
    return "TMPDIR=FOLDER" if file.startswith(temporary) and "cosmos3" in file else "hydra.run.dir=FOLDER"


def can_wait() -> bool:
    """Whether `select.poll` works here, which a container may forbid."""
    try:
        select.poll().poll(0)
    except (AttributeError, OSError):
        return False
    return True


def can_fork_ranks() -> bool:
    """Whether Python's fork server can listen.

    Its socket is in the folder for temporary files. The socket's name, such as
    /tmp/pymp-abcdefgh/listener-abcdefgh, must fit in the address of a Unix socket.
    """
    return len(os.fsencode(tempfile.gettempdir())) + len("/pymp-abcdefgh/listener-abcdefgh") < MOST_ADDRESS_BYTES


def output_problems(folder: Path, key: str) -> Iterator[Problem]:
    """Why a run cannot write its files to `folder`, the value of setting `key`. The folder need not exist yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    works = f"{key}=FOLDER with one that can be written"
    if not there.is_dir():
        yield Problem(f"{key}={folder}", f"{there} is no folder", works)
    elif not os.access(there, os.W_OK | os.X_OK):
        why = "read-only" if _is_read_only(there) else "not yours to write"
        yield Problem(f"{key}={folder}", f"{there.absolute()} is {why}", works)
    elif (free := shutil.disk_usage(there).free) < LEAST_FREE_BYTES:
        yield Problem(f"{key}={folder}", f"{there.absolute()} has {free} bytes left", f"space there, or {works}")


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
