"""The host memory of a rank that loads: little more than what it keeps, on one rank and on four."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import make_layout
from ranks import run_on_ranks

from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.config.schema import Placement
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.models.layouts import LAYOUTS
from cosmos3_pipeline.models.loading import Components, Load
from cosmos3_pipeline.models.make_checkpoint import numbers_of
from cosmos3_pipeline.planning.weights import WeightsPlan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """270 MB in bfloat16: large beside Python's own comings and goings."""
    numbers = numbers_of(LAYOUTS["nano"], full_size=False)
    numbers["transformer"] |= {"hidden_size": 1024, "num_hidden_layers": 6, "intermediate_size": 3072}
    return make_layout(tmp_path_factory.mktemp("large") / "nano", "nano", **numbers)


def load(rank: int, folder: str, dtype: torch.dtype, placement: Placement) -> Load:
    parts = Components(
        inspect_checkpoint(folder),
        dtype=dtype,
        vae_dtype=torch.float32,
        device=torch.device("cpu"),
        flow_shift=None,
        wrap_vae=lambda vae: vae,
        weights=WeightsPlan(placement, resident_layers=0, keep_text=False, stays=False),
        mesh=RankMesh.build(),
    )
    parts.load_vision()
    return parts.loads["transformer"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("dtype", "ranks", "placement"),
    [
        (torch.bfloat16, 1, Placement.resident),
        (torch.float32, 1, Placement.resident),
        (torch.bfloat16, 4, Placement.resident),
        (torch.bfloat16, 2, Placement.sharded),
    ],
    ids=str,
)
def test_loading_takes_a_tenth_more_than_is_kept_at_most(
    dtype: torch.dtype, ranks: int, placement: Placement, folder: Path
) -> None:
    kept = sum(
        placed.weight.bytes_in(dtype.itemsize)
        for placed in inspect_checkpoint(folder).tensors["transformer"]
        if placed.weight.part == "vision"
    )
    kept = kept // ranks if placement is Placement.sharded else kept
    for measured in run_on_ranks(load, ranks, str(folder), dtype, placement):
        assert measured.kept_bytes == pytest.approx(kept, rel=0.05)
        assert kept > 60e6
        assert kept * 0.9 < measured.host_peak_bytes < kept * 1.1
