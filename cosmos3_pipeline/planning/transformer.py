"""The size of a `Cosmos3OmniTransformer` from its config alone: its dimensions and the bytes of its weights.

Source: diffusers `models/transformers/transformer_cosmos3.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.checkpoint.weights import (
    Part,
    Slab,
    Weight,
    generation_parts,
    slabs_of,
    transformer_weights,
)

FP32_BYTES = 4


@dataclass(frozen=True)
class TransformerSize:
    """The dimensions that decide weights and work."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    gated: bool
    norms_text_keys_again: bool  # vision attends to other text keys than the text itself does
    weights: tuple[Weight, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], *, latent_channels: int) -> TransformerSize:
        """The size by the transformer's config, which has diffusers' names."""
        return cls(
            hidden_size=int(config["hidden_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=int(config["num_attention_heads"]),
            num_key_value_heads=int(config["num_key_value_heads"]),
            head_dim=int(config["head_dim"]),
            intermediate_size=int(config["intermediate_size"]),
            gated=config.get("hidden_act", "silu") == "silu",
            norms_text_keys_again=bool(config.get("use_und_k_norm_for_gen"))
            and not config.get("qk_norm_for_text", True),
            weights=transformer_weights({**config, "latent_channel": latent_channels}),
        )

    @property
    def projection_width(self) -> int:
        """Channels of queries, keys and values together."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def pathway_matrix_elements(self) -> int:
        """Weights of the matrix products of one pathway (text or vision) in one layer."""
        mlp = (3 if self.gated else 2) * self.hidden_size * self.intermediate_size
        return self.hidden_size * (self.projection_width + self.num_attention_heads * self.head_dim) + mlp

    @property
    def elements(self) -> int:
        """All weights."""
        return sum(weight.elements for weight in self.weights)

    def slabs(self, part: Part) -> tuple[Slab, ...]:
        """The layers of a pathway, as they lie in memory."""
        return slabs_of(self.weights, part)

    def outside_bytes(self, element_bytes: int, modalities: Collection[str]) -> int:
        """Bytes of the generation pathway's weights outside its layers, for `modalities`."""
        parts = generation_parts(modalities)
        outside = (w for w in self.weights if w.part in parts and w.layer is None)
        return sum(w.bytes_in(element_bytes) for w in outside)
