"""Sums of partial sums, which programs of another kernel left. PyTorch's own sum takes two to three
times as long for so little, and clears a counter first.
"""

import triton
import triton.language as tl
from torch import Tensor

from jvp_flash_attention.kernels.launch_cache import Launch
from jvp_flash_attention.kernels.problem import cdiv
from training.kernels.launch import launched

# rows and columns at a time, and warps: of one sum, which has few programs, and of many
ONE, MANY = (64, 16, 4), (8, 128, 1)


@triton.jit
def _sum_parts(
    PARTS, SUMS, parts, W, first, gap,
    GAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """PARTS (n, parts, W), SUMS (n, W + gap); GAP: there is one."""
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w = column
    there = w < W
    if GAP:
        w = tl.where(column < first, column, column - gap)
        there = ((column < first) | (column >= first + gap)) & (w < W)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(0, parts, ROWS):
        at = (n * parts + i + row)[:, None] * W + w[None, :]
        total += tl.load(PARTS + at, mask=(i + row < parts)[:, None] & there[None, :], other=0.0)
    tl.store(SUMS + n * (W + gap) + column, tl.sum(total, 0), mask=column < W + gap)


def sum_parts(x: Tensor, gap: tuple[int, int] = (0, 0)) -> Tensor:
    """(n, parts, W) -> (n, W), in float32, always in the same order. ``gap``: from which column on
    so many zeros stand between the sums.
    """
    n, parts, width = x.shape
    columns = width + gap[1]

    def launch(sums: Tensor) -> Launch:
        rows, each, warps = ONE if n == 1 else MANY
        constexprs = {"GAP": gap[1] > 0, "ROWS": rows, "COLUMNS": each, "num_warps": warps}
        args = (x, sums, parts, width, *gap)
        return Launch(_sum_parts, (n, cdiv(columns, each)), args, constexprs)

    (sums,) = launched(("sum of parts", gap), (x,), lambda: (x.new_empty(n, columns),), launch)
    return sums
