"""In a run each rank reads from the checkpoint the VAE weights of its own share, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.distributed.mesh import RankMesh
from cosmos3_pipeline.jobs.rank import components
from cosmos3_pipeline.models import loading
from cosmos3_pipeline.models.loading import CheckpointVae
from cosmos3_pipeline.planning.plan import Plan, make_plan
from cosmos3_pipeline.stages.progress import Silent


def _names_read(rank: int, config: Config, plan: Plan) -> set[str]:
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
        components(config, plan, torch.device("cpu"), RankMesh.build(cfg=2), [], Silent()).vae(encoder=False)
    return read


def test_the_ranks_of_a_layer_pipeline_divide_the_decoder() -> None:
    config = compose(["topology=cpu_x2"])
    plan = make_plan(config)
    first, second = run_on_ranks(_names_read, 2, config, plan)
    decoder = plan.vae["decode"].program
    assert first | second == {weight.name for weight in decoder.weights()}
    for read, share in zip((first, second), plan.vae["decode"].plan.shares, strict=True):
        assert read == {weight.name for weight in decoder.weights(*share.ops)}
    # Both read those of the ops over which the cut between them moves.
    assert 0 < len(first & second) < len(decoder.weights()) / 3
