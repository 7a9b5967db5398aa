"""Shapes that people run, by name, for benchmarks and tests."""

from typing import NamedTuple

# mask -> its shape in letters; what each holds is drawn where tensors are made
MASKS = {
    "none": None,
    "causal": None,  # a flag, not a tensor
    "bool": "11LL",  # one pattern for all samples and heads
    "padding": "B11L",  # bool: each sample has a length of its own
    "additive": "1HLL",  # a bias of relative positions
    "bool-full": "BHLL",
    "additive-full": "BHLL",
}


class Workload(NamedTuple):
    """Self-attention of `batch` samples: `heads` heads of `head_dim` over `length` tokens."""

    batch: int
    heads: int
    length: int
    head_dim: int
    mask: str = "none"

    @property
    def causal(self) -> bool:
        """Whether query i attends keys j <= i only."""
        return self.mask == "causal"

    @property
    def mask_shape(self) -> tuple[int, ...] | None:
        """Shape of the mask tensor, broadcastable to (B, H, L, L), where there is one."""
        letters = MASKS[self.mask]
        sizes = {"1": 1, "B": self.batch, "H": self.heads, "L": self.length}
        return None if letters is None else tuple(sizes[letter] for letter in letters)


WORKLOADS = {
    "dit_b_256": Workload(32, 12, 256, 64),  # DiT-B/2, 256 px latents
    "dit_l_256": Workload(32, 16, 256, 64),  # DiT-L/2
    "dit_xl_256": Workload(64, 16, 256, 72),  # DiT-XL/2
    "dit_xl_256_64": Workload(64, 16, 256, 64),  # beside it: a head dim that needs no padding
    "dit_xl_1024": Workload(16, 16, 1024, 72),  # DiT-XL/2, 512 px
    "mid_2k": Workload(2, 12, 2048, 64),  # the longest shape of the earlier package's table
    "long_4k_128": Workload(4, 16, 4096, 128),
    "long_8k_64": Workload(1, 32, 8192, 64),
    "long_16k_128": Workload(1, 16, 16384, 128),
    "causal_4k_128": Workload(4, 16, 4096, 128, "causal"),
    "causal_8k_64": Workload(1, 32, 8192, 64, "causal"),
    "ragged_4000_128": Workload(4, 16, 4000, 128),  # beside long_4k_128
    "ragged_276_64": Workload(32, 16, 276, 64),  # 256 image tokens and 20 others
    "even_384_64": Workload(32, 16, 384, 64),  # beside it: the length in whole tiles of 128
    "bool_4k_128": Workload(4, 16, 4096, 128, "bool"),
    "padding_4k_128": Workload(4, 16, 4096, 128, "padding"),
    "additive_4k_128": Workload(4, 16, 4096, 128, "additive"),
}
