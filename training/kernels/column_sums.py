"""Sums over the tokens: the gradient of a bias. Each program writes its own, nothing is added twice
at once, so that they are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jvp_flash_attention.kernels.launch_cache import Launch
from training.kernels.launch import launched

ROWS, TILE, COLUMNS = 128, 32, 64  # of a program, at a time, and side by side


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
    for i in range(0, ROWS, TILE):
        at, valid = places(first + i + tl.arange(0, TILE), w, rows, W)  # pyright: ignore
        total += tl.load(X + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(SUMS + tl.program_id(0) * W + w, tl.sum(total, 0), mask=w < W)


def column_sums(x: Tensor, wanted: bool = True) -> Tensor:
    """Σ over all but the last dimension, in float32; empty where it is not wanted. x contiguous."""
    if not wanted:
        return x.new_empty(0, dtype=torch.float32)
    width = x.shape[-1]
    rows = x.numel() // width
    chunks = -(-rows // ROWS)

    def launch(sums: Tensor) -> Launch:
        constexprs = {"ROWS": ROWS, "TILE": TILE, "COLUMNS": COLUMNS, "num_warps": 2}
        grid = (chunks, -(-width // COLUMNS))
        return Launch(_column_sums, grid, (x, sums, rows, width), constexprs)

    outputs = lambda: (x.new_empty(chunks, width, dtype=torch.float32),)  # noqa: E731
    (sums,) = launched(("column sums",), (x,), outputs, launch)
    return sums.sum(0)
