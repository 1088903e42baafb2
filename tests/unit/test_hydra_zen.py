"""hydra-zen's `launch`, with what `compose` returns and with the library's functions as its task."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra_zen import launch

from cosmos3_pipeline import compose, plan
from cosmos3_pipeline.errors import ConfigError

QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]


@pytest.mark.long
def test_a_launch_composes_checks_and_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = compose(["topology=cpu_x2"])
    job = launch(asked, plan, overrides=["sampler.steps=2", *QUIET], version_base="1.3")
    assert (job.return_value.steps, len(job.return_value.ranks)) == (2, 2)
    (jobs,) = launch(asked, plan, overrides=["sampler.steps=2,3", *QUIET], multirun=True, version_base="1.3")
    assert [job.return_value.steps for job in jobs] == [2, 3]
    with pytest.raises(ConfigError, match=r"sampler\.steps=0 is out of range"):
        _ = launch(asked, plan, overrides=["sampler.steps=0", *QUIET], version_base="1.3").return_value
