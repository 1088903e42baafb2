"""Which files a case can be made of, read from the defaults lists alone: never one too few."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hydra.types import RunMode

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.closure import contents, files_of
from cosmos3_pipeline.config.plugins import register
from cosmos3_pipeline.config.source import BUILTIN
from cosmos3_pipeline.review.revisions import read_cases

CASES = read_cases(Path(__file__).parents[1] / "golden" / "cases.yaml")
ASKED = [
    *([], ["experiment=sglang_27037", "model=super_i2v"], ["vae=tiled", "vae/encode=spatial_shard", "task=v2v"]),
    *([name for name in CASES[case]] for case in ("nano_720p_h200_x8", "edge_480p_h100", "toy_from_clip")),
]


@pytest.mark.parametrize("overrides", ASKED, ids=lambda overrides: " ".join(overrides) or "default")
def test_every_file_that_hydra_composes_is_named(overrides: list[str]) -> None:
    register()
    with BUILTIN.opened() as loader:
        used = loader.compute_defaults_list("config", overrides, RunMode.RUN).defaults
    names = {default.config_path for default in used if default.config_path}
    files = {name for name in names if (config_dir() / f"{name}.yaml").is_file()}
    found = files_of(overrides, contents(config_dir()))
    assert files and files <= found
    assert not {"model/edge", "topology/h100_x16"} & (found - files)  # not simply all of them


def test_comments_and_the_order_of_keys_say_nothing(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, text in ((old, "a: 1\nb: [1, 2]\n"), (new, "# why\nb: [1, 2]   # both\n\na: 1\n")):
        (folder / "group").mkdir(parents=True)
        (folder / "group" / "x.yaml").write_text(text)
    assert contents(old) == contents(new)
    for other in ("a: 1\nb: [2, 1]\n", "# @package _global_\na: 1\nb: [1, 2]\n", "a: [\n", yaml.safe_dump({})):
        (new / "group" / "x.yaml").write_text(other)
        assert contents(old) != contents(new)
