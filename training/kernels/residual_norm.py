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
    d_bias = Σ d_y                                             over all tokens

A compiler makes of this half a dozen passes over the tokens, four of them for the sums. The bias of
the product that made y is part of y already. Whoever made y leaves the bias's gradient to this
kernel, which has Σ d_y at hand. Tangents of the last n images are constants: a gradient through
them takes the layers one by one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jvp_flash_attention.kernels.launch_cache import Launch
from jvp_flash_attention.kernels.problem import cdiv
from jvp_flash_attention.operators import operator
from training.kernels.inputs import takes
from training.kernels.launch import launched
from training.kernels.partial_sums import sum_parts

EPSILON = tl.constexpr(1e-6)
MAX_WIDTH = 4096
ROWS = 8, 64  # tokens of a program, backward: at least and at most
WARPS = 1024  # backward: as many run at once; more would only leave more sums to add

# Two tiles hold a token's features, WIDE and REST of them, where one would be empty for more than a
# quarter (1152 = 1024 + 128). What ends in _r is of the second one, which REST = 0 leaves out.


@triton.jit
def _features(first: tl.constexpr, size: tl.constexpr, W: tl.constexpr):
    """Those of a tile, and which of them there are: all, a compiler should know, if so."""
    w = first + tl.arange(0, size)
    there = w < W
    if first + size <= W:
        there = tl.full([size], True, tl.int1)
    return w, there


