"""In a run each rank reads from the checkpoint the VAE weights of its own share, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.jobs.rank import components, used
from cosmos3_pipeline.jobs.ranks import resolved
from cosmos3_pipeline.models import loading
from cosmos3_pipeline.models.loading import CheckpointVae
from cosmos3_pipeline.plan.checks import compose_checked
from cosmos3_pipeline.stages.progress import Silent
from cosmos3_pipeline.vae.program import program_for


def _names_read(rank: int, plain: dict[str, Any]) -> set[str]:
    read: set[str] = set()
    load = CheckpointVae.load

    def watched(self: CheckpointVae, names: Any, **how: Any) -> dict[str, torch.Tensor]:
        wanted = list(names)
        read.update(wanted)
        return load(self, wanted, **how)

    def whole(*_: Any, **__: Any) -> Any:
        raise AssertionError("the whole VAE is loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointVae, "load", watched)
        patch.setattr(loading, "load_vae", whole)
        components(plain, torch.device("cpu"), RankMesh.build(cfg=2), [], Silent()).vae(encoder=False)
    return read


def test_the_ranks_of_a_layer_pipeline_divide_the_decoder() -> None:
    cfg = compose_checked(["topology=cpu_x2"])
    plain = resolved(cfg)
    first, second = run_on_ranks(_names_read, 2, plain)
    decoder = program_for("decode", plain["model"]["vae"])
    assert first | second == {weight.name for weight in decoder.weights()}
    plan = used(plain, "decode").plan
    assert plan is not None
    for read, share in zip((first, second), plan.shares, strict=True):
        assert read == {weight.name for weight in decoder.weights(*share.ops)}
    # Both read those of the ops over which the cut between them moves.
    assert 0 < len(first & second) < len(decoder.weights()) / 3
