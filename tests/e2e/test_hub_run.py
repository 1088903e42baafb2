"""A run from a repository of the hub, on a stand-in for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SMALL, launch, metrics
from fake_hub import OTHER, FakeHub, files_of, serving
from toy_runs import toy_dimensions

from cosmos3_pipeline.models.toy import toy_checkpoint


@pytest.mark.thorough
def test_ranks_open_what_was_fetched_before_they_started(one_rank: Path, tmp_path: Path) -> None:
    hub = FakeHub("acme/toy", files_of(toy_checkpoint(**toy_dimensions())))
    output = tmp_path / "run"
    overrides = (
        "topology=cpu_x2",
        "topology.threads_per_rank=2",
        "task.negative_prompt=''",  # the stand-in has one of its own, which the run would take
        "model.path=acme/toy",
        "model.revision=fp8",
        f"hydra.run.dir={output}",
    )
    with serving(hub):
        done = launch(*SMALL, *overrides, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr + done.stdout
    assert set(hub.gets().values()) == {1}
    told = metrics(output)["checkpoint"]
    assert (told["path"], told["repo"], told["revision"], told["commit"]) == ("acme/toy", "acme/toy", "fp8", OTHER)
    loading = metrics(output)["loading"]
    assert set(loading) == {"text", "transformer", "vae"}
    assert all(rank["host_peak_bytes"] > 0 and rank["kept_bytes"] > 0 for rank in loading["transformer"]["ranks"])
    assert metrics(output)["words"]["negative_prompt_from"] == "task.negative_prompt"
    assert metrics(output)["frames_sha256"] == metrics(one_rank)["frames_sha256"]
