"""Messages between the ranks of a sequence during denoising: rows to heads, heads to rows, and predictions.

Every exchange is an all-to-all with uneven shards, so no token count needs padding. One message takes a query both
to its row of the grid and to its head's rank, and one message brings the result back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from diffusers import Cosmos3OmniTransformer
from torch import Tensor

from cosmos3_pipeline.denoise.attention_kernel import merged
from cosmos3_pipeline.denoise.shards import Grid, HeadShare, head_shares
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.distributed.mesh import SEQUENCE, RankMesh


class Exchange:
    """The ranks that exchange messages through `comm`; with None, this rank is alone and sends and copies nothing.

    `members` are ranks of `comm`, by default all of its ranks. `grid` is the layout of these ranks over the
    sequence, by default one group.
    """

    def __init__(
        self, comm: Comm | None = None, grid: Grid | None = None, members: Sequence[int] | None = None
    ) -> None:
        self._comm = comm
        self._members = range(1 if comm is None else comm.size) if members is None else members
        self.ranks = len(self._members)
        self.rank = self._members.index(0 if comm is None else comm.rank)
        self.grid = grid or Grid(ulysses=self.ranks)

    @classmethod
    def over_sequence(cls, mesh: RankMesh | None) -> Self:
        """The ranks of `mesh` that share a sequence with this one."""
        if mesh is None:
            return cls()
        rows, columns = mesh.cp
        return cls(mesh.comm(SEQUENCE), Grid(mesh.ulysses, rows, columns))

    @property
    def of_text(self) -> Exchange:
        """The ranks that encode a prompt together: each group of the grid encodes it, because that sends less."""
        return Exchange(self._comm, members=[self._members[rank] for rank in self.grid.group(self.rank)])

    def _start(self, parts: Mapping[int, Tensor], received: Mapping[int, int]) -> Callable[[], Tensor]:
        """Start to send `parts[r]` (any shape) to each rank r; this rank's own entry is copied.

        The returned function waits, and returns the elements from all ranks, flat, in the order of `received`.
        `received[r]` is the number of elements that rank r sends to this rank: every rank can compute it.
        """
        assert self._comm is not None
        out = parts[self.rank].new_empty(sum(received.values()))
        slots = dict(zip(received, out.split(list(received.values())), strict=True))
        peers = [rank for rank in parts if rank != self.rank]
        pending = self._comm.exchange(
            sends=[(parts[peer], self._members[peer]) for peer in peers if parts[peer].numel()],
            receives=[(slots[peer], self._members[peer]) for peer in peers if received[peer]],
        )
        slots[self.rank].copy_(parts[self.rank].reshape(-1))

        def arrived() -> Tensor:
            pending.wait()
            return out

        return arrived

    def gather_rows(self, own: Tensor, rows: Sequence[int]) -> Tensor:
        """All rows [sum(rows), ...] in rank order, on every rank; rank r passes its `rows[r]` rows as `own`."""
        if self.ranks == 1:
            return own
        width = own.shape[1:].numel()
        parts = dict.fromkeys(range(self.ranks), own)
        flat = self._start(parts, {rank: rows[rank] * width for rank in parts})()
        return flat.view(sum(rows), *own.shape[1:])

    def heads_for_rows(
        self, projected: Iterable[Tensor], rows: Sequence[int], shares: Sequence[HeadShare]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange all heads of this rank's rows for this rank's heads of many rows.

        Queries arrive from this rank's row of the grid, keys and values from its column. `projected` yields
        queries, keys and values [n, heads, D] in this order. In one group all three go to the same ranks, in one
        message. In a larger grid they go to different ranks. Then queries are in flight while keys and values are
        projected.
        """
        if self.ranks == 1:
            query, key, value = projected
            return query, key, value
        own, making = shares[self.rank], iter(projected)
        query = next(making)
        if self.grid.groups == 1:
            key, value = making
            heads = self._start_heads(
                lambda to: torch.cat([query[:, to.queries], key[:, to.keys], value[:, to.keys]], dim=1),
                range(self.ranks),
                rows,
                shares,
            )()
            queries, keys, values = heads.split([own.num_queries, own.num_keys, own.num_keys], dim=1)
            return queries, keys, values
        asking = self._start_heads(lambda to: query[:, to.queries], self.grid.row(self.rank), rows, shares)
        key, value = making
        keys, values = self.keys_for_rows(key, value, rows, shares)
        return asking(), keys, values

    def keys_for_rows(
        self, key: Tensor, value: Tensor, rows: Sequence[int], shares: Sequence[HeadShare]
    ) -> tuple[Tensor, Tensor]:
        """As `heads_for_rows`, for keys and values only."""
        if self.ranks == 1:
            return key, value
        heads = self._start_heads(
            lambda to: torch.cat([key[:, to.keys], value[:, to.keys]], dim=1),
            self.grid.column(self.rank),
            rows,
            shares,
        )
        keys, values = heads().chunk(2, dim=1)
        return keys, values

    def _start_heads(
        self,
        cut: Callable[[HeadShare], Tensor],
        ranks: Sequence[int],
        rows: Sequence[int],
        shares: Sequence[HeadShare],
    ) -> Callable[[], Tensor]:
        """Start to send each r of `ranks` the heads `cut(shares[r])` [n, heads, D], and to receive theirs."""
        parts = {rank: cut(shares[rank]) for rank in ranks}
        heads, head_dim = parts[self.rank].shape[1:]
        arrived = self._start(parts, {rank: rows[rank] * heads * head_dim for rank in ranks})
        return lambda: arrived().view(-1, heads, head_dim)

    def rows_for_heads(self, attended: Tensor, rows: Sequence[int], sums: Tensor | None = None) -> Tensor:
        """Exchange this rank's heads of its grid row for all heads of this rank's rows [n, heads, D].

        `attended` is [tokens of the grid row, this rank's heads, D]. With several columns each rank has attended
        to a subset of the keys only. Then `sums` [tokens of the grid row, this rank's heads] is the log-sum-exp
        that merges the partial results (see `partial_attention`). It is sent behind the heads in the same message.
        """
        if self.ranks == 1:
            return attended
        grid, n, head_dim = self.grid, rows[self.rank], attended.shape[-1]
        if sums is not None:
            tail = sums.contiguous().unsqueeze(-1).view(attended.dtype)
            attended = torch.cat([attended, tail], dim=-1)
        heads, width = attended.shape[1:]
        row = grid.row(self.rank)
        parts = dict(zip(row, attended.split([rows[rank] for rank in row]), strict=True))
        flat = self._start(parts, dict.fromkeys(row, n * heads * width))()
        found = flat.view(grid.columns, grid.ulysses, n, heads, width)
        if sums is None:
            whole = found[0]
        else:
            tails = found[..., head_dim:].contiguous().view(sums.dtype).squeeze(-1)
            whole = merged(found[..., :head_dim], tails)
        return whole.transpose(0, 1).reshape(n, grid.ulysses * heads, head_dim)


@dataclass(frozen=True)
class OwnHeads:
    """The head share of every rank of the exchange, and of this rank; groups of the grid have equal shares."""

    shares: tuple[HeadShare, ...]
    own: HeadShare

    @classmethod
    def of(cls, transformer: Cosmos3OmniTransformer, exchange: Exchange) -> OwnHeads:
        config, grid = transformer.config, exchange.grid
        shares = head_shares(config.num_attention_heads, config.num_key_value_heads, grid.ulysses) * grid.groups
        return cls(shares, shares[exchange.rank])
