"""The plan's numbers for denoising are those that the transformer really runs and keeps, on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cosmos_models import denoise_with, tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

from cosmos3_pipeline.denoise import ParallelLoopDenoiser, ParallelTransformer
from cosmos3_pipeline.denoise.cost import PassTokens, Stretch, Wire, denoise_costs
from cosmos3_pipeline.denoise.transformer import EncodedText, PreparedPass
from cosmos3_pipeline.planning.transformer import TransformerSize


def attention_flops(query: torch.Size, key: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    batch, heads, rows, head_dim = query
    return 4 * batch * heads * rows * key[2] * head_dim


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
MODELS: dict[str, dict[str, Any]] = {
    "silu": {},
    "relu2": {"hidden_act": "relu2", "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 24},
    "one layer": {"num_hidden_layers": 1, "hidden_size": 64},
}


class Counted(ParallelLoopDenoiser):
    """Counts the FLOPs of every step, the solver's left out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.flops: list[int] = []

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            out = super().__call__(components, block_state, i, t)
        self.flops.append(counter.get_total_flops())
        return out


@pytest.mark.parametrize("guidance_scale", [6.0, 1.0])
@pytest.mark.parametrize("clean", [(), (0, 2)])
@pytest.mark.parametrize("model", MODELS)
def test_flops_and_cache_are_exact(
    model: str, clean: tuple[int, ...], guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    pipeline = tiny_pipeline(seed=0, **MODELS[model])
    kept: list[PreparedPass] = []
    prepare = ParallelTransformer.prepare

    def remember(self: ParallelTransformer, text: EncodedText, **arguments: Any) -> PreparedPass:
        kept.append(prepare(self, text, **arguments))
        return kept[-1]

    stretches = (Stretch("vision", 192, frames=3, tokens_per_frame=3 * 4, clean=frozenset(clean)),)
    passes = [PassTokens(19, stretches), PassTokens(7, stretches, negative=True)]
    (cost,) = denoise_costs(
        TransformerSize.of(pipeline.transformer.config, latent_channels=48),
        passes=passes if guidance_scale != 1.0 else passes[:1],
        element_bytes=4,
        on_host=True,
    )
    monkeypatch.setattr(ParallelTransformer, "prepare", remember)
    denoiser = Counted()
    denoise_with(
        denoiser,
        pipeline,
        prompt_ids=([5] * 19, [7] * 7),
        height=80,
        width=112,
        num_frames=9,
        steps=3,
        guidance_scale=guidance_scale,
        seed=1,
        conditioning=torch.randn(1, 48, 3, 5, 7, generator=torch.Generator().manual_seed(0)),
        condition_frames=clean,
    )
    once = sum(text.flops for text in cost.texts) + cost.clip_flops
    cached = sum(text.cache_bytes for text in cost.texts)
    step = cost.step(range(3))
    assert denoiser.flops == [once + step.flops, step.flops, step.flops]
    assert sum(prepared.text.nbytes for prepared in kept) == cached
    stored = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for prepared in kept
        for layer in prepared.text.layers
        for tensor in layer
    }
    assert sum(stored.values()) == cached
    assert all(text.sequence == Wire() for text in cost.texts)
    assert step.sequence == step.cfg == Wire()
