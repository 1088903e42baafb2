"""Tokens and heads over ranks: everything is held once, in order, and a layout that cannot be is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos3_pipeline.denoise import CfgLayoutError, UlyssesLayoutError, check_layout
from cosmos3_pipeline.denoise.shards import BLOCK_ROWS, even_rows, head_shares, start_of


@given(rows=st.integers(1, 5000), ranks=st.integers(1, 16))
def test_rows_are_shared_whole_in_order_and_evenly(rows: int, ranks: int) -> None:
    shares = even_rows(rows, ranks)
    assert len(shares) == ranks
    assert sum(shares) == rows
    assert start_of(shares, ranks) == rows
    assert all(share == 0 or share >= min(BLOCK_ROWS, rows) for share in shares)
    assert list(shares) == sorted(shares, key=lambda n: n == 0)  # ranks without a share come last
    assert max(shares) - rows / ranks < 2 * BLOCK_ROWS


@given(st.data())
def test_every_rank_gets_the_keys_of_its_queries(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 8))
    heads = kv_heads * data.draw(st.integers(1, 8))
    ranks = data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    shares = head_shares(heads, kv_heads, ranks)
    assert [h for share in shares for h in range(share.queries.start, share.queries.stop)] == list(range(heads))
    for share in shares:
        wanted = [h // (heads // kv_heads) for h in range(share.queries.start, share.queries.stop)]
        assert [share.keys.start + k for k in share.key_of_query] == wanted
        assert share.num_keys == len(set(wanted))  # not one more than needed
        assert share.sent_heads == share.num_queries + 2 * share.num_keys
        assert share.grouped == (len(share.equal_groups) == 1)
        found: list[int] = []
        for queries, keys in share.equal_groups:
            each, rest = divmod(queries.stop - queries.start, keys.stop - keys.start)
            assert rest == 0 and queries.start == len(found)
            found += [key for key in range(keys.start, keys.stop) for _ in range(each)]
        assert tuple(found) == share.key_of_query


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "grouped"),
    [(32, 8, 4, True), (32, 8, 16, True), (12, 3, 2, False), (6, 2, 3, True), (4, 1, 4, True)],
)
def test_a_cut_through_a_group_is_noticed(heads: int, kv_heads: int, ranks: int, grouped: bool) -> None:
    assert all(share.grouped for share in head_shares(heads, kv_heads, ranks)) is grouped


LAYOUT = {"num_attention_heads": 12, "num_key_value_heads": 4, "cfg": 1, "ulysses": 1, "guidance_scale": 6.0}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        pytest.param(
            {"ulysses": 8},
            UlyssesLayoutError,
            r"(?s)ulysses=8 with 12 attention heads \(4 key.*12 / 8 is 1\.50.*ulysses=4 or ulysses=6",
            id="heads do not divide",
        ),
        pytest.param(
            {"cfg": 2, "guidance_scale": 1.0},
            CfgLayoutError,
            r"(?s)cfg=2 with guidance_scale=1\.0.*one pass only.*cfg=1",
            id="no guidance",
        ),
        pytest.param(
            {"cfg": 4}, CfgLayoutError, r"(?s)cfg=4.*two passes.*cfg=2 and ulysses=2", id="more ranks than passes"
        ),
        pytest.param({"cfg": 3}, CfgLayoutError, r"(?s)cfg=3.*two passes.*cfg=2$", id="odd ranks"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes: dict[str, float], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        check_layout(**{**LAYOUT, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cfg": 2},
        {"ulysses": 6},
        {"ulysses": 12},
        {"guidance_scale": 1.0, "ulysses": 4},
        {"guidance_scale": 0.0},
    ],
    ids=str,
)
def test_a_layout_that_can_be_passes(changes: dict[str, float]) -> None:
    check_layout(**{**LAYOUT, **changes})
