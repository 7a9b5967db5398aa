"""GELU of a product in one pass, with the tangent's; its backward sums the gradient of the bias.

    h   = z σ(2u),   u = √(2/π) (z + c z³),   c = 0.044715          the tanh formula
    h'  = σ(2u) (1 + 2 z u' (1 - σ(2u))),     u' = √(2/π) (1 + 3 c z²)
    t_h = h' t_z                                                 of the last n images
    d_z = h' d_h,    d_bias = Σ d_z                              over the tokens

z is x Wᵀ + bias. A compiler reads z twice for value and tangent, and d_z once more for the sum,
which it makes of the rounded d_z. Tangents are constants: a gradient through them takes the layers
one by one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jvp_flash_attention.kernels.launch_cache import Launch
from jvp_flash_attention.operators import operator
from training.dual import Dual
from training.kernels.launch import launched

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
def _gelu_forward(Z, TZ, H, TH, size, still, BLOCK: tl.constexpr, TANGENT: tl.constexpr):
    """``still``: so many elements, the first ones, have no tangent."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    z = tl.load(Z + at, mask=valid, other=0.0).to(tl.float32)
    s = _sigmoid(z)
    tl.store(H + at, z * s, mask=valid)
    if TANGENT and (tl.program_id(0).to(tl.int64) + 1) * BLOCK > still:
        moving = valid & (at >= still)
        t = tl.load(TZ + at - still, mask=moving, other=0.0).to(tl.float32)
        tl.store(TH + at - still, _derivative(z, s) * t, mask=moving)


@triton.jit
def _gelu_backward(
    Z, DH, DZ, SUMS,  # SUMS (programs, W)
    rows, W, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for i in range(0, ROWS, TILE):
        row = first + i + tl.arange(0, TILE)
        at = row[:, None].to(tl.int64) * W + w[None, :]
        valid = (row < rows)[:, None] & (w < W)[None, :]
        z = tl.load(Z + at, mask=valid, other=0.0).to(tl.float32)
        d = tl.load(DH + at, mask=valid, other=0.0).to(tl.float32)
        d = d * _derivative(z, _sigmoid(z))
        tl.store(DZ + at, d, mask=valid)
        total += d
    if BIAS:
        tl.store(SUMS + tl.program_id(0) * W + w, tl.sum(total, 0), mask=w < W)


@operator("flash_jvp_training::gelu")
def _forward(z: Tensor, bias: Tensor | None, t_z: Tensor | None) -> tuple[Tensor, Tensor]:
    def launch(h: Tensor, t_h: Tensor) -> Launch:
        size = z.numel()
        constexprs = {"BLOCK": BLOCK, "TANGENT": t_z is not None, "num_warps": 4}
        args = (z, t_z, h, t_h, size, size - t_h.numel())
        return Launch(_gelu_forward, (-(-size // BLOCK),), args, constexprs)

    h, t_h = launched(("gelu",), (z, t_z), lambda: _outputs(z, bias, t_z), launch)
    return h, t_h


@_forward.register_fake
def _outputs(z: Tensor, bias: Tensor | None, t_z: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(0) if t_z is None else torch.empty_like(t_z)


@operator("flash_jvp_training::gelu_backward")
def _backward(z: Tensor, d_h: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
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
    return d_z, sums.sum(0) if bias else sums


@_backward.register_fake
def _(z, d_h, bias):
    size = (z.shape[-1],) if bias else (0,)
    return torch.empty_like(z), z.new_empty(size, dtype=torch.float32)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    z, bias, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(z)
    ctx.bias = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, d_h: Tensor | None, *_: Any) -> tuple:
    if d_h is None:
        return None, None, None
    (z,) = ctx.saved_tensors
    d_z, d_bias = _backward(z, d_h.contiguous(), ctx.bias is not None)
    return d_z, None if ctx.bias is None else d_bias.to(ctx.bias), None


torch.library.register_autograd("flash_jvp_training::gelu", _grad, setup_context=_setup)


def gelu(z: Tensor | Dual, bias: Tensor | None) -> Any:
    """gelu(z), with the tangent that z has, a constant.

    z (B, ..., W), contiguous. ``bias`` (W,), already in z, is there for its gradient alone: whoever
    makes z adds ``bias.detach()``.
    """
    if not isinstance(z, Dual):
        return _forward(z, bias, None)[0]
    return z.follow(*_forward(z.primal, bias, z.tangent))
