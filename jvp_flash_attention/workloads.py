"""Shapes that people run, by name, for benchmarks and tests."""

from typing import NamedTuple


class Workload(NamedTuple):
    """Self-attention of `batch` samples: `heads` heads of `head_dim` over `length` tokens."""

    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool = False

    def flops(self, products: int) -> float:
        """Floating-point operations of `products` matrix products of L x L x D."""
        B, H, L, D, causal = self
        return products * 2.0 * B * H * L * L * D / (2 if causal else 1)


WORKLOADS = {
    "dit_b_256": Workload(32, 12, 256, 64),  # DiT-B/2, 256 px latents
    "dit_l_256": Workload(32, 16, 256, 64),  # DiT-L/2
    "dit_xl_256": Workload(64, 16, 256, 72),  # DiT-XL/2
    "dit_xl_1024": Workload(16, 16, 1024, 72),  # DiT-XL/2, 512 px
    "mid_2k": Workload(2, 12, 2048, 64),  # the longest shape of the earlier package's table
    "long_4k_128": Workload(4, 16, 4096, 128),
    "long_8k_64": Workload(1, 32, 8192, 64),
    "long_16k_128": Workload(1, 16, 16384, 128),
    "causal_4k_128": Workload(4, 16, 4096, 128, causal=True),
    "causal_8k_64": Workload(1, 32, 8192, 64, causal=True),
    "ragged_4000_128": Workload(4, 16, 4000, 128),
}
