"""The two ways that the tensors of ranks can go: a CPU's, and an accelerator's, which tests force on a CPU."""

from __future__ import annotations

import pytest

from cosmos3_pipeline.distributed.host_path import FORCED


@pytest.fixture(params=["host", "accelerator"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test both ways: the branches of an accelerator, with real values and gloo in the place of NCCL."""
    if request.param == "accelerator":
        monkeypatch.setenv(FORCED, "1")
    return str(request.param)
