"""Layouts hold every row once, and the blocks of all processes make up the scores."""

import pytest
import torch

from jvp_flash_attention.distributed.sharding import LAYOUTS, block, pieces, shard_lengths


def held(length, size, rank, layout):
    rows = pieces(length, size, rank, layout)
    return torch.cat([torch.arange(x.start, x.stop) for x in rows])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 5, 16, 37])
def test_every_row_is_held_once_and_shares_are_even(layout, size, length):
    rows = [held(length, size, rank, layout) for rank in range(size)]
    assert torch.cat(rows).sort().values.tolist() == list(range(length))
    assert [len(x) for x in rows] == shard_lengths(length, size, layout)
    assert max(map(len, rows)) - min(map(len, rows)) <= (2 if layout == "zigzag" else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("L", "S"), [(12, 12), (13, 13), (3, 3), (5, 9)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_blocks_make_up_the_scores(layout, causal, L, S, size):
    if causal and L != S:
        pytest.skip("causal needs one length")
    seen = torch.zeros(L, S, dtype=torch.int64)
    for rank in range(size):
        for source in range(size):
            found = block(rank, source, size, (L, S), causal, layout)
            if found is None:
                continue
            rows = held(L, size, rank, layout)[found.rows]
            keys = held(S, size, source, layout)[found.keys]
            see = torch.ones(len(rows), len(keys), dtype=torch.int64)
            seen[rows[:, None], keys] += see.tril() if found.causal else see
    whole = torch.ones(L, S, dtype=torch.int64)
    assert torch.equal(seen, whole.tril() if causal else whole)


def test_zigzag_gives_every_process_the_same_work_under_a_causal_mask():
    size, length = 4, 64
    work = []
    for rank in range(size):
        area = 0.0
        for source in range(size):
            found = block(rank, source, size, (length, length), True, "zigzag")
            assert found is not None
            n = len(range(length // size)[found.rows]) * len(range(length // size)[found.keys])
            area += n / 2 if found.causal else n
        work.append(area)
    assert len(set(work)) == 1
