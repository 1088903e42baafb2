"""Read a checkpoint's files safely: a broken file is refused, and a pipe or an endless file does not block."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from cosmos3_pipeline.errors import Refusal

# The files of a checkpoint outside its components' folders.
INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
NEGATIVE_PROMPT = "assets/negative_prompt.json"

# Bytes. The largest published files are an index of some 2,000 tensors, 0.2 MB, and a tokenizer.json, 12 MB.
LARGEST_JSON = 256 * 2**20


def not_whole(file: Path, why: str) -> Refusal:
    """The refusal of a file that is incomplete after a download, or was overwritten."""
    return Refusal(what=f"{file} is not whole", why=why, works="downloading it again (git-lfs: `git lfs pull`)")


def is_regular(file: Path) -> bool:
    """Whether `file` exists as a regular file. Reading a pipe or a device might never end.

    Raises:
        Refusal: it is not a regular file, or its folder cannot be searched.
    """
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return False
    # A loop of links, a folder without permission, or a name that is too long or impossible.
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error
    if stat.S_ISREG(mode):
        return True
    raise Refusal(
        what=f"{file} is {_kind(mode)}",
        why="a checkpoint consists of regular files; reading anything else may never end",
        works="the file of the checkpoint in its place",
    )


def read_text(file: Path, *, largest: int = LARGEST_JSON) -> str:
    """The UTF-8 text in `file`.

    Raises:
        Refusal: the file is missing, larger than `largest` bytes, unreadable, or not UTF-8.
    """
    if not is_regular(file):
        raise Refusal(
            what=f"there is no {file}",
            why="the checkpoint needs it",
            works="the whole checkpoint: the download may have ended early",
        )
    try:
        if (size := file.stat().st_size) > largest:
            raise not_whole(file, f"it has {size} bytes; no real one has more than {largest}")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise not_whole(file, f"it is no UTF-8 text: {error}") from error
    except OSError as error:
        raise unreadable(file, error) from error


def read_json(file: Path, *, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """The settings in the JSON file `file`, of at most `largest` bytes.

    Raises:
        Refusal: as `read_text`; or the text is not JSON, or not an object.
    """
    try:
        content = json.loads(read_text(file, largest=largest))
    except (ValueError, RecursionError) as error:  # a number with thousands of digits is a ValueError too
        if isinstance(error, Refusal):
            raise
        raise not_whole(file, f"it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise not_whole(file, f"it holds one value of type {type(content).__name__}, not keys with values")
    return content


def printable(words: str) -> str:
    """`words`, from a file, as any terminal can show them."""
    return words.encode("utf-8", "backslashreplace").decode()


def unreadable(file: Path, error: OSError | ValueError) -> Refusal:
    """The refusal of a file that cannot be read, whether or not it exists."""
    return Refusal(
        what=f"{printable(str(file))} cannot be read",
        why=(error.strerror if isinstance(error, OSError) else None) or str(error),
        works="a file that this user may read, on a disk that is there",
    )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISSOCK: "a socket",
    }
    return next((word for is_kind, word in kinds.items() if is_kind(mode)), "no regular file")
