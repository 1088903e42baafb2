"""The folder layouts of published Cosmos3 checkpoints, as data: configs, components and names.

The model option (`conf/model`) has the numbers of the transformer and the VAE. This file has the rest of each
published file, as read in November 2026 from fixtures, model cards and NVIDIA's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Mean and standard deviation of each latent channel of the Wan2.2 VAE, from its published config.
LATENTS_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
LATENTS_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)

_UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.37.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 1.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "sigma_max": 200.0,
    "sigma_min": 0.147,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": True,
}
DISTILLED_SIGMAS = [1.0, 0.9375, 0.8333333333333334, 0.625]
_DISTILLED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.39.0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "fixed_step_requires_explicit_sigmas": True,
    "fixed_step_sampler_config": {"sample_type": "sde", "t_list": DISTILLED_SIGMAS},
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": True,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
# Keys of every transformer/config.json.
_TRANSFORMER = {
    "_class_name": "Cosmos3OmniTransformer",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "base_fps": 24,
    "enable_fps_modulation": True,
    "timestep_scale": 0.001,
    "unified_3d_mrope_reset_spatial_ids": True,
    "unified_3d_mrope_temporal_modality_margin": 15000,
}
# Keys of the first release, most of which no diffusers class takes.
_LEGACY_TRANSFORMER = {
    **_TRANSFORMER,
    "_diffusers_version": "0.37.1",
    "dtype": "bfloat16",
    "freeze_und": False,
    "initializer_range": 0.02,
    "joint_attn_implementation": "two_way",
    "max_action_dim": 64,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "position_embedding_type": "unified_3d_mrope",
    "qk_norm": False,
    "qk_norm_for_diffusion": True,
    "temporal_compression_factor_sound": 1,
    "use_cache": True,
    "use_moe": True,
    "video_temporal_causal": False,
}
_EDGE_TRANSFORMER = {
    **_TRANSFORMER,
    "_diffusers_version": "0.39.0",
    "backbone_type": "cosmos3_edge_nemotron_dense",
    "temporal_compression_factor": 4,
}
_LEGACY_INDEX = {"_class_name": "Cosmos3OmniDiffusersPipeline", "_diffusers_version": "0.37.1"}
_INDEX = {"_class_name": "Cosmos3OmniPipeline", "_diffusers_version": "0.39.0"}
_EDGE_INDEX = {**_INDEX, "default_use_system_prompt": False, "use_native_flow_schedule": True}
_MODULAR_INDEX = {"_class_name": "Cosmos3OmniModularPipeline", "_blocks_class_name": "Cosmos3OmniBlocks"}
_FP8 = {
    "quant_method": "modelopt",
    "quant_type": "FP8_FP8",
    "quant_algo": "FP8",
    "weight_only": False,
    "modules_to_not_convert": [
        *("proj_in", "proj_out", "time_embedder", "audio_proj_in", "audio_proj_out"),
        *("action_proj_in", "action_proj_out", "lm_head", "visual"),
    ],
    "producer": {"name": "modelopt", "version": "0.44.0"},
    "runtime": {
        "diffusion_step_policy": {
            "schema_version": 1,
            "type": "first_last_n",
            "default_mode": "native",
            "first_steps": {"count": 3, "mode": "a16"},
            "last_steps": {"count": 3, "mode": "a16"},
        }
    },
}
_INT4 = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}


@dataclass(frozen=True)
class Layout:
    """One published folder layout. It has the numbers of the model option `option`.

    `quantization` is its quantization_config, whose `quant_method`, `modelopt` or `auto-round`, decides how
    weights are stored. `root` holds further JSON files by their names.
    """

    what: str
    option: str
    index: Mapping[str, Any]
    transformer: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: _UNIPC)
    tokenizer_class: str = "Qwen2TokenizerFast"
    vision_encoder: bool = True
    modular_index: Mapping[str, Any] | None = field(default_factory=lambda: _MODULAR_INDEX)
    quantization: Mapping[str, Any] | None = None
    negative_prompt: bool = True
    root: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """Whether a checkpoint of this layout can be run. A quantized checkpoint is recognised and refused."""
        return self.quantization is None

    @property
    def is_distilled(self) -> bool:
        """Whether the checkpoint fixes the number of steps."""
        return self.scheduler is _DISTILLED

    @property
    def edge(self) -> bool:
        """Whether the text model is Nemotron, not Qwen. Its chat template differs, and its MLP has no gate."""
        return self.option == "edge"


_QWEN_ROOT = {
    "config.json": {"architectures": ["Cosmos3ForConditionalGeneration"], "model_type": "cosmos3_omni"},
    "checkpoint.json": {"config_file": "config.yaml", "experiment": "random", "experiment_overrides": []},
}
_EDGE_ROOT = {
    "config.json": {"architectures": ["Cosmos3EdgeForConditionalGeneration"], "model_type": "cosmos3_edge"}
}
_NANO = Layout("Cosmos3-Nano as published", "nano", _LEGACY_INDEX, _LEGACY_TRANSFORMER, root=_QWEN_ROOT)
_SUPER = Layout("Cosmos3-Super as published", "super", _LEGACY_INDEX, _LEGACY_TRANSFORMER, root=_QWEN_ROOT)
_EDGE = Layout(
    "Cosmos3-Edge as published",
    "edge",
    _EDGE_INDEX,
    _EDGE_TRANSFORMER,
    tokenizer_class="PreTrainedTokenizerFast",
    root=_EDGE_ROOT,
)


def _like(layout: Layout, what: str, **changes: Any) -> Layout:
    return Layout(**{**layout.__dict__, "what": what, **changes})


LAYOUTS: Mapping[str, Layout] = {
    "nano": _NANO,
    "super": _SUPER,
    "edge": _EDGE,
    "nano-converted": _like(
        _NANO, "Cosmos3-Nano from NVIDIA's converter", index=_INDEX, root={}, vision_encoder=False
    ),
    "edge-converted": _like(
        _EDGE,
        "Cosmos3-Edge from NVIDIA's converter",
        index={**_EDGE_INDEX, "native_flow_shift": 3.0},
        scheduler={
            **_UNIPC,
            "_class_name": "Cosmos3EdgeUniPCMultistepScheduler",
            "flow_shift": 3.0,
            "sigma_max": None,
            "sigma_min": None,
            "use_karras_sigmas": False,
        },
        root={},
        vision_encoder=False,
    ),
    "distilled": _like(
        _SUPER,
        "Cosmos3-Super-Text2Image-4Step and -Image2Video-4Step",
        index={**_INDEX, "default_use_system_prompt": True},
        scheduler=_DISTILLED,
        modular_index={
            "_class_name": "Cosmos3DistilledModularPipeline",
            "_blocks_class_name": "Cosmos3DistilledBlocks",
            "is_distilled": True,
            "distilled_sigmas": DISTILLED_SIGMAS,
        },
        negative_prompt=False,
    ),
    "fp8": _like(_NANO, "the fp8 revision of Cosmos3-Nano", quantization=_FP8),
    "int4": _like(_SUPER, "Intel/Cosmos3-Super-int4-AutoRound", quantization=_INT4),
    "toy": Layout(
        "the toy model",
        "toy_random",
        {**_INDEX, "enable_safety_checker": False},
        {"_class_name": "Cosmos3OmniTransformer"},
        scheduler={**_UNIPC, "flow_shift": 10.0, "sigma_max": None, "sigma_min": None, "use_karras_sigmas": False},
        tokenizer_class="PreTrainedTokenizerFast",
        vision_encoder=False,
        modular_index=None,
        negative_prompt=False,
    ),
}
