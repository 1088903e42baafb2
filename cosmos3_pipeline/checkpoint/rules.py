"""The keys of a checkpoint's config files: those that decide the picture, with bounds, and those that do not.

This is the only list of both kinds. A key in neither list is reported (`Read.strangers`), never silently ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.checkpoint.files import printable
from cosmos3_pipeline.checkpoint.sound import CHANNELS, HOP, MULTIPLES, SAMPLE_RATE, STRIDES
from cosmos3_pipeline.errors import Refusal

# Why a value cannot run here, or None if it can.
Check = Callable[[Any], str | None]
REQUIRED = object()
LONGEST_LIST = 1024


def whole(at_least: int, at_most: int = 10**6) -> Check:
    """A check for a whole number in this range. True is no number."""

    def check(value: Any) -> str | None:
        if type(value) is int and at_least <= value <= at_most:
            return None
        return f"it must be a whole number from {at_least} to {at_most}"

    return check


def number(at_least: float, at_most: float) -> Check:
    """A check for a number in this range. NaN is in no range."""

    def check(value: Any) -> str | None:
        if type(value) in (int, float) and at_least <= value <= at_most:
            return None
        return f"it must be a number from {at_least:g} to {at_most:g}"

    return check


def one_of(*values: Any) -> Check:
    """A check for one of `values`, with the same type: 1 is not True."""

    def check(value: Any) -> str | None:
        if any(type(value) is type(known) and value == known for known in values):
            return None
        return f"only {' and '.join(map(repr, values))} can be run here"

    return check


flag = one_of(True, False)


def optional(check: Check) -> Check:
    """A check for null, or a value that passes `check`."""
    return lambda value: None if value is None else check(value)


def numbers(check: Check, *, at_least: int = 0) -> Check:
    """A check for a list of this length whose items all pass `check`."""

    def check_all(value: Any) -> str | None:
        if not isinstance(value, list) or not at_least <= len(value) <= LONGEST_LIST:
            return f"it must be a list of {at_least} to {LONGEST_LIST} values"
        return next((f"for each value of the list, {why}" for item in value if (why := check(item))), None)

    return check_all


def settings(value: Any) -> str | None:
    """A check for an object, whose keys are checked by rules of their own."""
    return None if isinstance(value, dict) else "it must be keys with values"


def anything(value: Any) -> str | None:
    """No check, because the code that uses the value checks it."""
    return None


@dataclass(frozen=True)
class Key:
    """A key that decides the picture. Without a `default`, the file must have the key."""

    check: Check
    default: Any = REQUIRED


@dataclass(frozen=True)
class Rules:
    """The keys of one config file. `not_read` maps each key that changes no picture here to the reason."""

    read: Mapping[str, Key]
    not_read: Mapping[str, str]


_BOOKKEEPING = {
    "_class_name": "checked by itself",
    "_diffusers_version": "which version wrote the file",
    "_name_or_path": "where the file came from",
}
_TRAINING = "of the training or of the text model alone"

TRANSFORMER = Rules(
    read={
        "hidden_size": Key(whole(1)),
        "num_hidden_layers": Key(whole(1, 1024)),
        "num_attention_heads": Key(whole(1)),
        "num_key_value_heads": Key(whole(1)),
        "head_dim": Key(whole(2)),
        "intermediate_size": Key(whole(1)),
        "vocab_size": Key(whole(1)),
        "latent_channel": Key(whole(1), 48),
        "latent_patch_size": Key(whole(1), 2),
        "patch_latent_dim": Key(whole(1), 192),
        "hidden_act": Key(one_of("silu", "relu2"), "silu"),
        "attention_bias": Key(one_of(False), False),
        "qk_norm_for_text": Key(flag, True),
        "use_und_k_norm_for_gen": Key(flag, False),
        "rms_norm_eps": Key(number(1e-12, 1e-2), 1e-6),
        "rope_theta": Key(number(1, 1e12), 5000000.0),
        "rope_axes_dim": Key(optional(numbers(whole(1))), None),
        "rope_scaling": Key(anything, None),
        "timestep_scale": Key(number(1e-6, 1), 0.001),
        "base_fps": Key(number(1, 1000), 24),
        "enable_fps_modulation": Key(flag, True),
        "unified_3d_mrope_reset_spatial_ids": Key(flag, True),
        "unified_3d_mrope_temporal_modality_margin": Key(whole(0), 15000),
        "action_gen": Key(flag, False),
        "action_dim": Key(optional(whole(1)), None),
        "num_embodiment_domains": Key(whole(1), 32),
        "sound_gen": Key(flag, False),
        "sound_dim": Key(optional(whole(1)), None),
        "sound_latent_fps": Key(number(1, 1000), 25.0),
        # These keys decide the picture in NVIDIA's framework. diffusers supports only one value of each.
        "qk_norm_for_diffusion": Key(one_of(True), True),
        "use_moe": Key(one_of(True), True),
        "video_temporal_causal": Key(one_of(False), False),
        "temporal_compression_factor": Key(one_of(4), 4),
        "joint_attn_implementation": Key(one_of("two_way"), "two_way"),
        "position_embedding_type": Key(one_of("unified_3d_mrope"), "unified_3d_mrope"),
    },
    not_read={
        **_BOOKKEEPING,
        "attention_dropout": _TRAINING,
        "freeze_und": _TRAINING,
        "initializer_range": _TRAINING,
        "max_action_dim": "action_dim says it",
        "max_position_embeddings": "the positions are computed, there is no table of them",
        "model_type": "the class says it",
        "architectures": "the class says it",
        "backbone_type": "hidden_act and the norms say it",
        "qk_norm": "qk_norm_for_text and the class say it",
        "temporal_compression_factor_sound": "the sound tokenizer says it",
        "dtype": "model.dtype says it",
        "torch_dtype": "model.dtype says it",
        "transformers_version": "which version wrote the file",
        "use_cache": "text keys and values are always kept",
        "tie_word_embeddings": "lm_head is not read",
    },
)

VAE = Rules(
    read={
        "base_dim": Key(whole(1), 96),
        "decoder_base_dim": Key(optional(whole(1)), None),
        "z_dim": Key(whole(1)),
        "dim_mult": Key(numbers(whole(1, 1024), at_least=1), [1, 2, 4, 4]),
        "num_res_blocks": Key(whole(1, 64), 2),
        "attn_scales": Key(one_of([]), []),
        "temperal_downsample": Key(numbers(flag), [False, True, True]),
        "is_residual": Key(flag, False),
        "in_channels": Key(whole(1), 3),
        "out_channels": Key(whole(1), 3),
        "patch_size": Key(optional(whole(1)), None),
        "scale_factor_temporal": Key(optional(whole(1)), None),
        "scale_factor_spatial": Key(optional(whole(1)), None),
        "latents_mean": Key(numbers(number(-1e4, 1e4))),
        "latents_std": Key(numbers(number(1e-4, 1e4))),
    },
    not_read={
        **_BOOKKEEPING,
        "dropout": _TRAINING,
        "clip_output": "diffusers' decoder clamps the picture always",
        "dtype": "model.vae_dtype says it",
        "torch_dtype": "model.vae_dtype says it",
    },
)

_HEARING = "of the encoder, which is not read: no task hears anything"
# The keys of diffusers' `Cosmos3AVAEAudioTokenizer`, which raises for most other values.
SOUND_TOKENIZER = Rules(
    read={
        "model_type": Key(one_of("autoencoder_v2"), "autoencoder_v2"),
        "sampling_rate": Key(one_of(SAMPLE_RATE), SAMPLE_RATE),
        "vocoder_input_dim": Key(whole(1), 64),
        "dec_dim": Key(whole(1), 320),
        "dec_c_mults": Key(one_of(list(MULTIPLES)), list(MULTIPLES)),
        "dec_strides": Key(one_of(list(STRIDES)), list(STRIDES)),
        "dec_out_channels": Key(one_of(CHANNELS), CHANNELS),
        "hop_size": Key(one_of(HOP, None), None),
        "dec_type": Key(one_of("oobleck"), "oobleck"),
        "dec_use_snake": Key(one_of(True), True),
        "dec_final_tanh": Key(one_of(False), False),
        "dec_anti_aliasing": Key(one_of(False), False),
        "dec_use_nearest_upsample": Key(one_of(False), False),
        "dec_use_tanh_at_final": Key(one_of(False), False),
        "activation": Key(one_of("snakebeta"), "snakebeta"),
        "snake_logscale": Key(one_of(True), True),
        "anti_aliasing": Key(one_of(False), False),
        "latent_mean": Key(one_of(None), None),
        "latent_std": Key(one_of(None), None),
    },
    not_read={
        **_BOOKKEEPING,
        **dict.fromkeys(
            (
                *("use_wav_as_input", "normalize_volume", "input_channels", "stereo", "causal", "padding_mode"),
                *("enc_type", "enc_dim", "enc_intermediate_dim", "enc_num_layers", "enc_num_blocks", "enc_n_fft"),
                *("enc_hop_length", "enc_latent_dim", "enc_c_mults", "enc_strides", "enc_identity_init"),
                *("enc_use_snake", "encoder_enabled", "bottleneck_type", "bottleneck"),
            ),
            _HEARING,
        ),
        "use_cuda_kernel": "PyTorch's kernels are used",
        "dtype": "model.vae_dtype says it",
        "torch_dtype": "model.vae_dtype says it",
    },
)

SCHEDULER = Rules(
    read={
        "num_train_timesteps": Key(one_of(1000), 1000),
        "prediction_type": Key(one_of("flow_prediction")),
        "use_flow_sigmas": Key(one_of(True)),
        "use_karras_sigmas": Key(flag, False),
        "use_exponential_sigmas": Key(one_of(False, None), False),
        "use_beta_sigmas": Key(one_of(False, None), False),
        "flow_shift": Key(number(0.01, 1000), 1.0),
        "use_dynamic_shifting": Key(one_of(False), False),
        "shift_terminal": Key(one_of(None), None),
        "sigma_min": Key(optional(number(1e-6, 1e6)), None),
        "sigma_max": Key(optional(number(1e-6, 1e6)), None),
        "final_sigmas_type": Key(one_of("zero"), "zero"),
        "solver_order": Key(whole(1, 3), 2),
        "solver_type": Key(one_of("bh1", "bh2"), "bh2"),
        "solver_p": Key(one_of(None), None),
        "predict_x0": Key(one_of(True), True),
        "thresholding": Key(one_of(False), False),
        "lower_order_final": Key(flag, True),
        "disable_corrector": Key(numbers(whole(0)), []),
        "timestep_spacing": Key(one_of("linspace", "leading", "trailing"), "linspace"),
        "rescale_betas_zero_snr": Key(one_of(False), False),
    },
    not_read={
        **_BOOKKEEPING,
        "beta_start": "flow sigmas have no betas",
        "beta_end": "flow sigmas have no betas",
        "beta_schedule": "flow sigmas have no betas",
        "trained_betas": "flow sigmas have no betas",
        "dynamic_thresholding_ratio": "of thresholding, which is off",
        "sample_max_value": "of thresholding, which is off",
        "time_shift_type": "of dynamic shifting, which is off",
        "steps_offset": "of timesteps that flow sigmas replace",
        "use_native_flow_schedule": "the class says it",
    },
)

# The keys of diffusers' `FlowMatchEulerDiscreteScheduler`, with the few noise levels of a distilled checkpoint.
DISTILLED_SCHEDULER = Rules(
    read={
        "num_train_timesteps": Key(one_of(1000), 1000),
        "shift": Key(one_of(1.0, 1), 1.0),
        "stochastic_sampling": Key(one_of(True)),
        "use_dynamic_shifting": Key(one_of(False), False),
        "shift_terminal": Key(one_of(None), None),
        "invert_sigmas": Key(one_of(False), False),
        "use_karras_sigmas": Key(one_of(False, None), False),
        "use_exponential_sigmas": Key(one_of(False, None), False),
        "use_beta_sigmas": Key(one_of(False, None), False),
        "fixed_step_sampler_config": Key(optional(settings), None),
    },
    not_read={
        **_BOOKKEEPING,
        "base_shift": "of dynamic shifting, which is off",
        "max_shift": "of dynamic shifting, which is off",
        "base_image_seq_len": "of dynamic shifting, which is off",
        "max_image_seq_len": "of dynamic shifting, which is off",
        "time_shift_type": "of dynamic shifting, which is off",
        "fixed_step_requires_explicit_sigmas": "the noise levels are always given",
    },
)
# Noise levels are fractions of noise, from the first step to the last step.
NOISE_LEVELS = numbers(number(1e-4, 1), at_least=1)
# NVIDIA's framework writes the noise levels of fixed steps into these keys.
FIXED_STEPS = Rules(
    read={"sample_type": Key(one_of("sde")), "t_list": Key(optional(numbers(number(0, 1), at_least=1)), None)},
    not_read={"num_train_timesteps": "the scheduler's own says it"},
)

INDEX = Rules(
    read={
        "default_use_system_prompt": Key(flag, True),
        "use_native_flow_schedule": Key(flag, False),
        "native_flow_shift": Key(optional(number(0.01, 1000)), None),
    },
    not_read={
        **_BOOKKEEPING,
        "enable_safety_checker": "no guardrail model is run here",
        "safety_checker": "no guardrail model is run here",
        "sound_tokenizer": "read where task.sound asks for it",
        "vision_encoder": "no task here answers questions about pictures",
        "is_distilled": "checked by itself",
    },
)


@dataclass(frozen=True)
class Read:
    """A config as it is used: the value of every key of the rules, and the file's keys that are not read."""

    values: Mapping[str, Any]
    not_read: tuple[str, ...]
    strangers: tuple[str, ...]


