"""Gated residual, norm and modulation of a transformer block in one pass, with the tangent's.

    x'   = x + g y                                    a row is a token, W features
    n    = ρ (x' - m),   m = ⟨x'⟩ (0 for rms),   ρ = (⟨(x' - m)²⟩ + ε)^-½
    h    = n (1 + s) + b

    t_x' = t_x + t_g y + g t_y
    t_n  = ρ (t_x' - ⟨t_x'⟩ - n ⟨n t_x'⟩)                      ⟨t_x'⟩ not for rms
    t_h  = t_n (1 + s) + n t_s + t_b

    d_n  = d_h (1 + s)
    d_x  = d_x' + ρ (d_n - ⟨d_n⟩ - n ⟨n d_n⟩),   d_y = g d_x
    d_b  = Σ d_h,   d_s = Σ d_h n,   d_g = Σ d_x y             over the tokens of an image

A compiler makes of this half a dozen passes over the tokens, three of them for the sums. Tangents
of the last n images are constants: a gradient through them takes the layers one by one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jvp_flash_attention.kernels.launch_cache import Launch
from jvp_flash_attention.operators import operator
from training.kernels.inputs import takes
from training.kernels.launch import launched
from training.kernels.partial_sums import sum_parts

EPSILON = tl.constexpr(1e-6)
MAX_WIDTH = 4096
ROWS = 8  # tokens of a program, backward
MANY_ROWS, MANY_PROGRAMS = 32, 512  # backward, where so many programs remain: a quarter of the sums


@triton.jit
def _residual_norm_forward(
    X, G, Y, B, S, TX, TG, TY, TB, TS,  # inputs
    X2, H, MEAN, RSTD, TX2, TH,  # outputs
    images, tokens, moving,  # of the last ``moving`` images there is a tangent
    stride_g, stride_b, stride_s, stride_tg, stride_tb, stride_ts,
    W: tl.constexpr, BLOCK: tl.constexpr,
    BRANCH: tl.constexpr, RMS: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """A token a program: many small ones hide the wait for memory better than rows in a loop."""
    image = images - 1 - tl.program_id(0) % images  # those with a tangent take longer and go first
    token = tl.program_id(0) // images
    w = tl.arange(0, BLOCK)
    valid = w < W
    row = image.to(tl.int64) * tokens + token
    at = row * W + w
    x = tl.load(X + at, mask=valid, other=0.0).to(tl.float32)
    if BRANCH:
        y = tl.load(Y + at, mask=valid, other=0.0).to(tl.float32)
        gate = tl.load(G + image * stride_g + w, mask=valid, other=0.0).to(tl.float32)
        x += gate * y
        tl.store(X2 + at, x, mask=valid)
        x = x.to(X2.dtype.element_ty).to(tl.float32)
    shift = tl.load(B + image * stride_b + w, mask=valid, other=0.0).to(tl.float32)
    scale = 1.0 + tl.load(S + image * stride_s + w, mask=valid, other=0.0).to(tl.float32)
    mean = 0.0
    if not RMS:
        mean = tl.sum(x, 0) / W
        x = tl.where(valid, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / W + EPSILON)
    n = x * rstd
    tl.store(H + at, n * scale + shift, mask=valid)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)
    if TANGENT:
        other = image - (images - moving)  # which of the tangents
        if other >= 0:
            t_at = (other.to(tl.int64) * tokens + token) * W + w
            t = tl.load(TX + t_at, mask=valid, other=0.0).to(tl.float32)
            if BRANCH:
                t_y = tl.load(TY + t_at, mask=valid, other=0.0).to(tl.float32)
                t_gate = tl.load(TG + other * stride_tg + w, mask=valid, other=0.0).to(tl.float32)
                t += t_gate * y + gate * t_y
                tl.store(TX2 + t_at, t, mask=valid)
                t = t.to(TX2.dtype.element_ty).to(tl.float32)
            t_shift = tl.load(TB + other * stride_tb + w, mask=valid, other=0.0).to(tl.float32)
            t_scale = tl.load(TS + other * stride_ts + w, mask=valid, other=0.0).to(tl.float32)
            along = tl.sum(n * t, 0) / W
            if not RMS:
                t = tl.where(valid, t - tl.sum(t, 0) / W, 0.0)
            t_n = rstd * (t - n * along)
            tl.store(TH + t_at, t_n * scale + n * t_scale + t_shift, mask=valid)


@triton.jit
def _residual_norm_backward(
    X2, G, Y, S, MEAN, RSTD, DX2, DH,  # inputs
    DX, DY, SUMS,  # outputs; SUMS (images, chunks, 3, W): of d_b, d_s and d_g
    tokens, chunks, stride_g, stride_s,
    W: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BRANCH: tl.constexpr, RMS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    image, chunk = tl.program_id(0), tl.program_id(1)
    first = chunk * ROWS
    w = tl.arange(0, BLOCK)
    valid = w < W
    scale = 1.0 + tl.load(S + image * stride_s + w, mask=valid, other=0.0).to(tl.float32)
    if BRANCH:
        gate = tl.load(G + image * stride_g + w, mask=valid, other=0.0).to(tl.float32)
    d_shift = tl.zeros([BLOCK], tl.float32)
    d_scale = tl.zeros([BLOCK], tl.float32)
    d_gate = tl.zeros([BLOCK], tl.float32)
    rows = min(ROWS, tokens - first)
    begin = (image.to(tl.int64) * tokens + first) * W
    next_x = tl.load(X2 + begin + w, mask=valid, other=0.0)
    next_h = tl.load(DH + begin + w, mask=valid, other=0.0)
    if RESIDUAL:
        next_d = tl.load(DX2 + begin + w, mask=valid, other=0.0)
    if BRANCH:
        next_y = tl.load(Y + begin + w, mask=valid, other=0.0)
    for i in range(rows):
        row = image.to(tl.int64) * tokens + first + i
        at = row * W + w
        ahead = valid & (i + 1 < rows)
        x, d_h = next_x.to(tl.float32), next_h.to(tl.float32)
        next_x = tl.load(X2 + at + W, mask=ahead, other=0.0)
        next_h = tl.load(DH + at + W, mask=ahead, other=0.0)
        rstd = tl.load(RSTD + row)
        n = tl.where(valid, (x - tl.load(MEAN + row)) * rstd, 0.0)
        d_shift += d_h
        d_scale += d_h * n
        d_n = d_h * scale
        d_x = d_n - n * (tl.sum(n * d_n, 0) / W)
        if not RMS:
            d_x -= tl.sum(d_n, 0) / W
        d_x *= rstd
        if RESIDUAL:
            d_x += next_d.to(tl.float32)
            next_d = tl.load(DX2 + at + W, mask=ahead, other=0.0)
        tl.store(DX + at, d_x, mask=valid)
        if BRANCH:
            y = next_y.to(tl.float32)
            next_y = tl.load(Y + at + W, mask=ahead, other=0.0)
            d_gate += d_x * y
            tl.store(DY + at, gate * d_x, mask=valid)
    sums = SUMS + (image * chunks + chunk) * 3 * W + w
    tl.store(sums, d_shift, mask=valid)
    tl.store(sums + W, d_scale, mask=valid)
    if BRANCH:
        tl.store(sums + 2 * W, d_gate, mask=valid)


@operator("flash_jvp_training::residual_norm")
def _forward(
    x: Tensor, gate: Tensor | None, y: Tensor | None, shift: Tensor, scale: Tensor,
    t_x: Tensor | None, t_gate: Tensor | None, t_y: Tensor | None,
    t_shift: Tensor | None, t_scale: Tensor | None, rms: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (x, gate, y, shift, scale, t_x, t_gate, t_y, t_shift, t_scale)

    def launch(*results: Tensor) -> Launch:
        images, tokens, width = x.shape
        rows = (gate, shift, scale, t_gate, t_shift, t_scale)
        moving = 0 if t_x is None else len(t_x)
        block = triton.next_power_of_2(width)
        constexprs = {"W": width, "BLOCK": block, "num_warps": min(max(1, block // 256), 4)}
        constexprs |= {"BRANCH": y is not None, "RMS": rms, "TANGENT": t_x is not None}
        args = (*inputs, *results, images, tokens, moving, *map(_stride, rows))
        return Launch(_residual_norm_forward, (images * tokens,), args, constexprs)

    what = ("residual norm", rms, dtype)
    x2, h, mean, rstd, t_x2, t_h = launched(
        what, inputs, lambda: _outputs(x, y, t_x, dtype), launch
    )
    return x2, h, mean, rstd, t_x2, t_h


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _outputs(x: Tensor, y: Tensor | None, t_x: Tensor | None, dtype: torch.dtype) -> Any:
    """x', h, mean, rstd, t_x', t_h; empty where there is no branch or no tangent."""

    def like(a: Tensor | None, present: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(a, dtype=dtype) if a is not None and present else x.new_empty(0)

    branch = y is not None
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    x2, h = like(x, branch, x.dtype), like(x, True, dtype)
    return x2, h, mean, rstd, like(t_x, branch, x.dtype), like(t_x, True, dtype)


@_forward.register_fake
def _(x, gate, y, shift, scale, t_x, t_gate, t_y, t_shift, t_scale, rms, dtype):
    return _outputs(x, y, t_x, dtype)


@operator("flash_jvp_training::residual_norm_backward")
def _backward(
    x: Tensor, gate: Tensor | None, y: Tensor | None, scale: Tensor, mean: Tensor, rstd: Tensor,
    d_x: Tensor | None, d_h: Tensor, rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_x, d_y and the sums (images, 3, W) of d_b, d_s, d_g; ``x`` is x', ``d_x`` that of x'."""
    images, tokens, width = x.shape
    rows = MANY_ROWS if images * tokens >= MANY_ROWS * MANY_PROGRAMS else ROWS
    chunks = -(-tokens // rows)
    inputs = (x, gate, y, scale, mean, rstd, d_x, d_h)

    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        d_y = x.new_empty(0) if y is None else torch.empty_like(y)
        sums = x.new_empty((images, chunks, 3, width), dtype=torch.float32)
        return torch.empty_like(x), d_y, sums

    def launch(*results: Tensor) -> Launch:
        block = triton.next_power_of_2(width)
        constexprs = {"W": width, "BLOCK": block, "num_warps": max(1, block // 1024), "ROWS": rows}
        constexprs |= {"BRANCH": y is not None, "RMS": rms, "RESIDUAL": d_x is not None}
        args = (*inputs, *results, tokens, chunks, _stride(gate), _stride(scale))
        return Launch(_residual_norm_backward, (images, chunks), args, constexprs)

    into, d_y, sums = launched(("residual norm backward", rms), inputs, outputs, launch)
    return into, d_y, sum_parts(sums.flatten(2)).view(images, 3, width)


@_backward.register_fake
def _(x, gate, y, scale, mean, rstd, d_x, d_h, rms):
    d_y = x.new_empty(0) if y is None else torch.empty_like(y)
    sums = x.new_empty((len(x), 3, x.shape[-1]), dtype=torch.float32)
    return torch.empty_like(x), d_y, sums


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, gate, y, shift, scale, *_, rms, _ = inputs
    x2, _, mean, rstd, t_x2, t_h = output
    ctx.mark_non_differentiable(mean, rstd, t_x2, t_h)
    ctx.save_for_backward(x if y is None else x2, gate, y, scale, mean, rstd)
    ctx.rms, ctx.dtypes = rms, (None if gate is None else gate.dtype, shift.dtype, scale.dtype)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, d_x2: Tensor | None, d_h: Tensor | None, *_: Any) -> tuple:
    x, gate, y, scale, mean, rstd = ctx.saved_tensors
    if d_h is None:
        d_h = torch.zeros_like(x)
    if d_x2 is not None:
        d_x2 = d_x2.contiguous() if y is not None else None
    d_x, d_y, sums = _backward(x, gate, y, scale, mean, rstd, d_x2, d_h.contiguous(), ctx.rms)
    d_shift, d_scale, d_gate = sums.unbind(1)
    of_gate, of_shift, of_scale = ctx.dtypes
    branch = (None, None) if y is None else (d_gate.to(of_gate), d_y)
    return d_x, *branch, d_shift.to(of_shift), d_scale.to(of_scale), *(None,) * 7


torch.library.register_autograd("flash_jvp_training::residual_norm", _grad, setup_context=_setup)


def residual_norm(
    x: Tensor, gate: Tensor | None, y: Tensor | None, shift: Tensor, scale: Tensor,
    tangents: tuple[Tensor | None, ...] | None, rms: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """x', h and, with ``tangents`` (of x, g, y, b and s), theirs, constants.

    x, y (B, N, W); gate, shift, scale (B, W), any stride between rows; tangents of the last n
    images. h is of ``dtype``. Without gate and y, x' is x.
    """
    given = (None,) * 5 if tangents is None else tangents
    x2, h, _, _, t_x2, t_h = _forward(x, gate, y, shift, scale, *given, rms, dtype)
    if y is None:
        x2, t_x2 = x, given[0]
    return (x2, h, None, None) if tangents is None else (x2, h, t_x2, t_h)


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels take these: of at most ``MAX_WIDTH`` features, and as many rows each."""
    return all(takes(x) and x.shape[-1] <= MAX_WIDTH and len(x) == len(tensors[0]) for x in tensors)
