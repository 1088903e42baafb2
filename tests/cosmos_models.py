"""Random Cosmos3 models of any small size: the classes of a real checkpoint, with weights that make text matter.

Everything is made in memory from a seed. `tiny_pipeline` is a complete `Cosmos3OmniPipeline`; its modular twin
is made from the same components by `modular_twin`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    CosmosActionCondition,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.modular_pipelines.cosmos.before_denoise import (
    Cosmos3PrepareTextSegmentsStep,
    Cosmos3TransferPackSequenceStep,
    Cosmos3TransferPrepareLatentsStep,
    Cosmos3TransferSetTimestepsStep,
)
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3LoopDenoiser, Cosmos3TransferDenoiseStep
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3 import (
    Cosmos3VisionActionCoreDenoiseStep,
    Cosmos3VisionCoreDenoiseStep,
    Cosmos3VisionSoundActionCoreDenoiseStep,
    Cosmos3VisionSoundCoreDenoiseStep,
)
from diffusers.modular_pipelines.cosmos.modular_blocks_cosmos3_distilled import (
    Cosmos3DistilledVisionCoreDenoiseStep,
)
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def randomise(module: nn.Module, *, seed: int, gain: float = 1.0) -> None:
    """Normal weights of variance gain²/fan-in, norms around one, small biases: no activation dies or blows up."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and not name.startswith("embed_tokens"):
                parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
            elif "norm" in name or name.endswith("gamma"):
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(noise if parameter.ndim >= 2 else 0.1 * noise)


def tiny_transformer(*, seed: int = 0, **config: Any) -> Cosmos3OmniTransformer:
    """A random `Cosmos3OmniTransformer` in fp32; `config` overrides its dimensions."""
    head_dim = config.get("head_dim", 16)
    width = head_dim // 2 // 3  # of the height and width axes of the rotary embedding; time takes the rest
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "intermediate_size": 80,
        "vocab_size": VOCABULARY,
        "rope_axes_dim": [head_dim // 2 - 2 * width, width, width],
    }
    model = Cosmos3OmniTransformer(**{**sizes, **config})
    randomise(model, seed=seed)
    return model.eval().requires_grad_(False)


def tiny_vae(*, seed: int = 0, base_dim: int = 8, decoder_base_dim: int = 8) -> AutoencoderKLWan:
    """A random Wan2.2 VAE (residual, patch size 2, 4x16x16) of small width."""
    vae = AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=decoder_base_dim,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=[0.01 * (i % 7 - 3) for i in range(48)],
        latents_std=[0.5 + 0.02 * (i % 11) for i in range(48)],
    )
    randomise(vae, seed=seed, gain=0.7)
    return vae.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges (one token per byte) and Qwen's chat markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_scheduler(*, flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=flow_shift, use_karras_sigmas=False
    )


