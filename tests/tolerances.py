"""The one table of tolerances: relative Frobenius error against float64, by dtype.

First order: O, tO and the gradients of O. Second order (gradients through the tangent, double
backward, jvp of grad) may err twice as much. Tests use few and odd lengths, so that bfloat16 has
what docs/mathematics.md allows fewer than 32 queries; the benchmark's shapes are judged by
``scripts/benchmarks/accuracy.py``.
"""

import torch

FIRST = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 3e-3,
}
SECOND = {dtype: 2 * tolerance for dtype, tolerance in FIRST.items()}
