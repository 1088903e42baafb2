"""A checkpoint with one thing wrong is refused with file and tensor named: never a traceback, never a picture."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import drop, edit, make_layout, open_whole
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.models import tokenizer as tokenizer_module
from cosmos3_pipeline.models.layouts import LAYOUTS
from cosmos3_pipeline.models.make_checkpoint import numbers_of

TRANSFORMER = "transformer/config.json"
VAE = "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER = "text_tokenizer/tokenizer_config.json"
SPECIAL_TOKENS = "text_tokenizer/special_tokens_map.json"
TEMPLATE = "text_tokenizer/chat_template.jinja"
QUERY = "layers.0.self_attn.to_q.weight"
CONV = "decoder.conv_in.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layout(tmp_path_factory.mktemp("whole") / "nano", "nano", dtype=torch.float32)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "nano"))


def test_the_folder_that_is_damaged_below_opens(folder: Path) -> None:
    open_whole(folder)


def weights(folder: Path, tensor: str) -> Path:
    """The file that holds `tensor` of the transformer or of the VAE."""
    for component in ("transformer", "vae"):
        for file in sorted((folder / component).glob("*.safetensors")):
            if f'"{tensor}"'.encode() in file.read_bytes()[:200_000]:
                return file
    raise AssertionError(tensor)


def change(folder: Path, tensor: str, to: Callable[[Tensor], Tensor | None]) -> None:
    """Put `to(tensor)` in the place of a tensor, or take it away."""
    file = weights(folder, tensor)
    tensors = load_file(file)
    changed = to(tensors.pop(tensor))
    if changed is not None:
        tensors[tensor] = changed.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return put


def header(folder: Path, tensor: str, rewrite: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of the file that holds `tensor`, the rest staying as it is."""
    file = weights(folder, tensor)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    rewritten = rewrite(content)
    encoded = rewritten if isinstance(rewritten, bytes) else json.dumps(content).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])


