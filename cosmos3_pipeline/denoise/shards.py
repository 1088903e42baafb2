"""Who holds what: tokens over all ranks of a sequence outside attention, heads and a grid inside it. No torch.

DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv:2309.14509), with uneven tokens and grouped key/value heads, within
Attention2D (arXiv:2503.15758).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

# Rows that stay together. On a CPU a BLAS multiplies fewer rows by another kernel, which sums in another order,
# and an activation over fewer elements falls out of the vector loop: with whole blocks, a token has the same
# bits in a shard as among all tokens.
BLOCK_ROWS = 4


def even_rows(rows: int, ranks: int) -> tuple[int, ...]:
    """Rows per rank, contiguous and in order: whole blocks, as even as they go, the last share the odd rows.

    No share is smaller than a block: with fewer blocks than ranks, the last ranks hold none.
    """
    blocks = max(rows // BLOCK_ROWS, 1)
    shares = [BLOCK_ROWS * (blocks // ranks + (rank < blocks % ranks)) for rank in range(ranks)]
    shares[min(blocks, ranks) - 1] += rows - BLOCK_ROWS * blocks
    return tuple(shares)


# On a CPU, an MLP intermediate of several MB is mapped, zeroed and unmapped by the allocator in every call,
# which costs up to a sixth of the MLP. Parts of about this size stay in the heap and the cache; parts of fewer
# rows would pay as much again for packing the weights.
MLP_PART_BYTES = 2**20
MLP_PART_ROWS = 128


def mlp_parts(rows: int, intermediate_bytes: int) -> int:
    """In how many parts a CPU computes the MLP of `rows` tokens, each with so many bytes of an intermediate."""
    return max(min(rows * intermediate_bytes // MLP_PART_BYTES, rows // MLP_PART_ROWS), 1)


def start_of(rows: tuple[int, ...], rank: int) -> int:
    """The first row of `rank`."""
    return sum(rows[:rank])


@dataclass(frozen=True)
class Grid:
    """The ranks of one sequence: `rows` x `columns` groups of `ulysses` ranks, which vary fastest, then columns.

    The tokens are cut over all ranks in this order. A rank attends with its own heads: those of the queries that
    its row holds, over the keys and values that its column holds and its column's part of the text. So each row
    has met each key once, and the partial results of a row's columns are merged on whoever holds the token.
    With one column nothing is merged, with one row every rank asks for the whole sequence.
    """

    ulysses: int = 1
    rows: int = 1
    columns: int = 1

    @property
    def groups(self) -> int:
        return self.rows * self.columns

    @property
    def ranks(self) -> int:
        return self.groups * self.ulysses

    def group(self, rank: int) -> range:
        """The ranks that exchange heads with `rank`, and encode the text with it."""
        first = rank - rank % self.ulysses
        return range(first, first + self.ulysses)

    def row(self, rank: int) -> range:
        """The ranks whose queries `rank` attends with."""
        ranks = self.columns * self.ulysses
        first = rank - rank % ranks
        return range(first, first + ranks)

    def column(self, rank: int) -> tuple[int, ...]:
        """The ranks whose keys and values `rank` attends to."""
        number, ranks = self.place(rank)[1], range(self.ranks)
        return tuple(other for other in ranks if self.place(other)[1] == number)

    def place(self, rank: int) -> tuple[int, int]:
        """The row and the column of `rank`."""
        return divmod(rank // self.ulysses, self.columns)

    def text(self, tokens: int, rank: int) -> slice:
        """Which of the `tokens` of a prompt `rank` attends to."""
        parts, column = even_rows(tokens, self.columns), self.place(rank)[1]
        return slice(start_of(parts, column), start_of(parts, column + 1))


@dataclass(frozen=True)
class HeadShare:
    """The heads with which one rank attends: its query heads and the key/value heads that those need.

    Query heads divide evenly. A key/value head goes to every rank with a query head of its group, so with
    fewer key/value heads than ranks several ranks get the same one.
    """

    queries: slice
    keys: slice
    key_of_query: tuple[int, ...]  # for each own query head, its key/value head counted within `keys`

    @property
    def num_queries(self) -> int:
        return int(self.queries.stop - self.queries.start)

    @property
    def num_keys(self) -> int:
        return int(self.keys.stop - self.keys.start)

    @property
    def sent_heads(self) -> int:
        """Heads in the message that brings this share: queries, keys, values."""
        return self.num_queries + self.sent_keys

    @property
    def sent_keys(self) -> int:
        """Heads in a message of keys and values alone."""
        return 2 * self.num_keys

    @property
    def grouped(self) -> bool:
        """Whether the query heads fall into equal consecutive groups, one per key/value head."""
        per_key, rest = divmod(self.num_queries, self.num_keys)
        return rest == 0 and self.key_of_query == tuple(i // per_key for i in range(self.num_queries))

    @property
    def equal_groups(self) -> tuple[tuple[slice, slice], ...]:
        """The query heads in runs of equal groups, each with its key/value heads: one run if `grouped`."""
        sizes = [self.key_of_query.count(key) for key in range(self.num_keys)]
        runs, query, key = [], 0, 0
        for size, alike in groupby(sizes):
            keys = len(list(alike))
            runs.append((slice(query, query + size * keys), slice(key, key + keys)))
            query, key = query + size * keys, key + keys
        return tuple(runs)


def head_shares(num_attention_heads: int, num_key_value_heads: int, ranks: int) -> tuple[HeadShare, ...]:
    """The share of each rank; `num_attention_heads` must divide by `ranks` and by `num_key_value_heads`."""
    each, group = num_attention_heads // ranks, num_attention_heads // num_key_value_heads
    shares = []
    for rank in range(ranks):
        queries = range(rank * each, (rank + 1) * each)
        first, last = queries[0] // group, queries[-1] // group
        shares.append(
            HeadShare(
                queries=slice(queries.start, queries.stop),
                keys=slice(first, last + 1),
                key_of_query=tuple(head // group - first for head in queries),
            )
        )
    return tuple(shares)
