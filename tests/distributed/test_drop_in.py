"""`Cosmos3OmniPipeline(vae=ParallelVAE(...))`, unchanged, in real ranks: image to video, both ways in parallel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cosmos_models import tiny_pipeline
from diffusers import Cosmos3OmniPipeline
from PIL import Image
from ranks import run_on_ranks

from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.strategy import Strategy
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard

# 5 latent rows: no number of ranks from 2 to 4 divides them.
pytestmark = pytest.mark.usefixtures("path")
SIZE = {"height": 80, "width": 96, "num_frames": 9}


def _video(pipeline: Cosmos3OmniPipeline) -> np.ndarray:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8))
    made = pipeline(
        prompt="a red kite",
        negative_prompt="",
        image=photo,
        **SIZE,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    return np.asarray(made.video)


def _parallel(rank: int, strategy: Strategy) -> tuple[np.ndarray, int]:
    parts: dict[str, Any] = dict(tiny_pipeline().components)
    vae = ParallelVAE(parts.pop("vae"), strategy, strategy)
    pipeline = Cosmos3OmniPipeline(**parts, vae=vae, enable_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return _video(pipeline), vae.ledger.sent_bytes


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("strategy", "ranks"), [(LayerPipeline(), 3), (SpatialShard(), 2)], ids=["layers", "rows"]
)
def test_cosmos_pipeline_gives_the_same_video(strategy: Strategy, ranks: int) -> None:
    plain = _video(tiny_pipeline())
    one, _ = _parallel(0, Replicated())
    assert plain.std() > 0.05  # a flat video would hide every error
    assert np.abs(one - plain).max() <= 1e-5
    for video, sent in run_on_ranks(_parallel, ranks, strategy):
        assert sent > 0
        if isinstance(strategy, LayerPipeline):
            assert (video == one).all()
        assert np.abs(video - plain).max() <= 1e-5
