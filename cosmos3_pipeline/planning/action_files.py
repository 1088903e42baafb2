"""Action files: `task.actions` is read and checked before work starts; the text of actions.json is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.planning.actions import EMBODIMENTS, ActionTask

# The model's half-precision arithmetic overflows with larger values.
LARGEST = 1e4
ACTIONS_FILE = "actions.json"
SCHEMA_VERSION = 1
UNITS = (
    "normalised, as the model was trained: a robot needs them scaled with the statistics of the dataset, which no "
    "checkpoint holds"
)


def read_actions(path: str, action: ActionTask, fps: float) -> list[list[float]]:
    """The actions of `task.actions`, one row of numbers for each.

    The file is a `.npy` array [actions, width], the same array as JSON lists, or the `actions.json` of a run. It
    holds one or more whole chunks. `fps` is the rate of the video, which shows one frame for each action.

    Raises:
        Refusal: the file is missing or holds no such array, its rows are not a whole number of chunks, it has
            another number of columns than the domain, an `actions.json` names another domain or rate, or a value
            is NaN, infinite or beyond `LARGEST`.
    """
    file, named = Path(path).expanduser().absolute(), f"task.actions={path}"
    works = f"a .npy or .json file of {action.chunk_size} x {action.width} numbers, or of several such chunks"
    if not file.is_file():
        why = f"{file} {'is a folder' if file.is_dir() else 'does not exist'}"
        raise Refusal(what=f"{named} is not a file", why=why, works=works)
    rows = _of_npy(file, named, works) if file.suffix == ".npy" else _of_json(file, named, works, action, fps)
    if not rows:
        raise Refusal(
            what=f"{named} has no actions",
            why="the video has one frame for each action, after the frame of task.image or task.video",
            works=works,
        )
    widths = tuple(sorted({len(row) for row in rows}))
    if widths != (action.width,):
        columns = " and ".join(str(count) for count in widths)
        raise Refusal(
            what=f"{named} has {columns} columns with task.domain={action.domain}",
            why=f"an action of {action.domain} has {action.width} numbers",
            works=_other_domains(widths) or works,
        )
    if len(rows) % action.chunk_size:
        raise Refusal(
            what=f"{named} has {len(rows)} actions with task.chunk_size={action.chunk_size}",
            why="the last chunk would lack some, and diffusers would repeat the last action until it is full",
            works=_other_chunks(len(rows), action) or works,
        )
    for number, row in enumerate(rows):
        if not all(abs(value) <= LARGEST for value in row):  # False for NaN too
            raise Refusal(
                what=f"{named} has a value in row {number} that is NaN, infinite or beyond {LARGEST:g}",
                why="actions are normalised numbers of about 1; every pixel of the clip would be lost with it",
                works=works,
            )
    return [[float(value) for value in row] for row in rows]


def _other_chunks(rows: int, action: ActionTask) -> str | None:
    """The override of the chunk size nearest to the task's that divides `rows`; None if there is none."""
    filled = [size for size in range(4, rows + 1, 4) if rows % size == 0]  # a latent frame is four frames
    if not filled:
        return None
    return f"task.chunk_size={min(filled, key=lambda size: abs(size - action.chunk_size))}"


def _other_domains(widths: tuple[int, ...]) -> str | None:
    """The override with the domains whose actions have this width; None if there is none."""
    names = [name for name, one in EMBODIMENTS.items() if widths == (one.width,)]
    return f"task.domain={' or '.join(names)}" if names else None


def _of_npy(file: Path, named: str, works: str) -> list[list[float]]:
    import numpy as np

    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError) as error:
        why = "it was not written by numpy.save as one array of numbers, or it ends too early"
        raise Refusal(what=f"{named} is no array of NumPy", why=why, works=works) from error
    if array.dtype.kind not in "fiu" or array.ndim != 2:
        raise Refusal(
            what=f"{named} holds {array.dtype} {list(array.shape)}",
            why="actions are rows of real numbers: one row an action, one column each of its numbers",
            works=works,
        )
    rows: list[list[float]] = array.astype(float).tolist()
    return rows


def _of_json(file: Path, named: str, works: str, action: ActionTask, fps: float) -> list[list[float]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(what=f"{named} is no JSON", why=str(error), works=works) from error
    if isinstance(found, dict):
        domain = found.get("domain", action.domain)
        if domain != action.domain:
            raise Refusal(
                what=f"{named} has actions of {domain} with task.domain={action.domain}",
                why="each embodiment has columns and weights of its own",
                works=f"task.domain={domain}" if domain in EMBODIMENTS else works,
            )
        rate = found.get("fps", fps)
        if rate != fps:
            raise Refusal(
                what=f"{named} has {rate} actions per second with task.fps={fps:g}",
                why="an action lasts one frame, so the motion would have another speed",
                works=f"task.fps={rate}",
            )
        found = found.get("actions")
    if not _is_rows(found):
        raise Refusal(
            what=f"{named} holds no rows of numbers",
            why="actions are a list with one list of numbers for each, or an actions.json of a run",
            works=works,
        )
    rows: list[list[float]] = found
    return rows


def _is_rows(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(row, list) and all(type(value) in (int, float) for value in row) for row in found
    )


def actions_report(action: ActionTask, fps: float, actions: list[list[float]]) -> str:
    """The text of actions.json, one line for each action. Later versions add keys and never rename them."""
    assert action.domain is not None
    about = {
        "schema_version": SCHEMA_VERSION,
        "domain": action.domain,
        "mode": action.mode.value,
        "fps": fps,
        "chunk_size": action.chunk_size,
        "units": UNITS,
        "columns": list(EMBODIMENTS[action.domain].columns) or None,
    }
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in about.items()]
    rows = ",\n".join(f"    {json.dumps(row)}" for row in actions)
    return "{\n" + ",\n".join([*lines, f'  "actions": [\n{rows}\n  ]']) + "\n}\n"
