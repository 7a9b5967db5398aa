"""From tensors to kernel arguments: operands, options, tiles, grids."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ..functorch import materialized
from ..options import Options, tf32_allowed
from . import configs


class Problem(NamedTuple):
    """Sizes and switches that the kernels of one call share."""

    B: int
    H: int
    Hk: int
    L: int
    S: int
    D: int
    DV: int
    tma: bool
    hopper: bool
    warpgroups: bool  # Hopper's asynchronous products, which Blackwell has not
    itemsize: int
    options: Options
    bias: bool
    bool_bias: bool

    @property
    def block_d(self) -> int:
        return _padded(self.D)

    @property
    def block_dv(self) -> int:
        return _padded(self.DV)

    def tile(self, kind: str, jvp: bool = False) -> configs.Tile:
        """The tile of a pass, by the wider of the two head dims."""
        block = max(self.block_d, self.block_dv)
        extras = self.bias or self.options.dropout_p > 0.0
        six = self.precision(kind) == "bf16x6"
        kind = f"{kind}_jvp" if jvp else kind
        return configs.tile(kind, block, self.itemsize, self.hopper, extras, six)

    def precision(self, kind: str) -> str:
        block = max(self.block_d, self.block_dv)
        return precision(self.itemsize, block, self.warpgroups and kind == "forward")

    def numbers(self, seed: Tensor | None) -> tuple:
        """scale, dropout threshold, 1 / keep probability, batch entries a seed, H, L, S."""
        p = self.options.dropout_p
        group = 1 if seed is None else max(self.B // seed.numel(), 1)
        return self.options.scale, int(p * 2**32), 1.0 / (1.0 - p), group, self.H, self.L, self.S

    def switches(self, kind: str, tile: configs.Tile, whole: bool) -> dict:
        """Compile-time arguments common to the kernels."""
        return {
            "GROUP": self.H // self.Hk,
            "D": self.D,
            "DV": self.DV,
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "CAUSAL": self.options.causal,
            "BOOL": self.bool_bias,
            "WHOLE": whole,
            "PRECISION": self.precision(kind),
            "TMA": self.tma,
            "BM": tile.BM,
            "BN": tile.BN,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def problem(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: Options, *operands
) -> Problem:
    """Sizes and switches of a call; `operands` are the other tensors that are read as tiles, `bias`
    is a `readable_mask`."""
    B, H, L, D = q.shape
    Hk, S, DV = v.shape[1:]
    major = _major(q.device) if q.is_cuda else 0
    hopper = major in (9, 10)  # and data-centre Blackwell: TMA, and 227 KB of shared memory
    tma = hopper and q.element_size() == 2 and all(map(tma_can_read, (q, k, v, *operands)))
    bool_bias = bias is not None and bias.dtype == torch.int8
    return Problem(
        B, H, Hk, L, S, D, DV, tma, hopper, major == 9, q.element_size(), options,
        bias is not None, bool_bias,
    )  # fmt: skip


def precision(itemsize: int, block: int, six: bool) -> str:
    """How float32 products are computed: one TF32 product where the user allows it; otherwise
    three, or `six` bfloat16 products, which keep float32's accuracy, or plain float32 at head dim
    256, where the split operands outgrow shared memory, and on AMD, where there is no TF32x3."""
    if itemsize != 4 or torch.version.hip:
        return "ieee"
    if tf32_allowed():
        return "tf32"
    if block >= 256:
        return "ieee"
    return "bf16x6" if six else "tf32x3"


def unit(x: Tensor | None) -> Tensor | None:
    """The tensor itself where the kernels can read it: unit stride in the last dimension, and rows
    so close that 128 of them are counted in 32 bits; otherwise a copy."""
    if x is None:
        return None
    x = materialized(x)
    return x if is_unit(x) else x.contiguous()


def is_unit(x: Tensor) -> bool:
    """Whether the kernels can read these strides."""
    return x.stride(-1) == 1 and x.stride(-2) < 2**24


def packed(x: Tensor | None) -> Tensor | None:
    """One that the kernels read without strides, contiguous: vmap may have expanded it."""
    return None if x is None else x.contiguous()


def operand(x: Tensor | None, p: Problem, rows: int, block_d: int):
    """A tensor (B, heads, rows, D) as the kernels take it: a TMA descriptor, or pointer and
    strides."""
    if x is None:
        return None
    if p.tma:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, block_d])
    return pointer(x)


def pointer(x: Tensor | None):
    """(pointer, stride_b, stride_h, stride_row)."""
    return None if x is None else (x, *x.stride()[:3])


def readable_mask(bias: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it: a bool mask as int8."""
    if bias is None:
        return None
    return bias.view(torch.int8) if bias.dtype == torch.bool else materialized(bias)


def mask(bias: Tensor | None, p: Problem):
    """(pointer, four strides) of a mask broadcast to (B, H, L, S)."""
    return None if bias is None else (bias, *bias.expand(p.B, p.H, p.L, p.S).stride())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def has_warpgroups(x: Tensor) -> bool:
    """Whether its device is a Hopper."""
    return x.is_cuda and _major(x.device) == 9


@cache
def _major(device: torch.device) -> int:
    """CUDA's compute capability, its first number; 0 on other hardware and in Triton's interpreter,
    which has no wgmma and multiplies by no bfloat16 parts."""
    other = torch.version.hip or knobs.runtime.interpret
    return 0 if other else torch.cuda.get_device_capability(device)[0]


def _padded(d: int) -> int:
    """The head dim a tile is given: a power of two, at least what a matrix product takes."""
    return max(16, 1 << (d - 1).bit_length())


def tma_can_read(x: Tensor | None) -> bool:
    """TMA wants elements, 16-byte aligned rows and real strides; anything else is read through
    pointers."""
    if x is None:
        return True
    unit = 16 // x.element_size()
    return (
        x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(s % unit == 0 and s > 0 for s in x.stride()[:3])
    )
