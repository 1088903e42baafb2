"""The folder of a run: one run at a time, nothing of the one before, and links that are not followed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.jobs.folder import claimed, clear
from cosmos3_pipeline.stages.files import RUN_FILES, whole_file, write_whole


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claimed(folder):
        # Another process' lock is another opening of the folder.
        other = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with claimed(tmp_path / "." / "run"):
            pass  # the same process, further in
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (
        pytest.raises(ConfigError, match=r"another run is writing to .*/run\n.*\n  works: hydra.run.dir="),
        claimed(folder),
    ):
        pass
    os.close(other)
    with claimed(folder):
        pass


@pytest.mark.parametrize(
    ("name", "folder", "says"),
    [
        ("video.mp4", True, "video.mp4 is a folder"),
        ("line_0001/metrics.json", True, "metrics.json is a folder"),
        (".hydra", False, ".hydra is a file"),
        ("line_0002", False, "line_0002 is a file"),
    ],
)
def test_what_is_in_the_way_is_refused(name: str, folder: bool, says: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).mkdir() if folder else (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=says), claimed(tmp_path):
        pass
    assert (tmp_path / name).exists()


def test_nothing_of_an_older_run_stays(tmp_path: Path) -> None:
    mine = tmp_path / "notes.txt"
    line = tmp_path / "line_0001"
    line.mkdir()
    for name in (*RUN_FILES, "video.mp4.1234.partial", "line_0001/video.mp4", "notes.txt"):
        (tmp_path / name).touch()
    precious = tmp_path.parent / "precious"
    precious.write_text("precious")
    (tmp_path / "image.png").unlink()
    (tmp_path / "image.png").symlink_to(precious)
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]
    assert precious.read_text() == "precious"


def test_a_link_at_the_place_of_a_file_is_replaced(tmp_path: Path) -> None:
    precious, file = tmp_path / "precious", tmp_path / "plan.json"
    precious.write_text("precious")
    file.symlink_to(precious)
    write_whole(file, "new")
    assert (file.read_text(), file.is_symlink(), precious.read_text()) == ("new", False, "precious")


def test_two_writers_of_one_file_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other and one.stat().st_mode & 0o777 == 0o666 & ~umask()
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() in ("one", "other") and [*tmp_path.iterdir()] == [path]


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found
