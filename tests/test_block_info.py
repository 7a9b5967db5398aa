"""Ranges and pairs of `block_info` against every pair written out, for bands with either bound."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from jvp_flash_attention import kernels, reference
from jvp_flash_attention.kernels import block_info
from tests import tolerances
from tests.cases import Case, build, relative, solve

BANDS = [
    *[(None, None), (None, 0), (None, 3), (0, None), (5, None), (0, 0), (3, 0), (9, 2), (40, 40)],
    *[(block_info.FAR, -5), (block_info.FAR, -200), (-7, None), (-200, None), (-3, 9), (12, -4)],
]


@triton.jit
def parts_kernel(
    OUT,
    at,
    n,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    QUERIES: tl.constexpr,
    shift,
    SHIFTED: tl.constexpr,
):
    if QUERIES:
        parts = block_info.query_parts(at - shift, n, M, N, LEFT, RIGHT, SHIFTED)
    else:
        parts = block_info.key_parts(at + shift, n, M, N, LEFT, RIGHT, SHIFTED)
    for i in tl.static_range(6):
        tl.store(OUT + i, parts[i])


@triton.jit
def valid_kernel(OUT, S, LEFT: tl.constexpr, RIGHT: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    valid = block_info.is_valid(i, j, S, LEFT, RIGHT)
    tl.store(OUT + i * SIZE + j, valid.to(tl.int8))


def band(L, S, left, right):
    """Which pairs count, written out."""
    i, j = torch.arange(L)[:, None], torch.arange(S)[None, :]
    valid = torch.ones(L, S, dtype=torch.bool)
    if left is not None:
        valid &= j >= i - left
    if right is not None:
        valid &= j <= i + right
    return valid


@pytest.mark.parametrize(("left", "right"), BANDS)
def test_pairs_that_count(left, right, device):
    out = torch.empty(64, 64, dtype=torch.int8, device=device)
    valid_kernel[(1,)](out, 41, left, right, 64)
    exact = band(64, 64, left, right)
    exact[:, 41:] = False
    assert torch.equal(out.bool().cpu(), exact)


@pytest.mark.parametrize(("left", "right"), BANDS)
@pytest.mark.parametrize(("M", "N"), [(16, 32), (32, 16)])
@pytest.mark.parametrize(("L", "S"), [(100, 90), (40, 130)])
@pytest.mark.parametrize("queries", [False, True], ids=["keys", "queries"])
def test_parts_hold_what_counts_once_and_skip_tiles_without(
    queries, L, S, M, N, left, right, device
):
    """The queries stand at i, or where lengths differ and the ends are aligned at i + shift."""
    out = torch.empty(6, dtype=torch.int32, device=device)
    rows, length, step, other = (S, L, M, N) if queries else (L, S, N, M)
    for shift in (0, -37, 25) if M < N else (0,):
        bounds = left if left is None else left - shift, right if right is None else right + shift
        # the last tile is a whole one to the ranges
        valid = band(L, S + N, *bounds).T if queries else band(L + M, S, *bounds)
        for at in range(0, rows, other):
            how = (M, N, left, right, queries, shift, shift != 0)
            parts_kernel[(1,)](out, at, length, *how)
            check_parts(out, valid[at : at + other], length, step, left, right, queries)


def check_parts(out, tile, length, step, left, right, queries):
    seen = []
    for phase, (begin, end) in enumerate(out.view(3, 2).tolist()):
        if phase == 1 and queries and right is None:
            continue  # nothing: the kernel has no such phase
        if phase == 2 and left is None:
            continue
        for start in range(begin, end, step):
            assert start % step == 0
            seen += range(start, min(start + step, length))
            if phase == 0:
                assert tile[:, start : start + step].all()
    assert len(seen) == len(set(seen))
    mine = torch.zeros(length, dtype=torch.bool)
    mine[seen] = True
    assert (tile.any(0) <= mine).all()
    tiles = {x // step for x in seen}
    needed = {x // step for x in tile.any(0).nonzero().flatten().tolist()}
    assert len(tiles - needed) <= (left is not None or right is not None)


@pytest.mark.parametrize(
    ("L", "S", "left", "right"),
    [(70, 75, 5, 0), (70, 75, 40, 3), (80, 33, 7, None), (40, 20, None, -18), (20, 60, -30, 33)],
)
def test_the_portable_kernels_serve_any_band(L, S, left, right, device):
    """As the same band as a bool mask; some rows have no key at all."""
    case = Case(B=1, H=2, Hk=1, L=L, S=S, D=16)
    p = build(replace(case, window=(left, right)), torch.float32, device)
    exact = build(case, torch.float32, device).double()
    exact.primals[3] = band(L, S, left, right).to(device)[None, None]
    got = solve(kernels, p)
    for name, x in solve(reference, exact).items():
        square, norm = relative(got[name], x, S)
        assert (square / norm) ** 0.5 < tolerances.SECOND[torch.float32], name
