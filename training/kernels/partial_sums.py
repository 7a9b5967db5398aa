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
ONE, MANY = (32, 16, 4), (8, 256, 2)


@triton.jit
def _sum_parts(
    PARTS, SUMS, parts, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """PARTS (n, parts, W), SUMS (n, W)"""
    n = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(0, parts, ROWS):
        at = (n * parts + i + row)[:, None] * W + w[None, :]
        total += tl.load(PARTS + at, mask=(i + row < parts)[:, None] & (w < W)[None, :], other=0.0)
    tl.store(SUMS + n * W + w, tl.sum(total, 0), mask=w < W)


def sum_parts(x: Tensor) -> Tensor:
    """(n, parts, W) -> (n, W), in float32, always in the same order."""
    n, parts, width = x.shape

    def launch(sums: Tensor) -> Launch:
        rows, columns, warps = ONE if n == 1 else MANY
        constexprs = {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}
        return Launch(_sum_parts, (n, cdiv(width, columns)), (x, sums, parts, width), constexprs)

    (sums,) = launched(("sum of parts",), (x,), lambda: (x.new_empty(n, width),), launch)
    return sums
