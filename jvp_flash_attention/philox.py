"""Counter-based dropout: Philox-4x32-10 (Salmon et al., SC 2011) in PyTorch integers.

Whether pair (b, h, i, j) is dropped depends on nothing but (seed, b, h, i, j): forward, tangent and
backward see the same mask whatever their tiling. The kernels call `tl.philox` with the same key and
counters, so both backends drop the same pairs.

`seed` holds n integers; the batch is divided in n equal groups, each with its own seed and counting
from zero. Plain calls have n = 1; `vmap` folds its dimension into the batch with one seed a sample.
"""

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def keep_mask(
    seed: Tensor, shape: tuple[int, int, int, int], rows: slice, dropout_p: float
) -> Tensor:
    """Bool (B, H, l, S), True where the pair is kept, for the query rows `rows` of scores of
    `shape` (B, H, L, S)."""
    B, H, _, S = shape
    group = max(B // seed.numel(), 1)
    batch = torch.arange(B, device=seed.device)
    key = seed.reshape(-1)[batch // group].view(B, 1, 1, 1)
    head = (batch % group).view(B, 1, 1, 1) * H + torch.arange(H, device=seed.device).view(
        1, H, 1, 1
    )
    i = torch.arange(rows.start, rows.stop, device=seed.device).view(1, 1, -1, 1)
    j = torch.arange(S, device=seed.device).view(1, 1, 1, S)
    return _philox(key, j, i, head) >= int(dropout_p * 2**32)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """First output word of Philox for the 64-bit key `seed` and counter (c0, c1, c2, 0)."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        c0, c1, c2, c3 = (
            _high(_M1, c2) ^ c1 ^ k0,
            (c2 * _M1) & _LOW,
            _high(_M0, c0) ^ c3 ^ k1,
            (c0 * _M0) & _LOW,
        )
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0


def _high(a: int, b: Tensor) -> Tensor:
    """Upper 32 bits of the product of two unsigned 32-bit integers, without leaving signed 64-bit
    range."""
    low, high = a & 0xFFFF, a >> 16
    return (high * b + (low * b >> 16)) >> 16
