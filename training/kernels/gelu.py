"""GELU, its tangent, and its backward, which sums the gradient of a bias in the same pass.

    h   = z σ(2u),   u = √(2/π) (z + c z³),   c = 0.044715          the tanh formula
    h'  = σ(2u) (1 + 2 z u' (1 - σ(2u))),     u' = √(2/π) (1 + 3 c z²)
    t_h = h' t_z
    d_z = h' d_h,    d_bias = Σ d_z                              over the tokens

z is x Wᵀ + bias, contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jvp_flash_attention.kernels.launch_cache import Launch
from training.kernels.column_sums import places
from training.kernels.launch import launched
from training.kernels.partial_sums import sum_parts

CUBE = tl.constexpr(0.044715)
TWICE = tl.constexpr(1.5957691216057308)  # 2 √(2/π)
EXPONENT = tl.constexpr(-2.302208198144325)  # -2 √(2/π) log₂ e
BLOCK = 2048  # elements of a program, forward
ROWS, TILE, COLUMNS = 128, 16, 128  # of a program, at a time, and side by side, backward


@triton.jit
def _sigmoid(z):
    return 1.0 / (tl.exp2(z * (z * z * CUBE + 1.0) * EXPONENT) + 1.0)


@triton.jit
def _derivative(z, s):
    return s + z * (z * z * (3.0 * CUBE) + 1.0) * TWICE * s * (1.0 - s)


@triton.jit
def _gelu(Z, TZ, H, size, BLOCK: tl.constexpr, TANGENT: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    z = tl.load(Z + at, mask=valid, other=0.0).to(tl.float32)
    s = _sigmoid(z)
    h = z * s
    if TANGENT:
        h = _derivative(z, s) * tl.load(TZ + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(H + at, h, mask=valid)


@triton.jit
def _gelu_backward(
    Z, DH, DZ, SUMS,  # SUMS (programs, W)
    rows, W, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for i in range(0, ROWS, TILE):
        at, valid = places(first + i + tl.arange(0, TILE), w, rows, W, W)
        z = tl.load(Z + at, mask=valid, other=0.0).to(tl.float32)
        d = tl.load(DH + at, mask=valid, other=0.0).to(tl.float32)
        d = d * _derivative(z, _sigmoid(z))
        tl.store(DZ + at, d, mask=valid)
        total += d
    if BIAS:
        tl.store(SUMS + tl.program_id(0) * W + w, tl.sum(total, 0), mask=w < W)


def gelu(z: Tensor) -> Tensor:
    return _elementwise(z, None)


def gelu_tangent(z: Tensor, t_z: Tensor) -> Tensor:
    return _elementwise(z, t_z)


def _elementwise(z: Tensor, t_z: Tensor | None) -> Tensor:
    def launch(h: Tensor) -> Launch:
        size = z.numel()
        constexprs = {"BLOCK": BLOCK, "TANGENT": t_z is not None, "num_warps": 4}
        return Launch(_gelu, (-(-size // BLOCK),), (z, t_z, h, size), constexprs)

    (h,) = launched(("gelu",), (z, t_z), lambda: (torch.empty_like(z),), launch)
    return h


def gelu_backward(z: Tensor, d_h: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """d_z and, with ``bias``, d_bias in float32."""
    width = z.shape[-1]
    rows = z.numel() // width
    chunks = -(-rows // ROWS)

    def outputs() -> tuple[Tensor, Tensor]:
        size = (chunks, width) if bias else (0,)
        return torch.empty_like(z), z.new_empty(size, dtype=torch.float32)

    def launch(d_z: Tensor, sums: Tensor) -> Launch:
        constexprs = {"ROWS": ROWS, "TILE": TILE, "COLUMNS": COLUMNS, "BIAS": bias, "num_warps": 4}
        args = (z, d_h, d_z, sums, rows, width)
        return Launch(_gelu_backward, (chunks, -(-width // COLUMNS)), args, constexprs)

    d_z, sums = launched(("gelu backward", bias), (z, d_h), outputs, launch)
    return d_z, sum_parts(sums[None])[0] if bias else sums