@triton.jit
def _read(X, at, there):
    return tl.load(X + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _rounded(X, at, there, x):
    """x, stored, and as it is stored."""
    tl.store(X + at, x, mask=there)
    return x.to(X.dtype.element_ty).to(tl.float32)


@triton.jit
def _stream(X, Y, G, at, there, w):
    """x, y and g"""
    y, gate = _read(Y, at, there), _read(G, w, there)
    return _read(X, at, there), y, gate


@triton.jit
def _modulation(S, B, w, there):
    """1 + s and b"""
    return 1.0 + _read(S, w, there), _read(B, w, there)


@triton.jit
def _residual_norm_forward(
    X, G, Y, B, S, TX, TG, TY, TB, TS,  # inputs
    X2, H, MEAN, RSTD, TX2, TH,  # outputs
    images, tokens, moving,  # of the last ``moving`` images there is a tangent
    stride_g, stride_b, stride_s, stride_tg, stride_tb, stride_ts,
    W: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    RMS: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """A token a program: many small ones hide the wait for memory better than rows in a loop. The
    last ones first: they take longer, with a tangent, and lie in L2, where y was just written. All
    of x and y is read before anything is stored, from behind which no compiler would move it.
    """
    row = images * tokens - 1 - tl.program_id(0)
    image = row // tokens
    t_row = (row - (images - moving) * tokens).to(tl.int64)  # of the tangents, from 0 on
    row = row.to(tl.int64)
    G += image * stride_g
    B += image * stride_b
    S += image * stride_s
    w, there = _features(0, WIDE, W)  # pyright: ignore
    x, y, gate = _stream(X, Y, G, row * W + w, there, w)
    if REST:
        w_r, there_r = _features(WIDE, REST, W)
        x_r, y_r, gate_r = _stream(X, Y, G, row * W + w_r, there_r, w_r)
        x_r = _rounded(X2, row * W + w_r, there_r, x_r + gate_r * y_r)
    x = _rounded(X2, row * W + w, there, x + gate * y)
    mean = 0.0
    if not RMS:
        mean = tl.sum(x, 0)
        if REST:
            mean += tl.sum(x_r, 0)
        mean /= W
        x = tl.where(there, x - mean, 0.0)
        if REST:
            x_r = tl.where(there_r, x_r - mean, 0.0)
    squares = tl.sum(x * x, 0)
    if REST:
        squares += tl.sum(x_r * x_r, 0)
    rstd = tl.rsqrt(squares / W + EPSILON)
    n = x * rstd
    scale, shift = _modulation(S, B, w, there)
    if REST:
        n_r = x_r * rstd
        scale_r, shift_r = _modulation(S, B, w_r, there_r)
        tl.store(H + row * W + w_r, n_r * scale_r + shift_r, mask=there_r)
    tl.store(H + row * W + w, n * scale + shift, mask=there)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)

    if TANGENT:  # noqa: SIM102 - known at compile time, unlike what follows
        if t_row >= 0:
            other = image - (images - moving)
            TG += other * stride_tg
            TB += other * stride_tb
            TS += other * stride_ts
            t, t_y, t_gate = _stream(TX, TY, TG, t_row * W + w, there, w)
            if REST:
                t_r, t_y_r, t_gate_r = _stream(TX, TY, TG, t_row * W + w_r, there_r, w_r)
                t_r += t_gate_r * y_r + gate_r * t_y_r
                t_r = _rounded(TX2, t_row * W + w_r, there_r, t_r)
            t = _rounded(TX2, t_row * W + w, there, t + t_gate * y + gate * t_y)
            along, t_mean = tl.sum(n * t, 0), tl.sum(t, 0)
            if REST:
                along += tl.sum(n_r * t_r, 0)
                t_mean += tl.sum(t_r, 0)
            along, t_mean = along / W, 0.0 if RMS else t_mean / W
            t_h = rstd * (t - t_mean - n * along) * scale + n * _read(TS, w, there)
            t_h += _read(TB, w, there)
            if REST:
                t_h_r = rstd * (t_r - t_mean - n_r * along) * scale_r
                t_h_r += n_r * _read(TS, w_r, there_r) + _read(TB, w_r, there_r)
                tl.store(TH + t_row * W + w_r, t_h_r, mask=there_r)
            tl.store(TH + t_row * W + w, t_h, mask=there)


@triton.jit
def _ahead(X2, DH, DX2, at, there, RESIDUAL: tl.constexpr):
    """What a token needs first, read while the one before is computed."""
    x = tl.load(X2 + at, mask=there, other=0.0)
    d_h = tl.load(DH + at, mask=there, other=0.0)
    d_x = d_h
    if RESIDUAL:
        d_x = tl.load(DX2 + at, mask=there, other=0.0)
    return x, d_h, d_x


@triton.jit
def _of_norm(x, d_h, scale, mean, rstd, d_shift, d_scale):
    """n, d_n, and the sums with this token in them."""
    n, d_h = (x.to(tl.float32) - mean) * rstd, d_h.to(tl.float32)
    return n, d_h * scale, d_shift + d_h, d_scale + d_h * n


@triton.jit
def _of_stream(d_x, Y, gate, DX, DY, at, there, d_gate, d_bias, BIAS: tl.constexpr):
    """Stores d_x and d_y. The sums with this token in them; g is still to multiply that of d_y."""
    tl.store(DX + at, d_x, mask=there)
    tl.store(DY + at, gate * d_x, mask=there)
    if BIAS:
        d_bias += d_x
    return d_gate + d_x * _read(Y, at, there), d_bias


@triton.jit
def _store_sums(
    SUMS, w, there, d_shift, d_scale, d_gate, d_bias, W: tl.constexpr, BIAS: tl.constexpr
):
    tl.store(SUMS + w, d_shift, mask=there)
    tl.store(SUMS + W + w, d_scale, mask=there)
    tl.store(SUMS + 2 * W + w, d_gate, mask=there)
    if BIAS:
        tl.store(SUMS + 3 * W + w, d_bias, mask=there)


@triton.jit
def _residual_norm_backward(
    X2, G, Y, S, MEAN, RSTD, DX2, DH,  # inputs
    DX, DY, SUMS,  # outputs; SUMS (images, chunks, 3 or 4, W): of d_b, d_s, d_g and d_y
    tokens, chunks, rows, stride_g, stride_s,
    W: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    BIAS: tl.constexpr, RMS: tl.constexpr, RESIDUAL: tl.constexpr, ANEW: tl.constexpr,
):  # fmt: skip
    """ANEW: scale and gate are read for each token, since registers do not hold them too."""
    image, chunk = tl.program_id(0), tl.program_id(1)
    first = image.to(tl.int64) * tokens + chunk * rows
    last = min(first + rows, (image + 1).to(tl.int64) * tokens)
    G += image * stride_g
    S += image * stride_s
    w, there = _features(0, WIDE, W)  # pyright: ignore
    scale, gate = 1.0 + _read(S, w, there), _read(G, w, there)
    d_shift = tl.zeros([WIDE], tl.float32)
    d_scale, d_gate, d_bias = d_shift, d_shift, d_shift
    x, d_h, d_x = _ahead(X2, DH, DX2, first * W + w, there, RESIDUAL)
    if REST:
        w_r, there_r = _features(WIDE, REST, W)
        scale_r, gate_r = 1.0 + _read(S, w_r, there_r), _read(G, w_r, there_r)
        d_shift_r = tl.zeros([REST], tl.float32)
        d_scale_r, d_gate_r, d_bias_r = d_shift_r, d_shift_r, d_shift_r
        x_r, d_h_r, d_x_r = _ahead(X2, DH, DX2, first * W + w_r, there_r, RESIDUAL)

    for row in range(first, last):
        at = row * W + w
        mean, rstd = tl.load(MEAN + row), tl.load(RSTD + row)
        if ANEW:
            scale = 1.0 + _read(S, w, there)
        n, d_n, d_shift, d_scale = _of_norm(x, d_h, scale, mean, rstd, d_shift, d_scale)
        d_x2 = d_x.to(tl.float32)
        x, d_h, d_x = _ahead(X2, DH, DX2, at + W, there & (row + 1 < last), RESIDUAL)
        along, d_mean = tl.sum(n * d_n, 0), tl.sum(d_n, 0)
        if REST:
            at_r = row * W + w_r
            n_r, d_n_r, d_shift_r, d_scale_r = _of_norm(
                x_r, d_h_r, scale_r, mean, rstd, d_shift_r, d_scale_r
            )
            d_x2_r = d_x_r.to(tl.float32)
            more = there_r & (row + 1 < last)
            x_r, d_h_r, d_x_r = _ahead(X2, DH, DX2, at_r + W, more, RESIDUAL)
            along += tl.sum(n_r * d_n_r, 0)
            d_mean += tl.sum(d_n_r, 0)
        along, d_mean = along / W, 0.0 if RMS else d_mean / W
        d = (d_n - d_mean - n * along) * rstd
        if RESIDUAL:
            d += d_x2
        if ANEW:
            gate = _read(G, w, there)
        d_gate, d_bias = _of_stream(d, Y, gate, DX, DY, at, there, d_gate, d_bias, BIAS)
        if REST:
            d_r = (d_n_r - d_mean - n_r * along) * rstd
            if RESIDUAL:
                d_r += d_x2_r
            d_gate_r, d_bias_r = _of_stream(
                d_r, Y, gate_r, DX, DY, at_r, there_r, d_gate_r, d_bias_r, BIAS
            )

    SUMS += (image * chunks + chunk).to(tl.int64) * (3 + BIAS) * W
    d_bias *= gate
    _store_sums(SUMS, w, there, d_shift, d_scale, d_gate, d_bias, W, BIAS)
    if REST:
        d_bias_r *= gate_r
        _store_sums(SUMS, w_r, there_r, d_shift_r, d_scale_r, d_gate_r, d_bias_r, W, BIAS)


def _tiles(width: int) -> dict[str, Any]:
    wide, rest = triton.next_power_of_2(width), 0
    if 4 * width < 3 * wide:
        wide //= 2
        rest = triton.next_power_of_2(width - wide)
    return {"W": width, "WIDE": wide, "REST": rest}


@operator("flash_jvp_training::residual_norm")
def _forward(
    x: Tensor, gate: Tensor, y: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor,
    t_x: Tensor | None, t_gate: Tensor | None, t_y: Tensor | None,
    t_shift: Tensor | None, t_scale: Tensor | None, rms: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``bias`` is not read, it is there for autograd."""
    inputs = (x, gate, y, shift, scale, t_x, t_gate, t_y, t_shift, t_scale)

    def launch(*results: Tensor) -> Launch:
        images, tokens, width = x.shape
        rows = (gate, shift, scale, t_gate, t_shift, t_scale)
        moving = 0 if t_x is None else len(t_x)
        constexprs = _tiles(width) | {"RMS": rms, "TANGENT": t_x is not None}
        constexprs["num_warps"] = max(1, triton.next_power_of_2(width) // 1024)
        args = (*inputs, *results, images, tokens, moving, *map(_stride, rows))
        return Launch(_residual_norm_forward, (images * tokens,), args, constexprs)

    what = ("residual norm", rms, dtype)
    x2, h, mean, rstd, t_x2, t_h = launched(what, inputs, lambda: _outputs(x, t_x, dtype), launch)
    return x2, h, mean, rstd, t_x2, t_h


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _outputs(x: Tensor, t_x: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x', h, mean, rstd, t_x', t_h; the last two empty where there is no tangent."""
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    value, tangent = (
        [
            torch.empty_like(a, dtype=of) if a is not None else x.new_empty(0)
            for of in (x.dtype, dtype)
        ]
        for a in (x, t_x)
    )
    return *value, mean, rstd, *tangent


@_forward.register_fake
def _(x, gate, y, bias, shift, scale, t_x, t_gate, t_y, t_shift, t_scale, rms, dtype):
    return _outputs(x, t_x, dtype)


@operator("flash_jvp_training::residual_norm_backward")
def _backward(
    x: Tensor, gate: Tensor, y: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    d_x: Tensor | None, d_h: Tensor, rms: bool, bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_x, d_y and the sums (images, 3 or 4, W) of d_b, d_s, d_g and, with ``bias``, d_y; ``x`` is
    x', ``d_x`` that of x'.
    """
    images, tokens, width = x.shape
    inputs = (x, gate, y, scale, mean, rstd, d_x, d_h)

    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        chunks = cdiv(tokens, _rows(images, tokens, _warps(x)))
        sums = x.new_empty((images, chunks, 3 + bias, width), dtype=torch.float32)
        return torch.empty_like(x), torch.empty_like(y), sums

    def launch(*results: Tensor) -> Launch:
        warps, chunks = _warps(x), results[-1].shape[1]
        rows = _rows(images, tokens, warps)
        constexprs = _tiles(width) | {"BIAS": bias, "RMS": rms, "RESIDUAL": d_x is not None}
        constexprs |= {"num_warps": warps, "ANEW": constexprs["WIDE"] == 1024 * warps}
        args = (*inputs, *results, tokens, chunks, rows, _stride(gate), _stride(scale))
        return Launch(_residual_norm_backward, (images, chunks), args, constexprs)

    into, d_y, sums = launched(("residual norm backward", rms, bias), inputs, outputs, launch)
    return into, d_y, sum_parts(sums.flatten(2)).view(images, 3 + bias, width)


def _warps(x: Tensor) -> Any:
    """Of a program of the backward kernel, by what their registers hold of a token."""
    return triton.next_power_of_2(cdiv(x.shape[-1], 768 if x.element_size() == 2 else 576))


def _rows(images: int, tokens: int, warps: int) -> int:
    """Tokens of a program of the backward kernel."""
    rows, most = ROWS
    while rows < most and images * cdiv(tokens, 2 * rows) * warps >= WARPS:
        rows *= 2
    return rows


@_backward.register_fake
def _(x, gate, y, scale, mean, rstd, d_x, d_h, rms, bias):
    sums = x.new_empty((len(x), 3 + bias, x.shape[-1]), dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(y), sums


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, gate, y, bias, shift, scale, *_, rms, _ = inputs
    x2, _, mean, rstd, t_x2, t_h = output
    ctx.mark_non_differentiable(mean, rstd, t_x2, t_h)
    ctx.save_for_backward(x2, gate, y, scale, mean, rstd)
    ctx.rms = rms
    ctx.dtypes = [None if a is None else a.dtype for a in (gate, bias, shift, scale)]
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, d_x2: Tensor | None, d_h: Tensor | None, *_: Any) -> tuple:
    x, gate, y, scale, mean, rstd = ctx.saved_tensors
    if d_h is None:
        d_h = torch.zeros_like(x)
    if d_x2 is not None:
        d_x2 = d_x2.contiguous()
    bias = ctx.needs_input_grad[3]
    d_x, d_y, sums = _backward(x, gate, y, scale, mean, rstd, d_x2, d_h.contiguous(), ctx.rms, bias)
    d_shift, d_scale, d_gate, *rest = sums.unbind(1)
    of_gate, of_bias, of_shift, of_scale = ctx.dtypes
    d_bias = rest[0].sum(0).to(of_bias) if bias else None
    vectors = d_shift.to(of_shift), d_scale.to(of_scale)
    return d_x, d_gate.to(of_gate), d_y, d_bias, *vectors, *(None,) * 7


torch.library.register_autograd("flash_jvp_training::residual_norm", _grad, setup_context=_setup)


def residual_norm(
    x: Tensor, gate: Tensor, y: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor,
    tangents: tuple[Tensor, ...] | None, rms: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """x', h and, with ``tangents`` (of x, g, y, b and s), theirs, constants.

    x, y (B, N, W); gate, shift, scale (B, W), any stride between rows; tangents of the last n
    images. h is of ``dtype``. ``bias`` (W,), already in y, is there for its gradient alone: whoever
    makes y adds ``bias.detach()``.
    """
    given = (None,) * 5 if tangents is None else tangents
    x2, h, _, _, t_x2, t_h = _forward(x, gate, y, bias, shift, scale, *given, rms, dtype)
    return (x2, h, None, None) if tangents is None else (x2, h, t_x2, t_h)


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels take these: of at most ``MAX_WIDTH`` features, and as many rows each."""
    return all(takes(x) and x.shape[-1] <= MAX_WIDTH and len(x) == len(tensors[0]) for x in tensors)
