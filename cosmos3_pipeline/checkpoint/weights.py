"""The tensors of a model, from its config alone: name, shape, and the part of a run that reads it.

This is the only table of tensors. The plan counts bytes with it, the checks compare a folder's files with it, the
loader reads by it, and random checkpoints are written from it. Tests compare it with diffusers' own modules.

Source: diffusers 0.42 `models/transformers/transformer_cosmos3.py`. The VAE's tensors are those of its programs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from cosmos3_pipeline.denoise.cost import TIMESTEP_CHANNELS
from cosmos3_pipeline.vae.program import program_for


class Part(StrEnum):
    """The part of a run that reads a tensor. The text pathway is read first, for the keys and values."""

    TEXT = "text"
    VISION = "vision"
    SOUND = "sound"
    ACTION = "action"
    ENCODER = "encoder"
    DECODER = "decoder"
    # `lm_head`, which writes words, and the text pathway of the last layer after its keys and values.
    NOTHING = "nothing"


VISION_ALONE = frozenset({"vision"})


def generation_parts(modalities: Collection[str]) -> tuple[Part, ...]:
    """The parts of a transformer that denoising these modalities reads. A run also reads the text pathway."""
    return tuple(part for part in (Part.VISION, Part.SOUND, Part.ACTION) if part.value in modalities)


@dataclass(frozen=True)
class Weight:
    """One tensor of a diffusers module's `state_dict()`. `keeps_fp32` is true if it stays fp32 in any model."""

    name: str
    shape: tuple[int, ...]
    part: Part
    keeps_fp32: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The number of the transformer's layer with this tensor; None for a tensor outside the layers."""
        first, _, rest = self.name.partition(".")
        return int(rest.partition(".")[0]) if first == "layers" else None

    def bytes_in(self, element_bytes: int) -> int:
        """Bytes of the tensor in a model whose elements have `element_bytes`."""
        return self.elements * (4 if self.keeps_fp32 else element_bytes)


def transformer_weights(config: Mapping[str, Any]) -> tuple[Weight, ...]:
    """The tensors of a `Cosmos3OmniTransformer`, in the order of its `state_dict()`, by its config's values."""
    return _transformer_weights(_Dimensions.of(config))


@dataclass(frozen=True)
class _Dimensions:
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    intermediate: int
    vocabulary: int
    patch: int  # elements of one vision token: a patch of all latent channels
    gated: bool
    text_norms: bool
    vision_norm_of_text_keys: bool
    action: tuple[int, int] | None  # width, domains
    sound: int | None  # width

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Dimensions:
        text_norms = bool(config.get("qk_norm_for_text", True))
        channels = int(config.get("latent_channel", 48))
        return cls(
            hidden=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            key_value_heads=int(config["num_key_value_heads"]),
            head=int(config["head_dim"]),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            patch=channels * int(config["latent_patch_size"]) ** 2,
            gated=config.get("hidden_act", "silu") == "silu",
            text_norms=text_norms,
            vision_norm_of_text_keys=bool(config.get("use_und_k_norm_for_gen")) and not text_norms,
            action=(int(config["action_dim"]), int(config.get("num_embodiment_domains", 32)))
            if config.get("action_gen")
            else None,
            sound=int(config["sound_dim"]) if config.get("sound_gen") else None,
        )


@cache
def _transformer_weights(d: _Dimensions) -> tuple[Weight, ...]:
    found: list[Weight] = []

    def add(part: Part, name: str, *shape: int, keeps_fp32: bool = False) -> None:
        found.append(Weight(name, shape, part, keeps_fp32))

    def linear(part: Part, name: str, outputs: int, inputs: int, *, bias: bool, keeps_fp32: bool = False) -> None:
        add(part, f"{name}.weight", outputs, inputs, keeps_fp32=keeps_fp32)
        if bias:
            add(part, f"{name}.bias", outputs, keeps_fp32=keeps_fp32)

    if d.action:
        add(Part.ACTION, "action_modality_embed", d.hidden)
    if d.sound:
        add(Part.SOUND, "audio_modality_embed", d.hidden)
    add(Part.TEXT, "embed_tokens.weight", d.vocabulary, d.hidden)
    for number in range(d.layers):
        _layer(d, f"layers.{number}", add, linear, last=number == d.layers - 1)
    add(Part.NOTHING, "norm.weight", d.hidden)
    add(Part.VISION, "norm_moe_gen.weight", d.hidden)
    linear(Part.NOTHING, "lm_head", d.vocabulary, d.hidden, bias=False)
    linear(Part.VISION, "proj_in", d.hidden, d.patch, bias=True)
    linear(Part.VISION, "proj_out", d.patch, d.hidden, bias=True)
    # diffusers keeps the time embedder in fp32 (`_keep_in_fp32_modules`).
    linear(Part.VISION, "time_embedder.linear_1", d.hidden, TIMESTEP_CHANNELS, bias=True, keeps_fp32=True)
    linear(Part.VISION, "time_embedder.linear_2", d.hidden, d.hidden, bias=True, keeps_fp32=True)
    if d.action:
        width, domains = d.action
        add(Part.ACTION, "action_proj_in.fc.weight", domains, width * d.hidden)
        add(Part.ACTION, "action_proj_in.bias.weight", domains, d.hidden)
        add(Part.ACTION, "action_proj_out.fc.weight", domains, width * d.hidden)
        add(Part.ACTION, "action_proj_out.bias.weight", domains, width)
    if d.sound:
        linear(Part.SOUND, "audio_proj_in", d.hidden, d.sound, bias=True)
        linear(Part.SOUND, "audio_proj_out", d.sound, d.hidden, bias=True)
    return tuple(found)