def in_header(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[QUERY].update({key: value})


def index_of(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"


def in_index(change_map: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads(index_of(folder).read_text())
        change_map(content["weight_map"])
        index_of(folder).write_text(json.dumps(content))

    return damage


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def config(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, **changes)


def tensor(name: str, to: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    return lambda folder: change(folder, name, to)


def text(file: str, content: str | bytes) -> Callable[[Path], object]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(raw)


def without(file: str, *keys: str) -> Callable[[Path], None]:
    return lambda folder: drop(folder / file, *keys)


def template(words: str) -> Callable[[Path], object]:
    return text(TEMPLATE, words)


Damage = Callable[[Path], object]
# Each changes a whole folder. The refusal contains the words, which name the file or the tensor.
FILES: dict[str, tuple[Damage, str]] = {
    "index a pipe": (lambda f: pipe(f / "model_index.json"), "model_index.json is a pipe"),
    "config a device": (lambda f: device(f / TRANSFORMER), "config.json is a device"),
    "config a folder": (lambda f: ((f / VAE).unlink(), (f / VAE).mkdir()), "config.json is a folder"),
    "config a loop": (lambda f: loop(f / VAE), "config.json cannot be read"),
    "shard a device": (lambda f: device(weights(f, QUERY)), "is a device"),
    "shard a pipe": (lambda f: pipe(weights(f, CONV)), "is a pipe"),
    "tokenizer endless": (lambda f: device(f / "text_tokenizer/tokenizer.json"), "tokenizer.json is a device"),
    "template a pipe": (lambda f: pipe(f / TEMPLATE), "is a pipe"),
    "config not utf-8": (text(TRANSFORMER, b"\xff\xfe{}"), "no UTF-8"),
    "config empty": (text(VAE, ""), "not JSON"),
    "config a list": (text(SCHEDULER, "[]"), "one value of type list"),
    "config too deep": (text(VAE, "[" * 100_000), "not JSON"),
    "index a number": (text("model_index.json", "3"), "one value of type int"),
    "config huge": (lambda f: os.truncate(f / VAE, 2**33), "no real one has more"),
}
WEIGHT_FILES: dict[str, tuple[Damage, str]] = {
    "cut": (lambda f: os.truncate(weights(f, QUERY), 5000), "not whole"),
    "cut by one byte": (
        lambda f: os.truncate(weights(f, QUERY), weights(f, QUERY).stat().st_size - 1),
        "its header speaks of",
    ),
    "one byte more": (
        lambda f: weights(f, QUERY).write_bytes(weights(f, QUERY).read_bytes() + b"0"),
        "its header speaks of",
    ),
    "empty": (lambda f: os.truncate(weights(f, CONV), 0), "within its header"),
    "missing": (lambda f: weights(f, QUERY).unlink(), "3 of 4 weight files"),
    "header no json": (lambda f: header(f, QUERY, lambda c: b"{not json}"), "header is not JSON"),
    "header a list": (lambda f: header(f, QUERY, lambda c: b"[1, 2]"), "not a list of tensors"),
    "header too long": (
        lambda f: weights(f, QUERY).write_bytes((2**62).to_bytes(8, "little") + b"{}"),
        "within its header",
    ),
    "entry no offsets": (lambda f: header(f, QUERY, lambda c: c[QUERY].pop("data_offsets")), "does not say where"),
    "entry no dict": (lambda f: header(f, QUERY, lambda c: c.update({QUERY: 1})), "does not say where"),
    "negative shape": (lambda f: header(f, QUERY, in_header("shape", [-128, 64])), "does not say where"),
    "shape of floats": (lambda f: header(f, QUERY, in_header("shape", [128.0, 64])), "does not say where"),
    "unknown dtype": (lambda f: header(f, QUERY, in_header("dtype", "Q7")), "the dtype Q7"),
    "dtype of other size": (lambda f: header(f, QUERY, in_header("dtype", "F64")), "are not F64"),
    "overlap": (lambda f: header(f, QUERY, in_header("data_offsets", [0, 32768])), "not whole"),
    "index without map": (lambda f: drop(index_of(f), "weight_map"), "names no weight file"),
    "index map a list": (lambda f: edit(index_of(f), weight_map=[1]), "names no weight file"),
    "index path up": (in_index(lambda m: m.update({QUERY: "../vae/x.safetensors"})), "no file of this folder"),
    "index to no name": (in_index(lambda m: m.update({QUERY: "a\x00.safetensors"})), "cannot be read"),
    "index to half a letter": (in_index(lambda m: m.update({QUERY: "\ud800.safetensors"})), "cannot be read"),
    "dtype a list": (lambda f: header(f, QUERY, in_header("dtype", ["F32"])), "the dtype"),
    "index to a number": (in_index(lambda m: m.update({QUERY: 5})), "no file of this folder"),
    "index other file": (
        in_index(lambda m: m.update({QUERY: next(v for v in m.values() if v != m[QUERY])})),
        f"{QUERY}",
    ),
    "index unknown tensor": (in_index(lambda m: m.update(nothing=m[QUERY])), "places nothing in"),
    "index lacks tensor": (in_index(lambda m: m.pop(QUERY)), f"holds {QUERY}"),
    "bin only": (
        lambda f: weights(f, CONV).rename(f / "vae/diffusion_pytorch_model.bin"),
        "diffusion_pytorch_model.bin, not safetensors",
    ),
    "bin shards": (
        lambda f: (
            index_of(f).rename(f / "transformer/diffusion_pytorch_model.bin.index.json"),
            [file.rename(file.with_suffix(".bin")) for file in (f / "transformer").glob("*.safetensors")],
        ),
        "not safetensors",
    ),
    "another variant": (
        lambda f: weights(f, CONV).rename(f / "vae/diffusion_pytorch_model.fp16.safetensors"),
        "only diffusion_pytorch_model.fp16.safetensors",
    ),
}
TENSORS: dict[str, tuple[Damage, str]] = {
    "nan": (tensor(QUERY, with_value(float("nan"))), QUERY),
    "inf": (tensor("proj_in.bias", with_value(float("inf"))), "proj_in.bias"),
    "minus inf": (tensor("embed_tokens.weight", with_value(float("-inf"))), "embed_tokens.weight"),
    "nan in the vae": (tensor(CONV, with_value(float("nan"))), CONV),
    "nan in the encoder": (tensor("encoder.conv_in.weight", with_value(float("nan"))), "encoder.conv_in.weight"),
    "overflows": (tensor(CONV, with_value(3e38)), CONV),
    "nan in bfloat16": (tensor(QUERY, lambda t: with_value(float("nan"))(t).bfloat16()), QUERY),
    "int8": (tensor(QUERY, lambda t: t.to(torch.int8)), f"{QUERY} .* is I8"),
    "int32": (tensor(CONV, lambda t: t.to(torch.int32)), f"{CONV} .* is I32"),
    "bool": (tensor("norm_moe_gen.weight", lambda t: t > 0), "is BOOL"),
    "float8": (tensor(QUERY, lambda t: t.to(torch.float8_e4m3fn)), "quantized .F8_E4M3"),
    "missing": (tensor("layers.2.mlp_moe_gen.up_proj.weight", lambda t: None), "layers.2.mlp_moe_gen.up_proj"),
    "missing in the vae": (tensor("decoder.norm_out.gamma", lambda t: None), "has no decoder.norm_out.gamma"),
    "norm of one value": (tensor("layers.0.input_layernorm.weight", lambda t: t[:1]), "has the shape .1"),
    "norm of one value, vae": (tensor("decoder.norm_out.gamma", lambda t: t[:1]), "decoder.norm_out.gamma"),
    "bias of one value": (tensor("proj_out.bias", lambda t: t[:1]), "proj_out.bias"),
    "flat": (tensor("proj_in.weight", lambda t: t.flatten()), "proj_in.weight"),
    "one dim more": (tensor("proj_in.weight", lambda t: t[None]), "proj_in.weight"),
    "one row less": (tensor("embed_tokens.weight", lambda t: t[:-1]), "embed_tokens.weight"),
}


def add_tensor(name: str) -> Damage:
    def damage(folder: Path) -> None:
        file = weights(folder, "encoder.conv_in.weight")
        save_file({**load_file(file), name: torch.zeros(3)}, file)

    return damage


NUMBERS: dict[str, tuple[Damage, str]] = {
    "extra tensor": (add_tensor("decoder.extra.weight"), "holds decoder.extra.weight"),
    "scale tensor": (add_tensor("decoder.conv_in.weight_scale"), "quantized"),
    "fewer layers": (config(TRANSFORMER, num_hidden_layers=3), "holds layers.3"),
    "more layers": (config(TRANSFORMER, num_hidden_layers=5), "has no layers.4"),
    "no layers": (config(TRANSFORMER, num_hidden_layers=0), "num_hidden_layers: 0"),
    "layers as words": (config(TRANSFORMER, num_hidden_layers="4"), "num_hidden_layers: '4'"),
    "layers as float": (config(TRANSFORMER, num_hidden_layers=4.0), "num_hidden_layers: 4.0"),
    "layers null": (config(TRANSFORMER, num_hidden_layers=None), "num_hidden_layers: None"),
    "layers true": (config(TRANSFORMER, num_hidden_layers=True), "num_hidden_layers: True"),
    "no hidden size": (without(TRANSFORMER, "hidden_size"), "has no hidden_size"),
    "other hidden size": (config(TRANSFORMER, hidden_size=96), "has the shape"),
    "heads and width swapped": (
        config(TRANSFORMER, num_attention_heads=16, head_dim=8),
        "rotary axes|has the shape",
    ),
    "other key heads": (config(TRANSFORMER, num_key_value_heads=8), "to_k.weight"),
    "heads that do not divide": (config(TRANSFORMER, num_key_value_heads=3), "do not divide"),
    "odd head width": (config(TRANSFORMER, head_dim=15), "pairs of channels"),
    "other vocabulary": (config(TRANSFORMER, vocab_size=500), "embed_tokens.weight"),
    "other mlp": (config(TRANSFORMER, intermediate_size=96), "has the shape"),
    "other activation": (config(TRANSFORMER, hidden_act="gelu"), "hidden_act: 'gelu'"),
    "activation without gate": (config(TRANSFORMER, hidden_act="relu2"), "gate_proj"),
    "text norms off": (config(TRANSFORMER, qk_norm_for_text=False), "norm_q|norm_k"),
    "biases": (config(TRANSFORMER, attention_bias=True), "attention_bias: True"),
    "epsilon zero": (config(TRANSFORMER, rms_norm_eps=0), "rms_norm_eps: 0"),
    "epsilon infinite": (text(TRANSFORMER, '{"rms_norm_eps": Infinity}'), "names the class|config.json"),
    "theta negative": (config(TRANSFORMER, rope_theta=-1.0), "rope_theta"),
    "axes that do not fill": (config(TRANSFORMER, rope_axes_dim=[3, 2, 2], rope_scaling=None), "add up to 8"),
    "axes too many": (config(TRANSFORMER, rope_axes_dim=[2, 2, 2, 2], rope_scaling=None), "add up to 8"),
    "axes out of room": (config(TRANSFORMER, rope_axes_dim=[1, 4, 3], rope_scaling=None), "every third"),
    "axes no list": (config(TRANSFORMER, rope_axes_dim="4,2,2"), "rope_axes_dim"),
    "rope scaled": (config(TRANSFORMER, rope_scaling={"rope_type": "yarn", "mrope_section": [4, 2, 2]}), "yarn"),
    "rope a list": (config(TRANSFORMER, rope_scaling=[4, 2, 2]), "rope_scaling"),
    "rope not interleaved": (
        config(TRANSFORMER, rope_scaling={"mrope_interleaved": False, "mrope_section": [4, 2, 2]}),
        "mrope_interleaved",
    ),
    "section of words": (config(TRANSFORMER, rope_scaling={"mrope_section": "4,2,2"}), "mrope_section"),
    "other patch": (config(TRANSFORMER, latent_patch_size=1), "patch_latent_dim"),
    "patch zero": (config(TRANSFORMER, latent_patch_size=0), "latent_patch_size: 0"),
    "other patch width": (config(TRANSFORMER, patch_latent_dim=191), "patch_latent_dim: 191"),
    "other channels": (config(TRANSFORMER, latent_channel=16, patch_latent_dim=64), "latent_channel: 16"),
    "timestep scale zero": (config(TRANSFORMER, timestep_scale=0.0), "timestep_scale"),
    "fps zero": (config(TRANSFORMER, base_fps=0), "base_fps"),
    "fps modulation a word": (config(TRANSFORMER, enable_fps_modulation="yes"), "enable_fps_modulation"),
    "causal video": (config(TRANSFORMER, video_temporal_causal=True), "video_temporal_causal: True"),
    "no experts": (config(TRANSFORMER, use_moe=False), "use_moe: False"),
    "other attention": (config(TRANSFORMER, joint_attn_implementation="three_way"), "three_way"),
    "other positions": (config(TRANSFORMER, position_embedding_type="learned"), "learned"),
    "action without width": (config(TRANSFORMER, action_dim=None), "action_gen: true without action_dim"),
    "quantized": (config(TRANSFORMER, quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes"),
    "quantized vae": (config(VAE, quantization_config={"quant_method": "torchao"}), "torchao"),
    "quantized index": (config("model_index.json", quantization_config={"bits": 4}), "quantized"),
    "other class": (config(TRANSFORMER, _class_name="Cosmos2Transformer"), "Cosmos2Transformer"),
    "no class": (without(VAE, "_class_name"), "names the class None"),
    "class in the index": (config("model_index.json", vae=["diffusers", "AutoencoderKL"]), "AutoencoderKL"),
    "class of the user": (
        config("model_index.json", transformer=["my_module", "MyTransformer"]),
        "MyTransformer",
    ),
    "layers without end": (config(TRANSFORMER, num_hidden_layers=2_000_000_000), "num_hidden_layers"),
    "a number of 5000 digits": (text(TRANSFORMER, '{"hidden_size": ' + "9" * 5000 + "}"), "not JSON"),
    "a number of 400 digits": (
        text(TRANSFORMER, '{"_class_name": "Cosmos3OmniTransformer", "base_fps": ' + "9" * 400 + "}"),
        "base_fps|hidden_size",
    ),
    "fps without end": (config(TRANSFORMER, base_fps=1e300), "base_fps"),
    "epsilon of a size": (config(TRANSFORMER, rms_norm_eps=1e300), "rms_norm_eps"),
    "timesteps too far": (config(TRANSFORMER, timestep_scale=1e38), "timestep_scale"),
    "other compression": (config(TRANSFORMER, temporal_compression_factor=8), "temporal_compression_factor: 8"),
    "rope with a factor": (
        config(TRANSFORMER, rope_scaling={"factor": 4.0, "mrope_section": [4, 2, 2]}),
        "factor",
    ),
    "scheduler of the index": (
        config("model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        "DDIMScheduler",
    ),
    "scheduler of no class": (config("model_index.json", scheduler=[]), "says scheduler"),
    "vae of no class": (config("model_index.json", vae=[]), "says vae"),
    "tokenizer of the index": (
        config("model_index.json", text_tokenizer=["transformers", "T5Tokenizer"]),
        "T5Tokenizer",
    ),
    "library of the user": (
        config("model_index.json", transformer=["my_module", "Cosmos3OmniTransformer"]),
        "my_module",
    ),
    "distilled sigmas": (config("model_index.json", distilled_sigmas=[1.0]), "is distilled"),
    "distilled blocks": (
        lambda f: edit(f / "modular_model_index.json", _blocks_class_name="Cosmos3DistilledBlocks"),
        "is distilled",
    ),
    "quantized vae by its file": (text("vae/hf_quant_config.json", "{}"), "vae/hf_quant_config.json"),
    "distilled modular index": (
        lambda f: edit(f / "modular_model_index.json", is_distilled=True),
        "is distilled",
    ),
    "native schedule a word": (
        config("model_index.json", use_native_flow_schedule="yes"),
        "use_native_flow_schedule",
    ),
    "native shift zero": (config("model_index.json", native_flow_shift=0), "native_flow_shift: 0"),
    "system prompt a word": (
        config("model_index.json", default_use_system_prompt="no"),
        "default_use_system_prompt",
    ),
}
VAE_NUMBERS: dict[str, tuple[Damage, str]] = {
    "std zero": (config(VAE, latents_std=[0.0] * 48), "latents_std"),
    "std negative": (config(VAE, latents_std=[-1.0] * 48), "latents_std"),
    "std nan": (config(VAE, latents_std=[float("nan")] * 48), "latents_std"),
    "std short": (config(VAE, latents_std=[1.0] * 16), "16 values in latents_std"),
    "std missing": (without(VAE, "latents_std"), "has no latents_std"),
    "std null": (config(VAE, latents_std=None), "latents_std"),
    "std too small": (config(VAE, latents_std=[1e-300] * 48), "latents_std"),
    "std too large": (config(VAE, latents_std=[1e300] * 48), "latents_std"),
    "mean infinite": (config(VAE, latents_mean=[float("inf")] * 48), "latents_mean"),
    "mean a word": (config(VAE, latents_mean="zero"), "latents_mean"),
    "mean short": (config(VAE, latents_mean=[0.0]), "1 values in latents_mean"),
    "other z": (config(VAE, z_dim=16, latents_mean=[0.0] * 16, latents_std=[1.0] * 16), "z_dim: 16"),
    "other width": (config(VAE, base_dim=32), "has the shape"),
    "other decoder width": (config(VAE, decoder_base_dim=None, base_dim=16), "has the shape"),
    "other multipliers": (config(VAE, dim_mult=[1, 2, 4, 8]), "vae/config.json says"),
    "no multipliers": (config(VAE, dim_mult=[]), "dim_mult: "),
    "fewer blocks": (config(VAE, num_res_blocks=1), "holds"),
    "attention": (config(VAE, attn_scales=[1.0]), "attn_scales"),
    "no time": (config(VAE, temperal_downsample=[False, False, False]), "scale_factor_temporal"),
    "time three times": (config(VAE, temperal_downsample=[True, True, True]), "vae"),
    "time too short": (config(VAE, temperal_downsample=[True]), "temperal_downsample"),
    "plain shortcuts": (config(VAE, is_residual=False), "holds|has no"),
    "other patch": (config(VAE, patch_size=1), "scale_factor_spatial"),
    "patch that does not divide": (config(VAE, patch_size=5), "patch_size"),
    "other spatial": (config(VAE, scale_factor_spatial=8), "scale_factor_spatial: 8"),
    "other temporal": (config(VAE, scale_factor_temporal=8), "scale_factor_temporal: 8"),
    "odd channels": (config(VAE, in_channels=13), "in_channels=13"),
}
SCHEDULES: dict[str, tuple[Damage, str]] = {
    "epsilon": (config(SCHEDULER, prediction_type="epsilon"), "prediction_type: 'epsilon'"),
    "no prediction type": (without(SCHEDULER, "prediction_type"), "has no prediction_type"),
    "v prediction": (config(SCHEDULER, prediction_type="v_prediction"), "v_prediction"),
    "no flow sigmas": (config(SCHEDULER, use_flow_sigmas=False), "use_flow_sigmas: False"),
    "shift zero": (config(SCHEDULER, flow_shift=0), "flow_shift: 0"),
    "shift a word": (config(SCHEDULER, flow_shift="ten"), "flow_shift: 'ten'"),
    "shift nan": (config(SCHEDULER, flow_shift=float("nan")), "flow_shift"),
    "other steps": (config(SCHEDULER, num_train_timesteps=100), "num_train_timesteps: 100"),
    "beta sigmas": (config(SCHEDULER, use_beta_sigmas=True), "use_beta_sigmas"),
    "exponential sigmas": (config(SCHEDULER, use_exponential_sigmas=True), "use_exponential_sigmas"),
    "dynamic shift": (config(SCHEDULER, use_dynamic_shifting=True), "use_dynamic_shifting"),
    "terminal shift": (config(SCHEDULER, shift_terminal=0.1), "shift_terminal"),
    "last sigma": (config(SCHEDULER, final_sigmas_type="sigma_min"), "final_sigmas_type"),
    "order four": (config(SCHEDULER, solver_order=4), "solver_order: 4"),
    "other solver": (config(SCHEDULER, solver_type="midpoint"), "solver_type"),
    "predicts noise": (config(SCHEDULER, predict_x0=False), "predict_x0"),
    "thresholds": (config(SCHEDULER, thresholding=True), "thresholding"),
    "spacing": (config(SCHEDULER, timestep_spacing="log"), "timestep_spacing"),
    "other class": (config(SCHEDULER, _class_name="DDIMScheduler"), "DDIMScheduler|as scheduler/ itself says"),
    "no class": (without(SCHEDULER, "_class_name"), "names None|UniPCMultistepScheduler"),
    "sigma max zero": (config(SCHEDULER, sigma_max=0), "sigma_max"),
}
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "no vocabulary": (
        lambda f: [(f / "text_tokenizer" / n).unlink() for n in ("tokenizer.json", "vocab.json", "merges.txt")],
        "has no vocabulary",
    ),
    "tokenizer not json": (text("text_tokenizer/tokenizer.json", "{"), "cannot be loaded"),
    "tokenizer empty": (text("text_tokenizer/tokenizer.json", "{}"), "cannot be loaded"),
    "config not json": (text(TOKENIZER, "{"), "not JSON"),
    "no added tokens": (
        lambda f: edit(f / "text_tokenizer/tokenizer.json", added_tokens=[]),
        "letter by letter",
    ),
    "other class": (config(TOKENIZER, tokenizer_class="NoSuchTokenizer"), "NoSuchTokenizer"),
    "end a word": (config(TOKENIZER, eos_token="kite"), "ends a sentence with|no end of sentence"),
    "template that cuts": (
        template("<|im_start|>{{ messages[-1]['content'][:8] }}<|im_end|>"),
        "words of the prompt",
    ),
    "own code": (config(TOKENIZER, auto_map={"AutoTokenizer": "x.Y"}), "auto_map"),
    "template empty": (template(""), "has no chat template"),
    "template blank": (template("  \n"), "has no chat template"),
    "template missing": (lambda f: (f / TEMPLATE).unlink(), "has no chat template"),
    "template broken": (template("{% for m in"), "cannot be written"),
    "template raises": (template("{{ raise_exception('no') }}"), "cannot be written"),
    "template without words": (template("<|im_start|>user<|im_end|>"), "words of the prompt"),
    "template of the system alone": (
        template("{{ messages[0]['content'] }}"),
        "words of the prompt|as one token each",
    ),
    "template that repeats": (
        template("<|im_start|>{{ messages[-1]['content'] * 200 }}<|im_end|>"),
        "tokens for one sentence",
    ),
    "template not utf-8": (text(TEMPLATE, b"\xff\xff"), "no UTF-8"),
    "too many words": (config(TRANSFORMER, vocab_size=511), "embed_tokens.weight"),
    "no end": (
        lambda f: (drop(f / TOKENIZER, "eos_token"), (f / SPECIAL_TOKENS).unlink(missing_ok=True)),
        "has no eos_token",
    ),
}
NEGATIVE = "assets/negative_prompt.json"


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere.json")


NEGATIVES: dict[str, tuple[Damage, str]] = {
    "not json": (text(NEGATIVE, "{"), "negative_prompt.json is not whole"),
    "a list": (text(NEGATIVE, "[]"), "one value of type list"),
    "a pipe": (lambda f: pipe(f / NEGATIVE), "is a pipe"),
    "a link to nothing": (lambda f: dangling(f / NEGATIVE), "a link to a file that is not there"),
    "huge": (text(NEGATIVE, json.dumps({"a": "b" * 3_000_000})), "no real one has more"),
    "its folder a file": (
        lambda f: (shutil.rmtree(f / "assets"), (f / "assets").write_text("")),
        "cannot be read",
    ),
}
GROUPS = {
    "negative prompt": NEGATIVES,
    "file": FILES,
    "weights": WEIGHT_FILES,
    "tensor": TENSORS,
    "transformer": NUMBERS,
    "vae": VAE_NUMBERS,
    "scheduler": SCHEDULES,
    "tokenizer": TOKENIZERS,
}


def cases() -> Iterator[Any]:
    for group, damages in GROUPS.items():
        for name, (damage, said) in damages.items():
            yield pytest.param(damage, said, id=f"{group}: {name}")


@pytest.mark.parametrize(("damage", "said"), list(cases()))
def test_it_is_refused(damage: Damage, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "WRITE_SECONDS", 1.0)
    damage(folder)
    with pytest.raises(Refusal, match=said) as refused:
        open_whole(folder)
    problem = refused.value.problem
    assert problem.what and problem.why and problem.works


def test_a_template_that_does_not_end_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would go on taking memory until the machine has none."""
    monkeypatch.setattr(tokenizer_module, "WRITE_SECONDS", 0.5)
    (folder / TEMPLATE).write_text(LONG)
    before = threading.active_count()
    with pytest.raises(Refusal, match="did not end"):
        open_whole(folder)
    assert threading.active_count() == before


@pytest.mark.long
def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = make_layout(tmp_path / "nano", "nano")
    numbers = {**numbers_of(LAYOUTS["nano"], full_size=False)["transformer"], "vocab_size": 300}
    smaller = make_layout(tmp_path / "small", "nano", transformer=numbers)
    shutil.rmtree(smaller / "text_tokenizer")
    shutil.copytree(folder / "text_tokenizer", smaller / "text_tokenizer")
    with pytest.raises(Refusal, match=r"writes the token .*\n.*vocab_size: 300"):
        open_whole(smaller)
