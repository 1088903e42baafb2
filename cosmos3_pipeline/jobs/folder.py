"""The folder of a run: one run at a time, and no file of an older run beside this one's. Imports no torch."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosmos3_pipeline.errors import ConfigError, Problem
from cosmos3_pipeline.stages.files import RUN_FILES, remove_partial

# The folders that this process has claimed. A second lock of its own would be refused as another one's is.
_claimed = set[Path]()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """No other process runs into `folder` in the block; it is made where it is not there.

    Raises ConfigError where one does, or where something that is no file has the name of a file of a run.
    """
    place = folder.resolve()
    if place in _claimed:
        yield
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
        works = "hydra.run.dir=FOLDER, or with -m hydra.sweep.dir=FOLDER, that can be made and written"
        raise ConfigError([Problem(f"the output folder {folder} cannot be used", why, works)]) from error
    _claimed.add(place)
    try:
        _lock(lock, folder)
        if found := list(_blocked(place)):
            raise ConfigError(found)
        yield
    finally:
        _claimed.discard(place)
        os.close(lock)


def clear(folder: Path) -> None:
    """Remove what an older run has left in `folder`; files of other names stay."""
    for place in (*_lines(folder), folder):
        remove_partial(place)
        for name in RUN_FILES:
            (place / name).unlink(missing_ok=True)
    for line in _lines(folder):
        with suppress(OSError):  # somebody has put something else there
            line.rmdir()


def _lock(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        problem = Problem(
            what=f"another run is writing to {folder}",
            why="both would leave files of the same names, and nobody could tell whose they are",
            works="hydra.run.dir=ANOTHER_FOLDER (or hydra.sweep.dir), or this one when that run has ended",
        )
        raise ConfigError([problem]) from None
    except OSError:
        return  # a file system without locks; a file that is not whole has a name of its own all the same


def _blocked(folder: Path) -> Iterator[Problem]:
    """What is in the way of a file or a folder of a run."""
    names = [place / name for place in (folder, *_lines(folder)) for name in RUN_FILES]
    wrong = [path for path in names if path.is_dir() and not path.is_symlink()]
    wrong += [
        path for path in (folder / ".hydra", *folder.glob("line_????")) if path.exists() and not path.is_dir()
    ]
    for path in wrong:
        kind, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
        yield Problem(
            what=f"{path} is a {kind}",
            why=f"a run leaves a {wanted} of that name, and removes no {kind} that it has not made",
            works=f"hydra.run.dir=ANOTHER_FOLDER, or this one after `mv {path} ELSEWHERE`",
        )


def _lines(folder: Path) -> list[Path]:
    """The folders of clips of a prompt file."""
    return [path for path in folder.glob("line_????") if path.is_dir() and not path.is_symlink()]