def tiny_pipeline(*, seed: int = 0, flow_shift: float = 3.0, **config: Any) -> Cosmos3OmniPipeline:
    """A complete random `Cosmos3OmniPipeline` without safety checker; `config` goes to `tiny_transformer`."""
    pipeline = Cosmos3OmniPipeline(
        transformer=tiny_transformer(seed=seed, **config),
        text_tokenizer=tiny_tokenizer(),
        vae=tiny_vae(seed=seed + 1),
        scheduler=tiny_scheduler(flow_shift=flow_shift),
        enable_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoise_with(
    denoiser: Any,
    pipeline: Cosmos3OmniPipeline,
    *,
    prompt_ids: tuple[list[int], list[int]],
    height: int,
    width: int,
    num_frames: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    fps: float = 24.0,
    distilled_sigmas: list[float] | None = None,
    conditioning: torch.Tensor | None = None,
    condition_frames: Iterable[int] = (),
) -> torch.Tensor:
    """The final latents [1, C, T, h, w] of diffusers' modular denoise workflow with its denoiser block replaced.

    `denoiser` None keeps diffusers' own block. `conditioning` [1, C, T, h, w] are clean latents, used on the
    latent frames `condition_frames`. With `distilled_sigmas` workflow and scheduler are those of a distilled
    checkpoint.
    """
    workflow = Cosmos3DistilledVisionCoreDenoiseStep() if distilled_sigmas else Cosmos3VisionCoreDenoiseStep()
    latents = run_workflow(
        workflow,
        denoiser,
        pipeline,
        distilled_sigmas=distilled_sigmas,
        cond_input_ids=prompt_ids[0],
        uncond_input_ids=prompt_ids[1],
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        x0_tokens_vision=conditioning,
        vision_condition_frames=list(condition_frames),
        generator=torch.Generator("cpu").manual_seed(seed),
    ).get("latents")
    assert isinstance(latents, torch.Tensor)
    return latents


def run_workflow(
    workflow: Any,
    denoiser: Any,
    pipeline: Cosmos3OmniPipeline,
    *,
    distilled_sigmas: list[float] | None = None,
    **inputs: Any,
) -> Any:
    """The state after one of diffusers' denoise workflows. `denoiser` replaces its own, unless it is None."""
    if denoiser is not None:
        workflow.sub_blocks["denoise"].sub_blocks["denoiser"] = denoiser
    modular = workflow.init_pipeline()
    modular.update_components(transformer=pipeline.transformer, scheduler=pipeline.scheduler)
    if distilled_sigmas:
        scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        modular.update_components(scheduler=scheduler, distilled_sigmas=distilled_sigmas)
    workflow.sub_blocks["denoise"].set_progress_bar_config(disable=True)
    return modular(**inputs)


class SwitchedGuidance(Cosmos3LoopDenoiser):  # type: ignore[misc] # diffusers is untyped
    """diffusers' own denoiser, whose guidance is off where a step is not in the interval."""

    def __init__(self, interval: tuple[float, float]) -> None:
        super().__init__()
        self._interval = interval

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        scale = block_state.guidance_scale
        if not self._interval[0] <= t.item() <= self._interval[1]:
            block_state.guidance_scale = 1.0
        found = super().__call__(components, block_state, i, t)
        block_state.guidance_scale = scale
        return found


# The modalities that a run denoises, with diffusers' workflow for them.
MODALITIES = {
    "vision": Cosmos3VisionCoreDenoiseStep,
    "sound": Cosmos3VisionSoundCoreDenoiseStep,
    "action": Cosmos3VisionActionCoreDenoiseStep,
    "sound and action": Cosmos3VisionSoundActionCoreDenoiseStep,
}
ALL_HEADS = {"sound_gen": True, "sound_dim": 5, "action_gen": True, "action_dim": 12, "num_embodiment_domains": 9}


def all_latents(
    denoiser: Any,
    pipeline: Cosmos3OmniPipeline,
    modalities: str,
    *,
    prompt_ids: tuple[list[int], list[int]],
    size: tuple[int, int, int] = (80, 112, 9),
    mode: str = "policy",
    steps: int = 3,
    guidance_scale: float = 4.5,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The final latents of each modality, by the name of its state, with a clean first frame where actions are.

    `pipeline` has a transformer with `ALL_HEADS`. Twelve actions go with an embodiment of ten numbers;
    `mode` is that of a `CosmosActionCondition`.
    """
    height, width, num_frames = size
    generator = torch.Generator("cpu").manual_seed(seed + 100)
    inputs: dict[str, Any] = {}
    if "action" in modalities:
        frames = (num_frames - 1) // 4 + 1
        inputs = {
            "x0_tokens_vision": torch.randn(1, 48, frames, height // 16, width // 16, generator=generator),
            "vision_condition_frames": list(range(frames)) if mode == "inverse_dynamics" else [0],
            "action_condition_frame_indexes": list(range(12)) if mode == "forward_dynamics" else [],
            "action": CosmosActionCondition(
                mode=mode,  # type: ignore[arg-type]
                chunk_size=12,
                domain_name="droid_lerobot",
                raw_actions=torch.randn(12, 10, generator=generator),
                video=[],
            ),
        }
    state = run_workflow(
        MODALITIES[modalities](),
        denoiser,
        pipeline,
        cond_input_ids=prompt_ids[0],
        uncond_input_ids=prompt_ids[1],
        height=height,
        width=width,
        num_frames=num_frames,
        fps=24.0,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        **inputs,
    )
    found = {name: state.get(name) for name in ("latents", "sound_latents", "action_latents")}
    return {name: latents for name, latents in found.items() if latents is not None}


class TransferChunk(SequentialPipelineBlocks):  # type: ignore[misc] # diffusers is untyped
    """One chunk of diffusers' transfer, from latents of the controls to latents of the clip."""

    model_name = "cosmos3-omni"
    block_classes = (
        Cosmos3PrepareTextSegmentsStep,
        Cosmos3TransferPrepareLatentsStep,
        Cosmos3TransferPackSequenceStep,
        Cosmos3TransferSetTimestepsStep,
        Cosmos3TransferDenoiseStep,
    )
    block_names = ("text", "prepare", "pack", "timesteps", "denoise")


def transfer_latents(
    denoiser: Any,
    pipeline: Cosmos3OmniPipeline,
    *,
    controls: int = 1,
    size: tuple[int, int, int] = (80, 112, 9),
    clean_frames: int = 0,
    prompt_ids: tuple[list[int], list[int]] = ([3] * 13, [9] * 6),
    steps: int = 3,
    guidance_scale: float = 3.0,
    control_guidance: float = 1.5,
    guidance_interval: list[float] | None = None,
    control_interval: list[float] | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """The final latents [1, C, T, h, w] of a chunk that follows random control latents.

    The intervals are read by diffusers' denoiser; ours is given them when it is made.
    """
    height, width, num_frames = size
    shape = (1, 48, (num_frames - 1) // 4 + 1, height // 16, width // 16)
    generator = torch.Generator("cpu").manual_seed(seed + 100)
    state = run_workflow(
        TransferChunk(),
        denoiser,
        pipeline,
        cond_input_ids=prompt_ids[0],
        uncond_input_ids=prompt_ids[1],
        control_latents=[torch.randn(shape, generator=generator) for _ in range(controls)],
        x0_tokens_vision=torch.randn(shape, generator=generator),
        current_conditional_frames=clean_frames,
        fps=24.0,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        control_guidance=control_guidance,
        **({"guidance_interval": guidance_interval} if denoiser is None else {}),
        **({"control_guidance_interval": control_interval} if denoiser is None else {}),
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    latents = state.get("latents")
    assert isinstance(latents, torch.Tensor)
    return latents
