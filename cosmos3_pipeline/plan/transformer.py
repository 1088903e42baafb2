"""The size of a `Cosmos3OmniTransformer` from its config alone: how many weights, kept in which dtype.

Source: diffusers `models/transformers/transformer_cosmos3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.denoise.cost import TIMESTEP_CHANNELS

FP32_BYTES = 4


@dataclass(frozen=True)
class TransformerSize:
    """The dimensions that decide weights and work; `latent_channels` are those of the VAE."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    gated: bool
    qk_norm_for_text: bool
    patch_channels: int
    extra_elements: int  # heads for sound and action, which some checkpoints carry and no task here uses
    extra_norms_per_layer: int

    @classmethod
    def of(cls, config: Mapping[str, Any], *, latent_channels: int) -> TransformerSize:
        """From the values of the transformer's config, by diffusers' names."""
        hidden = int(config["hidden_size"])
        text_norm = bool(config["qk_norm_for_text"])
        return cls(
            hidden_size=hidden,
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=int(config["num_attention_heads"]),
            num_key_value_heads=int(config["num_key_value_heads"]),
            head_dim=int(config["head_dim"]),
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            gated=str(config["hidden_act"]).rpartition(".")[2] == "silu",
            qk_norm_for_text=text_norm,
            patch_channels=latent_channels * int(config["latent_patch_size"]) ** 2,
            extra_elements=_heads_of_other_modalities(config, hidden),
            extra_norms_per_layer=int(config.get("use_und_k_norm_for_gen", False) and not text_norm),
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
    def layer_elements(self) -> int:
        """Weights of one decoder layer: both pathways and their norms."""
        head_norms = 2 + 2 * self.qk_norm_for_text + self.extra_norms_per_layer
        return 2 * self.pathway_matrix_elements + 4 * self.hidden_size + head_norms * self.head_dim

    @property
    def timestep_elements(self) -> int:
        """Weights of `time_embedder`, which diffusers keeps in fp32."""
        return (TIMESTEP_CHANNELS + self.hidden_size + 2) * self.hidden_size

    @property
    def elements(self) -> int:
        """All weights."""
        embeddings = 2 * self.vocab_size * self.hidden_size
        patches = 2 * self.patch_channels * self.hidden_size + self.hidden_size + self.patch_channels
        layers = self.num_hidden_layers * self.layer_elements
        return embeddings + patches + layers + 2 * self.hidden_size + self.timestep_elements + self.extra_elements

    def weight_bytes(self, element_bytes: int) -> int:
        """Bytes of all weights where an element has `element_bytes`, the timestep embedder in fp32 as loaded."""
        return (self.elements - self.timestep_elements) * element_bytes + self.timestep_elements * FP32_BYTES


def _heads_of_other_modalities(config: Mapping[str, Any], hidden: int) -> int:
    found = 0
    if config.get("action_gen"):
        width, domains = int(config["action_dim"]), int(config["num_embodiment_domains"])
        found += domains * (2 * width * hidden + width + hidden) + hidden
    if config.get("sound_gen"):
        width = int(config["sound_dim"])
        found += 2 * width * hidden + width + 2 * hidden
    return found
