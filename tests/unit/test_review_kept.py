"""Plans that a review keeps on disk: for one version of the code, and only what a key says whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.planning import vae
from cosmos3_pipeline.planning.checks import check_composition
from cosmos3_pipeline.review.kept import MOST_VERSIONS, Kept, digest

KEY = "('decode', 4, <class 'x.Line'>, Line(moving_cuts=True, op_seconds=''))"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "code.py").write_text("a = 1")
    return folder


def test_a_plan_is_read_by_the_same_code_only(tmp_path: Path, package: Path) -> None:
    root = tmp_path / "cache"
    Kept(root, [package])[KEY] = "a plan"
    assert KEY in Kept(root, [package])
    (package / "code.py").write_text("a = 2")
    assert KEY not in Kept(root, [package])
    for version in range(2 * MOST_VERSIONS):
        (package / "code.py").write_text(f"b = {version}")
        Kept(root, [package])[KEY] = "a plan"
    assert len(list(root.iterdir())) == MOST_VERSIONS


def test_settings_that_may_name_files_and_broken_files_are_left_out(tmp_path: Path, package: Path) -> None:
    root = tmp_path / "cache"
    named = KEY.replace("op_seconds=''", "op_seconds='vae.json'")
    Kept(root, [package])[named] = "a plan"
    assert named not in Kept(root, [package])
    Kept(root, [package])[KEY] = "a plan"
    (file,) = (root / digest([package])).iterdir()
    file.write_bytes(b"cut short")
    assert KEY not in Kept(root, [package])
    (tmp_path / "file").write_text("")
    Kept(tmp_path / "file" / "cache", [package])[KEY] = "a plan"  # a folder that cannot be made


def test_a_kept_plan_is_the_plan(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = composition_of(["topology=cpu_x2", "task=v2v"])
    monkeypatch.setattr(vae, "made", {})
    fresh = check_composition(asked)
    for _ in range(2):  # made and kept, then read
        monkeypatch.setattr(vae, "made", Kept(tmp_path / "cache", [package]))
        assert check_composition(asked).plan() == fresh.plan()
    monkeypatch.setattr("cosmos3_pipeline.vae.strategy.Strategy.plan", None)  # nothing is planned any more
    monkeypatch.setattr(vae, "made", Kept(tmp_path / "cache", [package]))
    assert check_composition(asked).vae == fresh.vae
