"""What the ranks of one axis send each other while they denoise: rows for heads, heads for rows, predictions.

Everything is one collective, an all-to-all with uneven parts, so any token count travels unpadded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import Cosmos3OmniTransformer
from torch import Tensor

from cosmos3_pipeline.denoise.shards import HeadShare, head_shares
from cosmos3_pipeline.distributed.comm import Comm


class Exchange:
    """The ranks of one axis of the mesh, talking through `comm`; alone (None), a rank sends and copies nothing."""

    def __init__(self, comm: Comm | None = None) -> None:
        self._comm = comm
        self.ranks = 1 if comm is None else comm.size
        self.rank = 0 if comm is None else comm.rank

    def all_to_all(self, parts: Sequence[Tensor], received: Sequence[int]) -> Tensor:
        """Send `parts[r]` (any shape) to rank r; returns the elements from all ranks, in rank order, flat.

        `received[r]` is the number of elements that rank r sends here: every rank can compute it.
        """
        assert self._comm is not None
        out = parts[self.rank].new_empty(sum(received))
        slots = out.split(list(received))
        peers = [rank for rank in range(self.ranks) if rank != self.rank]
        pending = self._comm.exchange(
            sends=[(parts[peer], peer) for peer in peers if parts[peer].numel()],
            receives=[(slots[peer], peer) for peer in peers if received[peer]],
        )
        slots[self.rank].copy_(parts[self.rank].reshape(-1))
        pending.wait()
        return out

    def gather_rows(self, own: Tensor, rows: Sequence[int]) -> Tensor:
        """The rows [n, ...] of every rank, in rank order, on every rank; rank r holds `rows[r]` of them."""
        if self.ranks == 1:
            return own
        width = own.shape[1:].numel()
        flat = self.all_to_all([own] * self.ranks, [n * width for n in rows])
        return flat.view(sum(rows), *own.shape[1:])

    def heads_for_rows(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[int], shares: Sequence[HeadShare]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From all heads of own rows [n, heads, D] to own heads of all rows [sum(rows), own heads, D]."""
        if self.ranks == 1:
            return query, key, value
        own = shares[self.rank]
        heads = self._own_heads(
            [
                torch.cat([query[:, share.queries], key[:, share.keys], value[:, share.keys]], dim=1)
                for share in shares
            ],
            rows,
        )
        queries, keys, values = heads.split([own.num_queries, own.num_keys, own.num_keys], dim=1)
        return queries, keys, values

    def keys_for_rows(
        self, key: Tensor, value: Tensor, rows: Sequence[int], shares: Sequence[HeadShare]
    ) -> tuple[Tensor, Tensor]:
        """As `heads_for_rows`, where nothing asks: key/value heads alone."""
        if self.ranks == 1:
            return key, value
        parts = [torch.cat([key[:, share.keys], value[:, share.keys]], dim=1) for share in shares]
        keys, values = self._own_heads(parts, rows).chunk(2, dim=1)
        return keys, values

    def _own_heads(self, parts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Send `parts[r]` [n, heads of r, D] of own rows to rank r; returns own heads of all rows."""
        heads, head_dim = parts[self.rank].shape[1:]
        flat = self.all_to_all(parts, [n * heads * head_dim for n in rows])
        return flat.view(sum(rows), heads, head_dim)

    def rows_for_heads(self, attended: Tensor, rows: Sequence[int]) -> Tensor:
        """From own heads of all rows [sum(rows), own heads, D] back to all heads of own rows [n, heads, D]."""
        if self.ranks == 1:
            return attended
        n, (heads, head_dim) = rows[self.rank], attended.shape[1:]
        flat = self.all_to_all(attended.split(list(rows)), [n * heads * head_dim] * self.ranks)
        return flat.view(self.ranks, n, heads, head_dim).transpose(0, 1).reshape(n, self.ranks * heads, head_dim)


@dataclass(frozen=True)
class OwnHeads:
    """The heads of every rank of the axis, and this rank's."""

    shares: tuple[HeadShare, ...]
    own: HeadShare

    @classmethod
    def of(cls, transformer: Cosmos3OmniTransformer, exchange: Exchange) -> OwnHeads:
        config = transformer.config
        shares = head_shares(config.num_attention_heads, config.num_key_value_heads, exchange.ranks)
        return cls(shares, shares[exchange.rank])