def _layer(d: _Dimensions, layer: str, add: Any, linear: Any, *, last: bool) -> None:
    """One decoder layer. In the last layer, nothing reads the text pathway beyond its keys and values."""
    after_keys = Part.NOTHING if last else Part.TEXT
    queries, keys = d.heads * d.head, d.key_value_heads * d.head
    attention = f"{layer}.self_attn"
    for part, (query, key, value, output), after in (
        (Part.TEXT, ("to_q", "to_k", "to_v", "to_out"), after_keys),
        (Part.VISION, ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), Part.VISION),
    ):
        linear(after, f"{attention}.{query}", queries, d.hidden, bias=False)
        linear(part, f"{attention}.{key}", keys, d.hidden, bias=False)
        linear(part, f"{attention}.{value}", keys, d.hidden, bias=False)
        linear(after, f"{attention}.{output}", d.hidden, queries, bias=False)
        if part is Part.TEXT:
            if d.text_norms:
                add(after_keys, f"{attention}.norm_q.weight", d.head)
                add(Part.TEXT, f"{attention}.norm_k.weight", d.head)
            if d.vision_norm_of_text_keys:
                add(Part.TEXT, f"{attention}.k_norm_und_for_gen.weight", d.head)
        else:
            add(Part.VISION, f"{attention}.norm_added_q.weight", d.head)
            add(Part.VISION, f"{attention}.norm_added_k.weight", d.head)
    for part, mlp in ((after_keys, "mlp"), (Part.VISION, "mlp_moe_gen")):
        if d.gated:
            linear(part, f"{layer}.{mlp}.gate_proj", d.intermediate, d.hidden, bias=False)
        linear(part, f"{layer}.{mlp}.up_proj", d.intermediate, d.hidden, bias=False)
        linear(part, f"{layer}.{mlp}.down_proj", d.hidden, d.intermediate, bias=False)
    add(Part.TEXT, f"{layer}.input_layernorm.weight", d.hidden)
    add(Part.VISION, f"{layer}.input_layernorm_moe_gen.weight", d.hidden)
    add(after_keys, f"{layer}.post_attention_layernorm.weight", d.hidden)
    add(Part.VISION, f"{layer}.post_attention_layernorm_moe_gen.weight", d.hidden)


# Elements. Each tensor in a slab begins at a boundary of at least 64 bytes in any dtype, as an allocation would.
SLAB_ALIGNMENT = 32


@dataclass(frozen=True)
class Slab:
    """The weights of one pathway in one layer, side by side in one piece of memory of `elements` elements.

    `starts` has the first element of each weight.
    """

    weights: tuple[Weight, ...]
    starts: tuple[int, ...]
    elements: int

    @classmethod
    def of(cls, weights: Iterable[Weight]) -> Slab:
        inside, starts, end = tuple(weights), [], 0
        for weight in inside:
            starts.append(end)
            end += _aligned(weight.elements, SLAB_ALIGNMENT)
        return cls(inside, tuple(starts), end)

    def share(self, ranks: int) -> int:
        """The elements that each of `ranks` holds. The last ranks hold some padding."""
        return _aligned(-(-self.elements // ranks), SLAB_ALIGNMENT)


def slabs_of(weights: Iterable[Weight], part: Part) -> tuple[Slab, ...]:
    """The slab of each layer of the pathway `part`, in the order of the layers."""
    layers: dict[int, list[Weight]] = {}
    for weight in weights:
        if weight.part is part and weight.layer is not None:
            layers.setdefault(weight.layer, []).append(weight)
    return tuple(Slab.of(layers[number]) for number in sorted(layers))


def _aligned(elements: int, alignment: int) -> int:
    return -(-elements // alignment) * alignment


def vae_weights(config: Mapping[str, Any]) -> tuple[Weight, ...]:
    """The tensors of an `AutoencoderKLWan`, encoder first, by its config's values.

    Raises:
        ProgramError: no VAE can have this config.
    """
    return tuple(_vae_weights(config))


def _vae_weights(config: Mapping[str, Any]) -> Iterator[Weight]:
    for direction, part in (("encode", Part.ENCODER), ("decode", Part.DECODER)):
        program = program_for(direction, config)  # type: ignore[arg-type] # both are a Direction
        yield from (Weight(weight.name, weight.shape, part) for weight in program.weights())
