"""Plans of the VAE on disk, because most of a review's time would be planning what an earlier review has planned.

This module imports nothing from the library, so `worker.py` can load it beside the code of any revision.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

MOST_VERSIONS = 8  # of the code whose plans are kept
# A setting with a text may name a file, such as measured times of ops, and no key has the content of a file.
_TEXT_SETTING = re.compile(r"='[^']|=\"")


class Kept(MutableMapping[str, Any]):
    """A mapping whose values are also files in the folder of one version of the code.

    `packages` are the folders of this code. Values of another version are never read. A file that cannot be read
    or written is left out.
    """

    def __init__(self, root: Path, packages: Iterable[Path]) -> None:
        self._folder, self._read = root / digest(packages), dict[str, Any]()

    def __getitem__(self, key: str) -> Any:
        if key not in self._read:
            if not _may_be_kept(key):
                raise KeyError(key)
            # A file that was cut short, or that another Python wrote, raises almost any exception.
            with suppress(Exception):
                self._read[key] = pickle.loads(self._file(key).read_bytes())
        return self._read[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._read[key] = value
        if _may_be_kept(key):
            with suppress(OSError):
                self._write(self._file(key), pickle.dumps(value))

    def __delitem__(self, key: str) -> None:
        """Forget the value in this process; its file stays."""
        del self._read[key]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._read))

    def __len__(self) -> int:
        return len(self._read)

    def _file(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.pickle"

    def _write(self, file: Path, content: bytes) -> None:
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True)
            versions = sorted(self._folder.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
            for old in versions[:-MOST_VERSIONS]:
                shutil.rmtree(old, ignore_errors=True)
        with NamedTemporaryFile(dir=self._folder, delete=False) as written:  # another review may write it too
            written.write(content)
        os.replace(written.name, file)


def kept_in() -> Path:
    """The folder for plans, by the XDG base directory specification."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "cosmos3_pipeline" / "plans"


def digest(packages: Iterable[Path]) -> str:
    """A digest of every file of the folders `packages`, with their paths, but without compiled code."""
    found = hashlib.sha256()
    for package in sorted(packages):
        for file in sorted(package.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                found.update(f"{package.name}/{file.relative_to(package)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def _may_be_kept(key: str) -> bool:
    return not _TEXT_SETTING.search(key.rpartition("<class ")[2].partition(">")[2])
