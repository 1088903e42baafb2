"""Keeps the terminal output of a run in its folder."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

NAME = "log.txt"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Everything that is printed in the block goes to `folder`/log.txt too, and so does an error that ends it."""
    with also_to(folder) as file:
        try:
            yield
        except BaseException as error:
            file.write(f"{type(error).__name__}: {error}\n")
            raise


@contextmanager
def also_to(folder: Path) -> Iterator[TextIO]:
    """Everything that this process prints in the block is also appended to `folder`/log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / NAME).open("a", encoding="utf-8") as file,
        redirect_stdout(_Both(sys.stdout, file)),
        redirect_stderr(_Both(sys.stderr, file)),
    ):
        yield file


def is_kept() -> bool:
    """Whether the output of this process is already kept in a log."""
    return isinstance(sys.stdout, _Both)


class _Both:
    """A stream whose text also goes to a file, without colours. Only the final state of a bar goes to the file."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream = stream
        self._file = file

    def write(self, text: str) -> int:
        plain = _COLOURS.sub("", text)
        # Text that moves the cursor is a bar, which is drawn again and again.
        if not _CONTROLS.search(plain) and "\r" not in plain:
            self._file.write(plain)
            self._file.flush()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
