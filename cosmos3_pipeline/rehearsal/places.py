"""Finds the source line of an event: the innermost line that is neither PyTorch's nor the rehearsal's."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

import cosmos3_pipeline

_LIBRARY = Path(cosmos3_pipeline.__file__).parent
_SKIPPED = (str(Path(torch.__file__).parent), str(_LIBRARY / "rehearsal"), contextlib.__file__, "<frozen")
_MESSAGES = str(_LIBRARY / "distributed")


class Place(NamedTuple):
    """A line of a source file."""

    file: str
    line: int

    @property
    def name(self) -> str:
        """The line for a report: the last parts of its path, from its package on."""
        path = Path(self.file)
        parts = path.parts
        for root in (_LIBRARY.parent, _LIBRARY.parent / "plugins"):
            if path.is_relative_to(root):
                parts = path.relative_to(root).parts
        if "site-packages" in parts:
            parts = parts[parts.index("site-packages") + 1 :]
        return f"{'/'.join(parts[-4:])}:{self.line}"

    @property
    def is_ours(self) -> bool:
        """Whether the file is neither PyTorch's nor the rehearsal's."""
        return not _skipped(self.file)

    @property
    def text(self) -> str:
        """The source text of the line."""
        return linecache.getline(self.file, self.line).strip()


NOWHERE = Place("nowhere", 0)


def here() -> Place:
    """The line that is being executed."""
    return next(_lines(), NOWHERE)


def asker() -> Place:
    """The line outside `distributed` that asks for a message or waits for a message."""
    return next(_askers(), NOWHERE)


def askers() -> tuple[Place, Place]:
    """The line outside `distributed` that asks for a message, and the nearest caller of it in another file."""
    places = _askers()
    first = next(places, NOWHERE)
    return first, next((place for place in places if place.file != first.file), NOWHERE)


def _askers() -> Iterator[Place]:
    return (place for place in _lines() if not place.file.startswith(_MESSAGES))


def _lines() -> Iterator[Place]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not _skipped(file):
            yield Place(file, frame.f_lineno)
        frame = frame.f_back


@cache
def _skipped(file: str) -> bool:
    return file.startswith(_SKIPPED)