def apply(rules: Rules, config: Mapping[str, Any], file: object) -> Read:
    """The values of `config`, the content of `file`, with defaults for keys that it lacks.

    Raises:
        Refusal: a value is not supported, a required key is missing, or the checkpoint is quantized.
    """
    refuse_quantized(config, file)
    values = {}
    for name, key in rules.read.items():
        if name not in config:
            if key.default is REQUIRED:
                raise Refusal(
                    what=f"{file} has no {name}",
                    why="the picture depends on it, and there is no value to assume",
                    works="the file as it was published",
                )
            values[name] = key.default
            continue
        values[name] = config[name]
        if why := key.check(config[name]):
            raise Refusal(
                what=f"{file} says {name}: {clipped(config[name])}",
                why=why,
                works="the file as it was published",
            )
    others = [name for name in config if name not in rules.read]
    return Read(
        values=values,
        not_read=tuple(name for name in others if name in rules.not_read),
        strangers=tuple(printable(name) for name in others if name not in rules.not_read),
    )


def clipped(value: Any) -> str:
    """`value` as Python writes it, cut if it is long."""
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


def refuse_quantized(config: Mapping[str, Any], file: object) -> None:
    """Raise Refusal if `config` describes quantized weights. The refusal names the method."""
    for name in ("quantization_config", "quantization", "compression_config", "hf_quant_config"):
        if config.get(name):
            raise quantized(f"{file} has a {name}", _method(config[name]))


