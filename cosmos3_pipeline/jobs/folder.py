"""The folder of a run: one run at a time writes to it, and it has no files of older runs. Imports no torch."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosmos3_pipeline.errors import ConfigError, Problem
from cosmos3_pipeline.stages.files import RUN_FILES, remove_partial

# The folders that this process has claimed. It must not lock one twice: the second lock would be refused.
_claimed = set[Path]()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock `folder` during the block, so that no other run writes to it. Makes the folder if it does not exist.

    Raises ConfigError if another run has the lock, or if a folder has the name of a file of a run, or the reverse.
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
    """Remove the files that an older run left in `folder`. Files with other names stay."""
    for place in (*_lines(folder), folder):
        remove_partial(place)
        for name in RUN_FILES:
            (place / name).unlink(missing_ok=True)
    for line in _lines(folder):
        with suppress(OSError):  # the folder is not empty: somebody put another file there
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
        return  # the file system has no locks; unfinished files have unique names, so runs still do not mix them


def _blocked(folder: Path) -> Iterator[Problem]:
    """Folders with the name of a run's file, and files with the name of a run's folder."""
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
    """The folders of the clips of a prompt file."""
    return [path for path in folder.glob("line_????") if path.is_dir() and not path.is_symlink()]
