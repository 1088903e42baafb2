"""`cosmos3 make-checkpoint`: every layout, whole or not at all, and refused where there is no room."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from checkpoints import make_layout
from safetensors.torch import load_file

from cosmos3_pipeline.models import make_checkpoint
from cosmos3_pipeline.models.layouts import LAYOUTS
from cosmos3_pipeline.models.maker import component_entries


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.long
def test_the_command_writes_a_layout_the_same_every_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_checkpoint.main(["--layout", "edge", str(tmp_path / "new" / "one")]) == 0
    assert f"model=edge model.path={tmp_path / 'new' / 'one'}" in capsys.readouterr().err
    assert make_checkpoint.main(["--layout", "edge", str(tmp_path / "two")]) == 0
    assert digest(tmp_path / "new" / "one") == digest(tmp_path / "two")
    assert not list(tmp_path.glob(".*"))


def test_every_file_is_what_its_index_says(tmp_path: Path) -> None:
    folder = make_layout(tmp_path / "nano", "nano")
    index = json.loads((folder / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    files = {file: load_file(folder / "transformer" / file) for file in set(index["weight_map"].values())}
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert {tensor.dtype for tensors in files.values() for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.long
@pytest.mark.parametrize(("name", "shards", "size"), [("nano", 7, 33e9), ("super", 27, 131e9), ("edge", 2, 9.2e9)])
def test_the_full_size_is_that_of_the_published_one(name: str, shards: int, size: float) -> None:
    numbers = make_checkpoint.numbers_of(LAYOUTS[name], full_size=True)
    entries = component_entries(LAYOUTS[name], **numbers, dtype=torch.bfloat16, full_size=True)
    total = sum(entry.nbytes for tensors in entries.values() for entry in tensors)
    assert total == pytest.approx(size, rel=0.06)
    from cosmos3_pipeline.models.maker import SHARD_BYTES, shards_of

    assert len(shards_of(entries["transformer"], SHARD_BYTES)) == shards


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert make_checkpoint.main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(("name", "said"), [("fp8", "is refused here"), ("edge", "try: python launch.py")])
def test_the_next_command_is_one_that_runs(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_checkpoint.main(["--layout", name, str(tmp_path / name)]) == 0
    assert said in capsys.readouterr().err


def test_nothing_is_written_over_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").write_text("mine")
    said = refused(capsys, "--layout", "toy", str(tmp_path))
    assert "is there already" in said and (tmp_path / "kept").read_text() == "mine"
    assert "is there already" in refused(capsys, "--layout", "toy", str(tmp_path / "kept"))


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2e9, 1e9, 1e9))
    said = refused(capsys, "--layout", "nano", "--full-size", str(tmp_path / "nano"))
    assert "1 GB are free" in said and "too few" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, "--layout", "toy", str(tmp_path / "file" / "below"))


@pytest.mark.long
def test_what_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cosmos3_pipeline.models.maker._write_safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint.main(["--layout", "toy", str(tmp_path / "toy")])
    assert not list(tmp_path.iterdir())
