"""Writes a checkpoint of random weights in a published layout, tensor by tensor, at any size.

A cluster, a disk and a command line can then be tried before 33 or 135 GB are downloaded. The checkpoint has a
small tokenizer of the same kind, because the real tokenizer cannot be made up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import Cosmos3AVAEAudioTokenizer
from torch import Tensor

from cosmos3_pipeline.checkpoint.files import INDEX as MODEL_INDEX
from cosmos3_pipeline.checkpoint.files import MODULAR_INDEX
from cosmos3_pipeline.checkpoint.stored import WEIGHTS
from cosmos3_pipeline.checkpoint.weights import transformer_weights, vae_weights
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.models.layouts import LATENTS_MEAN, LATENTS_STD, Layout
from cosmos3_pipeline.models.random_weights import plain_tensor, sound_tensor, vae_tensor
from cosmos3_pipeline.models.sound import new_sound_tokenizer
from cosmos3_pipeline.models.toy_tokenizer import make_tokenizer, save_tokenizer

# diffusers cuts saved models into shards of this size. A small model gets smaller shards, so that it has several
# shards and an index too.
SHARD_BYTES = 5 * 10**9
SMALL_SHARD_BYTES = 10**6
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
NEGATIVE_PROMPT = {
    "subjects": [{"description": "figures that melt into each other"}],
    "lighting": "flat and flickering",
    "aesthetics": "blurry, noisy, oversaturated",
    "cinematography": "a camera that shakes",
    "temporal_caption": "frames that jump \u2014 nothing moves as it would",
}


# Small sizes for components that nothing here reads: the sound tokenizer's encoder and the vision encoder.
SMALL_SOUND = {"enc_dim": 8}
SMALL_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
SMALL_VISION_DEEPSTACK = [0, 1]
# Projections of attention and MLP, in both pathways. The quantized checkpoints store them in few bits.
QUANTIZED = ("_proj.weight", "to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight", "to_add_out.weight")
INT4_PER_WORD = 8


@dataclass(frozen=True)
class Entry:
    """One tensor to write. `dtype` is safetensors' name for it. `blocks` makes the values, block by block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(
        cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, values: Callable[[], Iterable[Tensor]]
    ) -> Entry:
        """A tensor in `dtype`, converted from the fp32 blocks that `values` makes."""
        nbytes = math.prod(shape) * dtype.itemsize
        return cls(name, DTYPES[dtype], shape, nbytes, lambda: (block.to(dtype) for block in values()))

    @classmethod
    def plain(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
        return cls.of(name, shape, dtype, lambda: plain_tensor(name, shape))


def write_checkpoint(
    folder: Path,
    layout: Layout,
    *,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    sound_tokenizer: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    full_size: bool = False,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write a checkpoint of `layout` into the new `folder`. The bytes are the same every time.

    `transformer`, `vae` and `sound_tokenizer` are plain values, named as diffusers names them. A sound tokenizer
    is written if the transformer has a head for sound. With `full_size`, shards have the published size, and so
    have components that nothing here reads. `advance` is called with the bytes of each block that was written. One
    block is in memory at a time.

    Raises:
        Refusal: the VAE's numbers fit no Cosmos3 VAE, or the vocabulary is too small for the tokenizer.
    """
    sizes: dict[str, Any] = {"transformer": transformer, "vae": vae, "sound_tokenizer": sound_tokenizer}
    entries = component_entries(layout, **sizes, dtype=dtype, full_size=full_size)
    tokenizer = make_tokenizer(int(transformer["vocab_size"]), edge=layout.edge)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _configs(layout, **sizes, full_size=full_size).items():
        _write_json(folder / name, content)
    save_tokenizer(tokenizer, folder / "text_tokenizer", class_name=layout.tokenizer_class)
    for component, tensors in entries.items():
        largest = SHARD_BYTES if full_size or component != "transformer" else SMALL_SHARD_BYTES
        name = "model.safetensors" if component == "vision_encoder" else WEIGHTS
        _write_component(folder / component, tensors, name=name, shard_bytes=largest, advance=advance)


def component_entries(
    layout: Layout,
    *,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    sound_tokenizer: Mapping[str, Any] | None = None,
    dtype: torch.dtype,
    full_size: bool,
) -> dict[str, list[Entry]]:
    """The tensors of each component that has weights.

    Raises:
        Refusal: the number of latent channels is not that of the Wan2.2 VAE's statistics.
    """
    if vae["z_dim"] != len(LATENTS_MEAN):
        raise Refusal(
            what=f"model.vae.z_dim={vae['z_dim']} for a made-up model",
            why=f"the latents' mean and deviation are the Wan2.2 VAE's, which has {len(LATENTS_MEAN)} channels",
            works=f"model.vae.z_dim={len(LATENTS_MEAN)}",
        )
    entries: dict[str, list[Entry]] = {"transformer": [], "vae": []}
    for weight in transformer_weights(_transformer_config(layout, transformer, vae)):
        entries["transformer"] += _stored_as(layout, weight.name, weight.shape, dtype)
    for weight in vae_weights(vae):
        entries["vae"].append(_vae_entry(weight.name, weight.shape, dtype, int(vae["patch_size"])))
    if transformer.get("sound_gen"):
        for name, tensor in _sound_tokenizer(transformer, sound_tokenizer, full_size).state_dict().items():
            shape = tuple(tensor.shape)
            entries.setdefault("sound_tokenizer", []).append(
                Entry.of(name, shape, dtype, partial(sound_tensor, name, shape))
            )
    if layout.vision_encoder:
        state = _vision_encoder(full_size).state_dict()
        entries["vision_encoder"] = [
            Entry.plain(name, tuple(tensor.shape), dtype) for name, tensor in state.items()
        ]
    return entries


def _vae_entry(name: str, shape: tuple[int, ...], dtype: torch.dtype, patch_size: int) -> Entry:
    return Entry.of(name, shape, dtype, lambda: [vae_tensor(name, shape, patch_size=patch_size)])


def _stored_as(layout: Layout, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Entry]:
    """The tensors that store one weight of the transformer: the weight itself, or its quantized form."""
    method = (layout.quantization or {}).get("quant_method")
    if method is None or not name.startswith("layers.") or not name.endswith(QUANTIZED):
        return [Entry.plain(name, shape, dtype)]
    if method == "modelopt":
        fp8 = Entry(name, "F8_E4M3", shape, math.prod(shape), lambda: _as_fp8(name, shape))
        scales = [
            Entry.of(f"{name.removesuffix('.weight')}.{kind}", (), torch.float32, lambda: [torch.tensor([0.01])])
            for kind in ("weight_scale", "input_scale")
        ]
        return [fp8, *scales]
    words = (shape[1] // INT4_PER_WORD, shape[0])
    module = name.removesuffix(".weight")
    return [
        Entry(f"{module}.qweight", "I32", words, math.prod(words) * 4, lambda: [_words(words)]),
        Entry.plain(f"{module}.scales", (1, shape[0]), torch.float16),
    ]


def _as_fp8(name: str, shape: tuple[int, ...]) -> Iterable[Tensor]:
    return (block.to(torch.float8_e4m3fn).view(torch.uint8) for block in plain_tensor(name, shape))


def _words(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int32)


def shards_of(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    """The entries in order, cut into shards of at most `shard_bytes`. A larger tensor gets its own shard."""
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if shards[-1] and held + entry.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.nbytes
    return shards


def _write_component(
    folder: Path, entries: list[Entry], *, name: str, shard_bytes: int, advance: Callable[[int], None]
) -> None:
    """One file, or shards with an index, as diffusers writes them."""
    shards = shards_of(entries, shard_bytes)
    folder.mkdir(exist_ok=True)
    stem = name.removesuffix(".safetensors")
    names = (
        [name]
        if len(shards) == 1
        else [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / file, shard, advance)
    if len(shards) > 1:
        placed = {entry.name: file for file, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.nbytes for entry in entries)
        _write_json(folder / f"{name}.index.json", {"metadata": {"total_size": total}, "weight_map": placed})


def _write_safetensors(file: Path, entries: list[Entry], advance: Callable[[int], None]) -> None:
    """Write a safetensors file with one block in memory at a time. Its header needs only the sizes of tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in entries:
            for block in entry.blocks():
                stream.write(memoryview(block.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
                advance(block.nbytes)


def _transformer_config(layout: Layout, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
    channels, patch = int(vae["z_dim"]), int(transformer["latent_patch_size"])
    axes = rotary_axes(int(transformer["head_dim"]))
    own = {
        **transformer,
        "latent_channel": channels,
        "patch_latent_dim": channels * patch**2,
        "rope_axes_dim": axes,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": axes, "rope_type": "default"},
    }
    if layout.edge:
        own["rope_scaling"] = {"mrope_section": axes}
    elif layout.option != "toy_random":
        # The first release does not have these keys. Its rotary axes are in rope_scaling alone.
        for key in ("rope_axes_dim", "hidden_act", "use_und_k_norm_for_gen"):
            del own[key]
        own["hidden_act"] = transformer["hidden_act"]
    return {**layout.transformer, **own}


def rotary_axes(head_dim: int) -> list[int]:
    """The numbers of rotary frequencies of a head for time, rows and columns."""
    half = head_dim // 2
    spatial = half * 5 // 16  # 20 of 64 for rows and 20 for columns; time takes the rest
    return [half - 2 * spatial, spatial, spatial]


def _configs(
    layout: Layout,
    *,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    sound_tokenizer: Mapping[str, Any] | None,
    full_size: bool,
) -> dict[str, Any]:
    """The JSON files of the folder by their names."""
    version = layout.index["_diffusers_version"]
    index = {
        **layout.index,
        "scheduler": ["diffusers", layout.scheduler["_class_name"]],
        "text_tokenizer": ["transformers", layout.tokenizer_class],
        "transformer": ["diffusers", "Cosmos3OmniTransformer"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    config = _transformer_config(layout, transformer, vae)
    files: dict[str, Any] = {}
    if transformer.get("sound_gen"):
        index["sound_tokenizer"] = ["diffusers", "Cosmos3AVAEAudioTokenizer"]
        tokenizer = _sound_tokenizer(transformer, sound_tokenizer, full_size)
        own = {key: value for key, value in tokenizer.config.items() if not key.startswith("_")}
        named = {"_class_name": "Cosmos3AVAEAudioTokenizer", "_diffusers_version": version}
        files["sound_tokenizer/config.json"] = {**named, **own}
    if layout.vision_encoder:
        index["vision_encoder"] = ["transformers", "Qwen3VLVisionModel"]
        files["vision_encoder/config.json"] = _vision_encoder(full_size).config.to_dict()
    if layout.quantization is not None:
        config["quantization_config"] = layout.quantization
    if layout.quantization is not None and layout.quantization["quant_method"] == "modelopt":
        files["hf_quant_config.json"] = {"producer": layout.quantization["producer"], "quant_algo": "FP8"}
    if layout.modular_index is not None:
        files[MODULAR_INDEX] = layout.modular_index
    if layout.negative_prompt:
        files["assets/negative_prompt.json"] = NEGATIVE_PROMPT
    return {
        **files,
        **layout.root,
        MODEL_INDEX: index,
        "transformer/config.json": config,
        "scheduler/scheduler_config.json": layout.scheduler,
        "vae/config.json": {
            "_class_name": "AutoencoderKLWan",
            "_diffusers_version": version,
            **vae,
            "clip_output": False,
            "dropout": 0.0,
            "latents_mean": LATENTS_MEAN,
            "latents_std": LATENTS_STD,
        },
    }


def _sound_tokenizer(
    transformer: Mapping[str, Any], sizes: Mapping[str, Any] | None, full_size: bool
) -> Cosmos3AVAEAudioTokenizer:
    """The sound tokenizer for `transformer`, on the meta device. Without `sizes` it has the published size."""
    own = {**(sizes or {}), **({} if full_size else SMALL_SOUND), "vocoder_input_dim": transformer["sound_dim"]}
    with torch.device("meta"):
        return new_sound_tokenizer(own)


def _vision_encoder(full_size: bool) -> Any:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    small = {**SMALL_VISION, "deepstack_visual_indexes": SMALL_VISION_DEEPSTACK}
    with torch.device("meta"):
        return Qwen3VLVisionModel(Qwen3VLVisionConfig(**({} if full_size else small)))


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
