"""One pathway (understanding or generation) through one decoder layer of a diffusers `Cosmos3OmniTransformer`.

The layer's own modules compute. The caller computes the attention between `project` and `finish`.
Source: `Cosmos3VLTextMoTDecoderLayer.forward` in diffusers `models/transformers/transformer_cosmos3.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_pipeline.denoise.shards import even_rows, mlp_parts
from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.fused import transformer as _fused  # noqa: F401 # declares its ops


def is_fused(norm: Any, x: Tensor) -> bool:
    """Whether the fused accelerator kernel can compute `norm`: it must not be an identity or of another dtype."""
    return not takes_host_path(x) and not isinstance(norm, nn.Identity) and bool(norm.weight.dtype == x.dtype)


def normalise(norm: Any, x: Tensor) -> Tensor:
    """RMS norm over the last dim, in one pass over memory if a kernel exists. `nn.Identity` means no norm.

    On a CPU in fp32 PyTorch's kernel computes in one pass what diffusers' module does in six. In half precision
    diffusers' module also rounds between its passes, so this module is called there.
    """
    if isinstance(norm, nn.Identity):
        return x
    if is_fused(norm, x) and x.ndim == 2:
        fused: Tensor = torch.ops.cosmos3.rms_norm(x, norm.weight, norm.eps)
        return fused
    if x.dtype == norm.weight.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    normed = norm(x)
    assert isinstance(normed, Tensor)
    return normed


@dataclass(frozen=True)
class Pathway:
    """The modules of one pathway through one decoder layer."""

    input_norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_norm: nn.Module
    key_norm: nn.Module
    output: nn.Module
    mlp_norm: nn.Module
    mlp: Any  # not nn.Module, because the code also reads its linear layers
    # Only in the text pathway of some models: the norm of the text's keys when vision attends to them.
    key_norm_for_vision: nn.Module | None = None

    @classmethod
    def understanding(cls, layer: Any) -> Self:
        attn = layer.self_attn
        return cls(
            input_norm=layer.input_layernorm,
            query=attn.to_q,
            key=attn.to_k,
            value=attn.to_v,
            query_norm=attn.norm_q,
            key_norm=attn.norm_k,
            output=attn.to_out,
            mlp_norm=layer.post_attention_layernorm,
            mlp=layer.mlp,
            key_norm_for_vision=attn.k_norm_und_for_gen,
        )

    @classmethod
    def generation(cls, layer: Any) -> Self:
        attn = layer.self_attn
        return cls(
            input_norm=layer.input_layernorm_moe_gen,
            query=attn.add_q_proj,
            key=attn.add_k_proj,
            value=attn.add_v_proj,
            query_norm=attn.norm_added_q,
            key_norm=attn.norm_added_k,
            output=attn.to_add_out,
            mlp_norm=layer.post_attention_layernorm_moe_gen,
            mlp=layer.mlp_moe_gen,
        )

    def project(self, hidden: Tensor, head_dim: int) -> Iterator[Tensor]:
        """Yield queries, keys, values [n, heads, D] of `hidden` [n, hidden], before their norms, one by one."""
        return self._project(hidden, head_dim, self.query, self.key, self.value)

    def project_keys(self, hidden: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Only keys and values; the modules of queries, output and MLP may be missing."""
        key, value = self._project(hidden, head_dim, self.key, self.value)
        return key, value

    def _project(self, hidden: Tensor, head_dim: int, *projections: nn.Module) -> Iterator[Tensor]:
        normed = normalise(self.input_norm, hidden)
        for project in projections:
            yield project(normed).unflatten(-1, (-1, head_dim))

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection of `attended` [n, heads, D], then MLP, each added to `hidden` [n, hidden]."""
        hidden, normed = self._add_and_norm(hidden, self.output(attended.flatten(-2)))
        if not takes_host_path(hidden):
            return hidden.add_(self._gated(normed) if self._has_gate else self.mlp(normed))
        parts = mlp_parts(hidden.shape[0], self.mlp.up_proj.out_features * hidden.element_size())
        rows = list(even_rows(hidden.shape[0], parts))
        # The MLP treats each row alone, so it can run on blocks of rows, which are added in place.
        for residual, part in zip(hidden.split(rows), normed.split(rows), strict=True):
            residual += self.mlp(part)
        return hidden

    def _add_and_norm(self, hidden: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of both [n, hidden], and the norm of this sum, which is the MLP's input."""
        norm: Any = self.mlp_norm
        if is_fused(norm, hidden):
            total, normed = torch.ops.cosmos3.add_rms_norm(hidden, branch, norm.weight, norm.eps)
            return total, normed
        hidden = hidden + branch
        return hidden, normalise(norm, hidden)

    @property
    def _has_gate(self) -> bool:
        return hasattr(self.mlp, "gate_proj")

    def _gated(self, normed: Tensor) -> Tensor:
        """The MLP of `normed` [n, hidden]; the product of gate and up overwrites the gate's memory."""
        gate, up = self.mlp.gate_proj(normed), self.mlp.up_proj(normed)
        torch.ops.cosmos3.silu_mul(gate, up)
        del up
        made: Tensor = self.mlp.down_proj(gate)
        return made
