"""The kernels that the clock takes for an op are those that a rehearsal sees it launch."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.jobs.rehearse.rank import rehearse_ranks
from cosmos3_pipeline.planning.vae import shape_of
from cosmos3_pipeline.rehearsal.roofline import Roofline
from cosmos3_pipeline.vae import bound_ops, ops
from cosmos3_pipeline.vae.lowering import lower
from cosmos3_pipeline.vae.program import program_for
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard


@pytest.mark.parametrize(
    ("axis", "ranks", "rank", "one_kernel", "near"),
    [
        pytest.param("height", 1, 0, 1, 0.15, id="alone"),
        pytest.param("height", 3, 1, 0, 0.03, id="between rows, large norms"),
        pytest.param("width", 3, 1, 1, 0.05, id="between columns"),
        pytest.param("grid", 9, 4, 0, 0.03, id="amid a grid, large norms"),
    ],
)
def test_the_clock_counts_the_kernels_that_a_decode_launches(
    monkeypatch: pytest.MonkeyPatch, axis: str, ranks: int, rank: int, one_kernel: int, near: float
) -> None:
    """`near`: what an op's neighbours change.

    one_kernel: whether a norm of any size is one kernel, or computes first the edges that neighbours wait for.
    """
    for module in (ops, bound_ops):
        monkeypatch.setattr(module, "ONE_KERNEL_ELEMENTS", one_kernel * sys.maxsize)
    sharded = ["vae.parallel_decode=true", "vae/decode=spatial_shard", f"vae.decode.axis={axis}"]
    config = compose(
        [
            "model=toy",
            "task.num_frames=17",
            "sampler.steps=1",
            "topology=cpu_x2",
            "topology.ulysses=1",
            "topology.cfg=1",
            f"topology.ranks_per_node={ranks}",
            *(sharded if ranks > 1 else ["vae=replicated"]),
        ]
    )
    program = program_for("decode", plain(config.model.vae))
    calls: Counter[tuple[int, bool]] = Counter()
    running: list[bool] = []
    launched = 0

    def watched(run: Any) -> Any:
        def watch(bound: Any, flow: Any) -> None:
            calls[bound.number, flow.first] += 1
            running.append(True)
            run(bound, flow)
            running.pop()

        return watch

    def counted(*args: Any) -> None:
        nonlocal launched
        launched += bool(running)
        add(*args)

    add = Roofline.add
    monkeypatch.setattr(Roofline, "add", counted)
    for bound in bound_ops.BoundOp.__subclasses__():
        monkeypatch.setattr(bound, "run", watched(bound.run))
    rehearse_ranks(config, [rank])
    shape = shape_of(config, "decode")
    strategy = SpatialShard(axis) if ranks > 1 else Replicated()
    lowered = lower(program, shape, strategy.assign(program, shape, ranks))
    sides = lowered.sides(lowered.layouts[0][0].tiles[rank])
    said = 0
    for (number, first), times in calls.items():
        op = program.ops[number]
        frames = 1 if first else op.source.frames // program.portions_at(number + 1, first=False)
        said += times * op.kernels(frames, 1, sides, first=first)
    assert said == pytest.approx(launched, rel=near)
