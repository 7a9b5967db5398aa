"""What the machine can do: a large matrix product in each dtype and a large copy."""

from functools import partial
from typing import NamedTuple

import torch

from .timing import median_ms


class Peak(NamedTuple):
    """Measured in the same run as everything that is compared with it."""

    gemm_tflops: dict[str, float]  # dtype -> TFLOP/s of an n × n × n product
    gemm_size: int  # n
    copy_gigabytes: float  # GB/s, read and written bytes together


def measure(dtypes: dict[str, torch.dtype], device: str) -> Peak:
    """The vendor's products as PyTorch calls them by default, and a copy larger than any cache.

    A product's time is the least of three medians: one that met a power limit is no peak.
    """
    n, size = (8192, 2**30) if device == "cuda" else (256, 2**24)
    tflops = {}
    for name, dtype in dtypes.items():
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        product = partial(torch.mm, a, b)
        least = min(median_ms(product, device, budget_ms=100) for _ in range(3))
        tflops[name] = 2 * n**3 / least / 1e9
    source = torch.empty(size, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), device)
    return Peak(tflops, n, 2 * size / copy / 1e6)
