"""The Triton implementation: the same four functions as `reference`, for (B, H, L, D) tensors on
one device.
"""

# Triton's annotations name what a kernel receives, not what its caller passes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import configs, vendor
from .backward import keys_kernel, queries_kernel, row_sums_kernel
from .forward import forward_kernel
from .launch import Problem, cdiv, mask, on_device, operand, packed, pointer, problem, unit


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """(O, LSE)."""
    q, k, v = map(unit, (q, k, v))
    p = problem(q, k, v, bias, options)
    if vendor.serves(p, q, k, v):
        return vendor.forward(p, q, k, v)
    out, lse = _outputs(q, v, bias)
    _forward(p, q, k, v, bias, seed, None, None, None, None, out, None, lse, None)
    return out, lse


def forward_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    t_bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(O, tO, LSE, μ); an absent tangent is zero."""
    q, k, v, t_q, t_k, t_v = map(unit, (q, k, v, t_q, t_k, t_v))
    p = problem(q, k, v, bias, options, t_q, t_k, t_v)
    out, lse = _outputs(q, v, bias)
    t_out, mu = torch.empty_like(out), _row_vector(q)
    hopper = _hopper(p)
    if hopper is not None and hopper.serves_forward(p, bias, t_bias):
        hopper.forward_jvp(p, q, k, v, bias, t_q, t_k, t_v, out, t_out, lse, mu)
    else:
        _forward(p, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu)
    return out, t_out, lse, mu


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: Options,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dQ, dK, dV, db); db is None unless `bias_grad`."""
    return _backward(
        d_out, None, q, k, v, bias, seed, None, None, None, None, out, None, lse, None,
        options, bias_grad,
    )[:4]  # fmt: skip


def backward_jvp(
    d_out: Tensor | None,
    d_t_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    t_bias: Tensor | None,
    out: Tensor,
    t_out: Tensor,
    lse: Tensor,
    mu: Tensor,
    options: Options,
    bias_grad: bool,
) -> tuple[Tensor | None, ...]:
    """(dQ, dK, dV, db, dtQ, dtK, dtV, dtb); db and dtb are None unless `bias_grad`."""
    return _backward(
        d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
        options, bias_grad,
    )  # fmt: skip


def _forward(p, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu):
    seed = packed(seed)
    tile = p.tile("forward", jvp=t_out is not None)
    grid = (cdiv(p.L, tile.BM) * p.B * p.H,)
    if grid[0] == 0:
        return
    with on_device(q):
        forward_kernel[grid](
            operand(q, p, tile.BM, p.block_d),
            operand(k, p, tile.BN, p.block_d),
            operand(v, p, tile.BN, p.block_dv),
            operand(t_q, p, tile.BM, p.block_d),
            operand(t_k, p, tile.BN, p.block_d),
            operand(t_v, p, tile.BN, p.block_dv),
            mask(bias, p),
            mask(t_bias, p),
            seed,
            pointer(out),
            pointer(t_out),
            lse,
            mu,
            *p.numbers(seed),
            PRESCALE=bias is not None or p.options.scale <= 0.0,
            **p.switches(tile, whole=p.S % tile.BN == 0 and not p.options.causal),
        )


