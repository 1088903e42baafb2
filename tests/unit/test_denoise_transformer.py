"""One rank: the latents of diffusers, with the text computed once and nothing recomputed or materialised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cosmos_models import denoise_with, tiny_pipeline
from diffusers import FirstBlockCacheConfig
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_pipeline.denoise import ParallelLoopDenoiser, ParallelTransformer
from cosmos3_pipeline.errors import Refusal

MODELS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "relu2, text norm off": {"hidden_act": "relu2", "qk_norm_for_text": False},
    "vision's own text norm": {"qk_norm_for_text": False, "use_und_k_norm_for_gen": True},
    "one key/value head": {"num_attention_heads": 6, "num_key_value_heads": 1, "num_hidden_layers": 1},
    "ungrouped, wide": {"num_key_value_heads": 4, "hidden_size": 96, "intermediate_size": 250},
    "attention bias, integer positions": {"attention_bias": True, "enable_fps_modulation": False},
}
SIZES = {"t2v": (80, 48, 9), "t2i": (112, 80, 1), "odd": (48, 16, 17), "one token": (16, 32, 1)}


def prompts(seed: int, words: tuple[int, int] = (23, 9)) -> tuple[list[int], list[int]]:
    generator = torch.Generator("cpu").manual_seed(seed)
    first, second = (torch.randint(0, 250, (n,), generator=generator).tolist() for n in words)
    return first, second


def run(denoiser: Any, pipeline: Any, size: str = "t2v", *, seed: int = 0, **changes: Any) -> torch.Tensor:
    height, width, num_frames = SIZES[size]
    arguments = {"steps": 4, "guidance_scale": 6.0, "prompt_ids": prompts(seed), **changes}
    return denoise_with(
        denoiser, pipeline, height=height, width=width, num_frames=num_frames, seed=seed, **arguments
    )


@pytest.mark.sampled(16)
@pytest.mark.long
@pytest.mark.parametrize("guidance_scale", [6.0, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_latents_are_those_of_diffusers(model: str, size: str, guidance_scale: float) -> None:
    seed = len(model) + len(size)
    pipeline = tiny_pipeline(seed=seed, **MODELS[model])
    expected = run(None, pipeline, size, seed=seed, guidance_scale=guidance_scale)
    ours = run(ParallelLoopDenoiser(), pipeline, size, seed=seed, guidance_scale=guidance_scale)
    assert expected.std() > 0.5
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_frames", [1, 5])
def test_latents_are_those_of_the_pipeline(num_frames: int) -> None:
    pipeline = tiny_pipeline(seed=4)
    words = {"prompt": "a red kite", "negative_prompt": "grey", "use_system_prompt": False}
    size = {"height": 80, "width": 112, "num_frames": num_frames}
    expected = pipeline(
        **words,
        **size,
        num_inference_steps=5,
        guidance_scale=4.5,
        output_type="latent",
        generator=torch.Generator("cpu").manual_seed(3),
    ).video
    ids = pipeline.tokenize_prompt(**words, **size)
    ours = denoise_with(
        ParallelLoopDenoiser(), pipeline, prompt_ids=ids, **size, steps=5, guidance_scale=4.5, seed=3
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clean", [(0,), (0, 1), (1,), (0, 1, 2)], ids=str)
def test_clean_frames_condition_and_stay(clean: tuple[int, ...]) -> None:
    pipeline = tiny_pipeline(seed=len(clean))
    conditioning = torch.randn(1, 48, 3, 5, 3, generator=torch.Generator("cpu").manual_seed(8))
    given = {"conditioning": conditioning, "condition_frames": clean}
    expected = run(None, pipeline, **given)
    ours = run(ParallelLoopDenoiser(), pipeline, **given)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[:, :, clean], conditioning[:, :, clean])
    if len(clean) < 3:
        assert not torch.allclose(run(ParallelLoopDenoiser(), pipeline), ours)


def test_half_precision_has_the_bits_of_diffusers() -> None:
    pipeline = tiny_pipeline(seed=2, hidden_size=64)
    pipeline.transformer.to(torch.bfloat16)
    pipeline.transformer.time_embedder.float()  # kept in fp32 by diffusers when it loads a checkpoint
    torch.testing.assert_close(run(ParallelLoopDenoiser(), pipeline), run(None, pipeline), rtol=0, atol=1e-3)


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda _module, arguments, _out: calls.append(len(arguments)))
    return calls


def test_what_does_not_change_is_computed_once() -> None:
    pipeline = tiny_pipeline(seed=1)
    model = pipeline.transformer
    per_prompt = [model.embed_tokens, model.layers[0].mlp, model.layers[-1].self_attn.to_k]
    per_pathway = [model.rotary_emb]
    per_step = [model.proj_in, model.time_embedder]
    never = [model.layers[-1].mlp, model.layers[-1].self_attn.to_out, model.norm]
    once, twice, each, none = (
        [count_calls(m) for m in modules] for modules in (per_prompt, per_pathway, per_step, never)
    )
    run(ParallelLoopDenoiser(), pipeline, steps=5)
    assert [len(calls) for calls in once] == [2] * len(once)  # the prompt and the negative prompt
    assert [len(calls) for calls in twice] == [4]
    assert [len(calls) for calls in each] == [5] * len(each)
    assert [len(calls) for calls in none] == [0] * len(none)


def test_a_new_run_reads_its_own_prompt() -> None:
    pipeline, denoiser = tiny_pipeline(seed=6), ParallelLoopDenoiser()
    first = run(denoiser, pipeline, prompt_ids=prompts(1))
    second = run(denoiser, pipeline, prompt_ids=prompts(2))
    assert not torch.allclose(first, second, atol=1e-3)
    torch.testing.assert_close(second, run(None, pipeline, prompt_ids=prompts(2)), rtol=0, atol=1e-6)


def test_the_diffusers_object_is_left_as_it_was() -> None:
    pipeline = tiny_pipeline(seed=3)
    model = pipeline.transformer
    before = run(None, pipeline)
    processors, attributes = model.attn_processors, set(vars(model))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    run(ParallelLoopDenoiser(), pipeline)
    assert set(vars(model)) == attributes
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(run(None, pipeline), before)


class Shapes(TorchDispatchMode):
    """Every operation's name and the shapes of the tensors it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.add(func.__name__)
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.shapes.add(one.shape)
        return out


def test_attention_is_fused_and_keeps_no_matrix_of_scores() -> None:
    with Shapes() as seen:
        run(ParallelLoopDenoiser(), tiny_pipeline(seed=1), prompt_ids=prompts(0, (41, 37)))
    vision = 3 * 3 * 2
    assert any("flash_attention" in name for name in seen.operations)
    assert not any("softmax" in name for name in seen.operations)
    assert not any(
        len(shape) > 1 and shape[-2] in (vision, text) and shape[-1] in (vision + text, text)
        for shape in seen.shapes
        for text in (41, 37)
    )


def test_a_cache_that_would_be_bypassed_is_refused() -> None:
    model = tiny_pipeline().transformer
    model._cache_config = FirstBlockCacheConfig()
    with pytest.raises(Refusal, match=r"(?s)FirstBlockCacheConfig.*never run.*disable_cache"):
        ParallelTransformer(model)


def test_an_attention_processor_that_would_be_bypassed_is_refused() -> None:
    model = tiny_pipeline().transformer
    model.set_attention_backend("native")
    with pytest.raises(Refusal, match=r"(?s)backend.*ignored.*set_attn_processor"):
        ParallelTransformer(model)
