"""Sums over the tokens: the gradient of a bias. Each program writes its own, nothing is added twice
at once, so that they are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jvp_flash_attention.kernels.launch_cache import Launch
from jvp_flash_attention.kernels.problem import cdiv
from training.kernels.launch import launched

TILE, COLUMNS, WARPS = 8, 256, 2  # rows at a time, and side by side, of a program
PROGRAMS = 2048  # at most so many, which run at once: all of the same size end together


@triton.jit
def places(row, w, rows, W):
    """Where these rows and columns of (rows, W) lie, and which of them there are."""
    at = row[:, None].to(tl.int64) * W + w[None, :]
    return at, (row < rows)[:, None] & (w < W)[None, :]


@triton.jit
def _column_sums(
    X, SUMS,  # SUMS (programs, W)
    rows, W, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for i in tl.range(0, ROWS, TILE, loop_unroll_factor=2):  # pyright: ignore
        at, valid = places(first + i + tl.arange(0, TILE), w, rows, W)  # pyright: ignore
        total += tl.load(X + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(SUMS + tl.program_id(0) * W + w, tl.sum(total, 0), mask=w < W)


def column_sums(x: Tensor, wanted: bool = True) -> Tensor:
    """Σ over all but the last dimension, in float32; empty where it is not wanted. x contiguous."""
    if not wanted:
        return x.new_empty(0, dtype=torch.float32)
    width = x.shape[-1]
    rows = x.numel() // width
    strips = cdiv(width, COLUMNS)
    share = cdiv(rows, max(1, PROGRAMS // strips))
    each = max(TILE, 1 << (share - 1).bit_length())
    chunks = cdiv(rows, each)

    def launch(sums: Tensor) -> Launch:
        constexprs = {"ROWS": each, "TILE": TILE, "COLUMNS": COLUMNS, "num_warps": WARPS}
        grid = (chunks, strips)
        return Launch(_column_sums, grid, (x, sums, rows, width), constexprs)

    outputs = lambda: (x.new_empty(chunks, width, dtype=torch.float32),)  # noqa: E731
    (sums,) = launched(("column sums",), (x,), outputs, launch)
    return sums.sum(0)