def _backward(
    d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
    options, bias_grad,
) -> Any:  # fmt: skip
    jvp = d_t_out is not None
    q, k, v, t_q, t_k, t_v = map(unit, (q, k, v, t_q, t_k, t_v))
    d_out, d_t_out, out, t_out = map(unit, (d_out, d_t_out, out, t_out))
    seed, lse, mu = map(packed, (seed, lse, mu))
    p = problem(q, k, v, bias, options, t_q, t_k, t_v, d_out, d_t_out)
    if not jvp and vendor.serves(p, q, k, v, out, d_out):
        return *vendor.backward(p, d_out, q, k, v, out, lse), *(None,) * 5
    d_q, d_k, d_v = map(_contiguous_like, (q, k, v))
    d_t_q, d_t_k, d_t_v = (_contiguous_like(x) if jvp else None for x in (q, k, v))
    d_bias = _bias_accumulator(bias, p) if bias_grad else None
    d_t_bias = _bias_accumulator(bias, p) if bias_grad and jvp else None
    w_sum = _row_vector(q)
    h_sum = _row_vector(q) if jvp else None
    numbers = p.numbers(seed)
    hopper = _hopper(p) if jvp else None
    if hopper is not None and not hopper.serves_keys(p, t_q, t_k, t_v):
        hopper = None
    statistics = None if hopper is None else hopper.row_statistics(p, q)

    with on_device(q):
        BM = 64
        grid = (cdiv(p.L, BM) * p.B * p.H,)
        if grid[0] > 0:
            row_sums_kernel[grid](
                pointer(d_out), pointer(d_t_out), pointer(out), pointer(t_out), lse, mu,
                h_sum, w_sum, statistics, p.H, p.L, DV=p.DV, BLOCK_DV=p.block_dv, BM=BM,
            )  # fmt: skip

        def inputs(tile):
            """The arguments that both gradient kernels begin with."""
            return (
                operand(q, p, tile.BM, p.block_d),
                operand(k, p, tile.BN, p.block_d),
                operand(v, p, tile.BN, p.block_dv),
                operand(t_q, p, tile.BM, p.block_d),
                operand(t_k, p, tile.BN, p.block_d),
                operand(t_v, p, tile.BN, p.block_dv),
                mask(bias, p),
                mask(t_bias, p),
                seed,
                operand(d_out, p, tile.BM, p.block_dv),
                operand(d_t_out, p, tile.BM, p.block_dv),
                lse,
                mu,
                h_sum,
                w_sum,
            )

        together = (d_k, d_t_k, d_v, d_t_v)
        apart = (None, None, d_v, d_t_v), (d_k, d_t_k, None, None)
        wide = jvp and max(p.block_d, p.block_dv) >= configs.SPLIT_KEYS
        tile = p.tile("keys", jvp)
        grid = (cdiv(p.S, tile.BN) * p.B * p.Hk,)
        for grads in apart if wide else (together,):
            if hopper is not None:
                hopper.keys(p, q, k, v, t_q, t_k, t_v, d_out, d_t_out, statistics, *grads)
            elif grid[0] > 0:
                keys_kernel[grid](
                    *inputs(tile), *map(pointer, grads), *numbers,
                    **p.switches(tile, whole=p.L % tile.BM == 0),
                    SINGLE=p.S <= tile.BN,
                )  # fmt: skip
        tile = p.tile("queries", jvp)
        grid = (cdiv(p.L, tile.BM) * p.B * p.H,)
        if grid[0] > 0:
            queries_kernel[grid](
                *inputs(tile),
                *map(pointer, (d_q, d_t_q)), mask(d_bias, p), mask(d_t_bias, p), *numbers,
                **p.switches(tile, whole=p.S % tile.BN == 0 and not options.causal),
                SINGLE=p.S <= tile.BN,
                BIAS_ROWS=d_bias is not None and d_bias.shape[2] == p.L,
                BIAS_COLUMNS=d_bias is not None and d_bias.shape[3] == p.S,
            )  # fmt: skip
    d_bias, d_t_bias = (_bias_grad(g, bias) for g in (d_bias, d_t_bias))
    return d_q, d_k, d_v, d_bias, d_t_q, d_t_k, d_t_v, d_t_bias


def _hopper(p: Problem) -> ModuleType | None:
    """The warp-specialised passes, where they can run: Gluon is not imported elsewhere."""
    return import_module(".launch_hopper", __package__) if p.warpgroups and p.tma else None


def _outputs(q: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """O, and the row statistics: LSE (B, H, L); with a floating mask m and log l apart, (B, H, L,
    2)."""
    split = bias is not None and bias.dtype != torch.bool
    return q.new_empty(*q.shape[:3], v.shape[3]), _row_vector(q, *[2] * split)


def _row_vector(q: Tensor, *more: int) -> Tensor:
    return q.new_empty(*q.shape[:3], *more, dtype=torch.float32)


def _contiguous_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _bias_accumulator(bias: Tensor, p) -> Tensor:
    """Where the atomic additions of a bias's gradient go: its own shape, in float32; the full shape
    where PyTorch is told to be deterministic, so that no two additions meet."""
    full = (p.B, p.H, p.L, p.S)
    shape = full if torch.are_deterministic_algorithms_enabled() else bias.shape
    return torch.zeros(shape, dtype=torch.float32, device=bias.device)


def _bias_grad(accumulator: Tensor | None, bias: Tensor) -> Tensor | None:
    return None if accumulator is None else accumulator.sum_to_size(bias.shape).to(bias.dtype)
