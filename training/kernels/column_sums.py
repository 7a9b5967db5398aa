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
from training.kernels.partial_sums import sum_parts

TILE, COLUMNS, WARPS = 8, 256, 2  # rows at a time, and side by side, of a program
PROGRAMS = 2048  # at most so many, which run at once: all of the same size end together


@triton.jit
def places(row, w, rows, W, stride):
    """Where these rows and columns of (rows, W) lie, and which of them there are."""
    at = row[:, None].to(tl.int64) * stride + w[None, :]
    return at, (row < rows)[:, None] & (w < W)[None, :]


@triton.jit
def _column_sums(
    X, SUMS,  # X (rows, parts, W), SUMS (programs, parts that are read, W)
    rows, W, stride_row, stride_part, zero,
    ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    part = tl.program_id(2)
    part += tl.where(part >= zero, 1, 0)
    w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    X += part.to(tl.int64) * stride_part
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for i in tl.range(0, ROWS, TILE, loop_unroll_factor=2):  # pyright: ignore
        row = first + i + tl.arange(0, TILE)  # pyright: ignore
        at, valid = places(row, w, rows, W, stride_row)
        total += tl.load(X + at, mask=valid, other=0.0).to(tl.float32)
    into = SUMS + (tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)) * W
    tl.store(into + w, tl.sum(total, 0), mask=w < W)


def column_sums(x: Tensor, wanted: bool = True) -> Tensor:
    """Σ over all but the last dimension, in float32; empty where it is not wanted. x contiguous."""
    if not wanted:
        return x.new_empty(0, dtype=torch.float32)
    return part_sums(x.view(-1, 1, x.shape[-1]))[0]


def part_sums(x: Tensor, zero: int | None = None) -> Tensor:
    """Σ over the rows of (rows, parts, W), in float32. Columns lie beside each other. ``zero``: the
    part whose sums are known to be zero; it is not read.
    """
    rows, parts, width = x.shape
    zero, read = (parts, parts) if zero is None else (zero, parts - 1)
    strips = cdiv(width, COLUMNS)
    share = cdiv(rows, max(1, PROGRAMS // (strips * read)))
    each = max(TILE, 1 << (share - 1).bit_length())
    chunks = cdiv(rows, each)

    def launch(sums: Tensor) -> Launch:
        constexprs = {"ROWS": each, "TILE": TILE, "COLUMNS": COLUMNS, "num_warps": WARPS}
        args = (x, sums, rows, width, *x.stride()[:2], zero)
        return Launch(_column_sums, (chunks, strips, read), args, constexprs)

    outputs = lambda: (x.new_empty(1, chunks, read * width, dtype=torch.float32),)  # noqa: E731
    (sums,) = launched(("column sums", zero), (x,), outputs, launch)
    return sum_parts(sums, (zero * width, (parts - read) * width)).view(parts, width)
