"""The GPU of a rank: what is said where there is none, and the settings with which it computes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.distributed.device import gpu, numerics, use
from cosmos3_pipeline.errors import ConfigError, Refusal
from cosmos3_pipeline.jobs.start import prepare


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: str | None, gpus: int, says: str = "") -> None:
    def init() -> None:
        if says:
            raise RuntimeError(says)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize(
    ("here", "why", "works"),
    [
        ({"cuda": None, "gpus": 0}, "was built for the CPU alone", "PyTorch built with CUDA; without one"),
        ({"cuda": "13.0", "gpus": 2}, "this machine has 2", "topology.ranks_per_node=2"),
        (
            {"cuda": "13.0", "gpus": 0, "says": "The NVIDIA driver on your system is too old"},
            "with CUDA 13.0 sees none: The NVIDIA driver on your system is too old",
            "a driver for this version of CUDA (nvidia-smi tells), or a machine with a GPU; without one",
        ),
        ({"cuda": "13.0", "gpus": 0}, "with CUDA 13.0 sees none", "without one topology=cpu_x1"),
    ],
    ids=["a build for the CPU", "more ranks than GPUs", "a broken driver", "no GPU"],
)
def test_a_gpu_that_is_not_there(
    here: dict[str, Any], why: str, works: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, **here)
    with pytest.raises(Refusal) as refused:
        gpu(3)
    problem = refused.value.problem
    assert problem.what == "topology.device=cuda, and there is no GPU for rank 3 of this machine"
    assert why in problem.why and works in problem.works


def test_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda="13.0", gpus=4)
    assert gpu(3) == torch.device("cuda", 3)


def test_a_run_is_refused_before_it_starts_and_a_plan_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda="13.0", gpus=2)
    asked = composition_of(["topology=h200_x4", "model=toy"])
    with pytest.raises(ConfigError, match="no GPU for rank 3"):
        prepare(asked)
    prepare(asked, fetch=False)  # of a sweep, whose jobs may run elsewhere
    prepare(composition_of(["topology=h200_x4", "model=toy", "job=plan"]))
    assert compose(["topology=h200_x4"]).topology.ranks_per_node == 4


@pytest.mark.parametrize(("version", "slow"), [(90701, False), (90800, True), (91400, True), (91501, False)])
def test_a_gpu_computes_float32_as_float32_and_a_slow_cudnn_is_told(
    version: int, slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = []
    matmul, cudnn = (
        SimpleNamespace(allow_tf32=True),
        SimpleNamespace(allow_tf32=True, benchmark=True, deterministic=False, version=lambda: version),
    )
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 7))
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    device = torch.device("cuda", 1)
    with caplog.at_level(logging.WARNING):
        use(device)
    assert chosen == [device]
    assert slow == (f"cuDNN {version}" in caplog.text)
    found = numerics(device)
    assert (found["tf32"], found["cudnn_benchmark"], found["cudnn"]) == (False, False, version)
    assert (found["device"], found["nccl"]) == ("NVIDIA H200", "2.27.7")