def quantized(what: str, method: str) -> Refusal:
    """The refusal of quantized weights."""
    return Refusal(
        what=f"{what}: the weights are quantized ({method})",
        why="only float32, bfloat16 and float16 weights are run here; others would be taken for plain numbers",
        works="the unquantized checkpoint: of a repository with an fp8 revision, its revision main",
    )


def _method(config: Any) -> str:
    if not isinstance(config, Mapping):
        return str(config)[:40]
    found = [str(config[key]) for key in ("quant_method", "quant_type", "quant_algo", "bits") if key in config]
    return " ".join(found) or "a method that it does not name"


def check_transformer(values: Mapping[str, Any], file: object) -> None:
    """Raise Refusal if the values of a transformer's config contradict each other."""
    for what, why in _misfits(values):
        raise Refusal(what=f"{file} says {what}", why=why, works="the file as it was published")


def _misfits(v: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    heads, keys = v["num_attention_heads"], v["num_key_value_heads"]
    if heads % keys:
        yield (
            f"num_attention_heads: {heads} and num_key_value_heads: {keys}",
            f"{heads} query heads do not divide into groups over {keys} key/value heads",
        )
    if v["head_dim"] % 2:
        yield f"head_dim: {v['head_dim']}", "rotary positions turn pairs of channels"
    patch, channels = v["latent_patch_size"], v["latent_channel"]
    if v["patch_latent_dim"] != channels * patch**2:
        yield (
            f"patch_latent_dim: {v['patch_latent_dim']}",
            f"a token of {patch} x {patch} latents of {channels} channels has {channels * patch**2} values",
        )
    for name in ("action", "sound"):
        if v[f"{name}_gen"] and v[f"{name}_dim"] is None:
            yield f"{name}_gen: true without {name}_dim", f"the heads for {name} need a width"
    scaling = v["rope_scaling"]
    if scaling is not None:
        yield from _rope_scaling(scaling)
    axes = rope_axes(v)
    half = v["head_dim"] // 2
    if len(axes) != 3 or sum(axes) != half:
        yield (
            f"rotary axes {list(axes)} with head_dim: {v['head_dim']}",
            f"time, rows and columns share the {half} frequencies of a head, so the three must add up to {half}",
        )
    elif 3 * max(axes[1:]) > half:
        yield (
            f"rotary axes {list(axes)} with head_dim: {v['head_dim']}",
            f"rows and columns take every third of the {half} frequencies, which are {half // 3} each at most",
        )


def rope_axes(values: Mapping[str, Any]) -> tuple[int, ...]:
    """How many rotary frequencies time, rows and columns have, by the keys that diffusers reads."""
    scaling = values["rope_scaling"] or {}
    return tuple(values["rope_axes_dim"] or scaling.get("mrope_section", (24, 20, 20)))


ROPE_SCALING_KEYS = {"rope_type", "type", "mrope_interleaved", "mrope_section", "rope_theta"}


def _rope_scaling(scaling: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(scaling, Mapping):
        yield f"rope_scaling: {scaling!r}", "it must be a list of settings, or null"
        return
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "mrope"):
        yield f"rope_scaling.rope_type: {kind}", "only unscaled rotary positions are run here"
    if scaling.get("mrope_interleaved", True) is not True:
        yield "rope_scaling.mrope_interleaved: false", "the frequencies of time, rows and columns are interleaved"
    unknown = sorted(str(key) for key in scaling if key not in ROPE_SCALING_KEYS)
    if unknown:
        yield f"rope_scaling with {', '.join(unknown)}", "nothing here knows how that scales the positions"
    section = scaling.get("mrope_section")
    if section is not None and numbers(whole(1))(section):
        yield f"rope_scaling.mrope_section: {section}", "it must be a list of three whole numbers"
