"""Planned activations and messages of denoising against what real ranks hold and send."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cosmos_models import denoise_with, tiny_pipeline
from ranks import run_on_ranks

from cosmos3_pipeline import compose
from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.distributed.mesh import SEQUENCE, RankMesh
from cosmos3_pipeline.planning.plan import make_plan
from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes

STEPS, WORDS = 3, (40, 17)
CLIP = {"height": 176, "width": 240, "num_frames": 33}  # 11 x 15 latent rows and columns: both odd
MODEL = {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 160}


def measure(rank: int, cfg: int, cp: tuple[int, int], ulysses: int) -> tuple[int, int, int]:
    """(peak bytes of activations and text, sent bytes, sent messages) of one rank."""
    mesh = RankMesh.build(cfg=cfg, cp=cp, ulysses=ulysses)
    pipeline = tiny_pipeline(**MODEL)
    with LiveBytes([*pipeline.transformer.parameters(), *pipeline.transformer.buffers()]) as live:
        denoise_with(
            ParallelLoopDenoiser(mesh),
            pipeline,
            prompt_ids=([5] * WORDS[0], [5] * WORDS[1]),
            steps=STEPS,
            guidance_scale=6.0,
            seed=0,
            **CLIP,
        )
    ledgers = [mesh.comm(axis).ledger for axis in ("cfg", SEQUENCE)]
    return live.peak, sum(ledger.sent_bytes for ledger in ledgers), sum(ledger.sent_messages for ledger in ledgers)


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("cfg", "cp", "ulysses"), [(1, (1, 1), 2), (2, (1, 1), 1), (2, (1, 1), 2), (1, (2, 2), 1)]
)
def test_ranks_hold_and_send_what_is_planned(cfg: int, cp: tuple[int, int], ulysses: int) -> None:
    ranks = cfg * cp[0] * cp[1] * ulysses
    measured = run_on_ranks(measure, ranks, cfg, cp, ulysses)
    composed = compose(
        [
            "model=toy_random",
            f"topology.ranks_per_node={ranks}",
            f"topology.cfg={cfg}",
            f"topology.cp=[{cp[0]},{cp[1]}]",
            f"topology.ulysses={ulysses}",
            f"sampler.steps={STEPS}",
            *(f"task.{key}={value}" for key, value in CLIP.items()),
        ]
    )
    own = {**MODEL, "num_hidden_layers": 3, "head_dim": 16}
    transformer = replace(composed.model.transformer, **own)
    tiny = replace(composed, model=replace(composed.model, transformer=transformer))
    plan = make_plan(tiny, text_tokens=WORDS)
    for rank, (peak, sent_bytes, messages) in zip(plan.ranks, measured, strict=True):
        stage, text = rank.stages["denoise"], rank.stages["text"]
        sent = stage.sent + text.sent
        assert (sent.bytes, sent.messages) == (sent_bytes, messages)
        assert stage.activation_bytes + rank.text_bytes == pytest.approx(peak, rel=0.15)


def test_the_model_of_this_test_is_the_one_that_is_planned() -> None:
    config = tiny_pipeline(**MODEL).transformer.config
    assert (config.num_hidden_layers, config.head_dim) == (3, 16)
