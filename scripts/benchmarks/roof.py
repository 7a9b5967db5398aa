"""What the machine can do: a large matrix product in each dtype and a large copy."""

from typing import NamedTuple

import torch

from .timing import median_ms


class Roof(NamedTuple):
    """Measured in the same run as everything that is compared with it."""

    gemm_tflops: dict[str, float]  # dtype -> TFLOP/s of an n × n × n product
    gemm_size: int  # n
    copy_gigabytes: float  # GB/s, read and written bytes together


def measure(dtypes: dict[str, torch.dtype], device: str) -> Roof:
    """The vendor's products as PyTorch calls them by default, and a copy larger than any cache."""
    n, size = (8192, 2**30) if device == "cuda" else (256, 2**24)
    tflops = {}
    for name, dtype in dtypes.items():
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        tflops[name] = 2 * n**3 / median_ms(lambda a=a, b=b: a @ b, device, budget_ms=200) / 1e9
    source = torch.empty(size, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), device)
    return Roof(tflops, n, 2 * size / copy / 1e6)
