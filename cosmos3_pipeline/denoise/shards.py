"""Which rank holds which tokens and heads. Imports no torch.

Outside attention the tokens of a sequence are sharded over all its ranks. Inside attention, heads are sharded over
a group, and groups form a grid over queries and keys. This is DeepSpeed-Ulysses (Jacobs et al., 2023,
arXiv:2309.14509) with uneven tokens and grouped key/value heads, inside Attention2D (arXiv:2503.15758).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

# Tokens are sharded in blocks of this many rows, so that a token has the same bits in a shard as in the whole
# sequence. With fewer rows, a BLAS on CPU would use a kernel that sums in another order, and an activation
# function would leave its vector loop.
BLOCK_ROWS = 4


def even_rows(rows: int, ranks: int) -> tuple[int, ...]:
    """Rows per rank, contiguous and in rank order: whole blocks, as even as possible.

    The last rank that has rows also takes the rows that fill no block. With fewer blocks than ranks, the last
    ranks have no rows.
    """
    blocks = max(rows // BLOCK_ROWS, 1)
    shares = [BLOCK_ROWS * (blocks // ranks + (rank < blocks % ranks)) for rank in range(ranks)]
    shares[min(blocks, ranks) - 1] += rows - BLOCK_ROWS * blocks
    return tuple(shares)


def level_rows(ranks: int, *, on_host: bool) -> int | None:
    """How many equal rows the embedding of a noise level is computed with; None for one row per noisy token.

    diffusers embeds the level for every noisy token. A block of rows gives the same bits, but one row does not. On
    a CPU the bits may also depend on the number of rows, by the width and the number of threads. One rank alone
    therefore takes as many rows as diffusers there.
    """
    return None if ranks == 1 and on_host else BLOCK_ROWS


# On a CPU, the allocator maps, zeroes and unmaps an MLP intermediate of several MB in every call, which costs up
# to a sixth of the MLP's time. Intermediates of about MLP_PART_BYTES stay in the heap and the cache. Fewer rows
# than MLP_PART_ROWS at once would cost as much again, because each call packs the weights.
MLP_PART_BYTES = 2**20
MLP_PART_ROWS = 128


def mlp_parts(rows: int, intermediate_bytes: int) -> int:
    """In how many parts a CPU computes the MLP of `rows` tokens; `intermediate_bytes` is the size per token."""
    return max(min(rows * intermediate_bytes // MLP_PART_BYTES, rows // MLP_PART_ROWS), 1)


def start_of(rows: tuple[int, ...], rank: int) -> int:
    """The first row of `rank`."""
    return sum(rows[:rank])


@dataclass(frozen=True)
class Grid:
    """The ranks of one sequence: `rows` x `columns` groups of `ulysses` ranks.

    In rank order `ulysses` varies fastest, then columns, then rows. Tokens are sharded over all ranks in this
    order. A rank attends only for its own heads: with the queries of its grid row, over the keys and values of its
    grid column and of the column's slice of the text. The partial results of a row's columns are then merged on
    the rank that holds the token. With one column nothing needs merging. With one row every rank has the queries
    of the whole sequence.
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
        """The slice of a prompt of `tokens` tokens that `rank` attends to."""
        parts, column = even_rows(tokens, self.columns), self.place(rank)[1]
        return slice(start_of(parts, column), start_of(parts, column + 1))


@dataclass(frozen=True)
class HeadShare:
    """The heads with which one rank attends: its query heads, and the key/value heads that its query heads need.

    Query heads divide evenly over ranks. A key/value head goes to every rank that has a query head of its group.
    With fewer key/value heads than ranks, several ranks get the same key/value head.
    """

    queries: slice
    keys: slice
    key_of_query: tuple[int, ...]  # for each query head of the rank, the index of its key/value head within `keys`

    @property
    def num_queries(self) -> int:
        return int(self.queries.stop - self.queries.start)

    @property
    def num_keys(self) -> int:
        return int(self.keys.stop - self.keys.start)

    @property
    def sent_heads(self) -> int:
        """Heads in a message of queries, keys and values for this share."""
        return self.num_queries + self.sent_keys

    @property
    def sent_keys(self) -> int:
        """Heads in a message of only keys and values for this share."""
        return 2 * self.num_keys

    @property
    def grouped(self) -> bool:
        """Whether the query heads fall into equal consecutive groups, one per key/value head."""
        per_key, rest = divmod(self.num_queries, self.num_keys)
        return rest == 0 and self.key_of_query == tuple(i // per_key for i in range(self.num_queries))

    @property
    def equal_groups(self) -> tuple[tuple[slice, slice], ...]:
        """(query heads, key/value heads) of each run of equally large groups: one run if `grouped`."""
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
