"""The Triton implementation: the same four functions as `reference`, for (B, H, L, D) tensors on
one device. Each allocates its results and names its launches; `plans` makes them.
"""

# Triton's annotations name what a kernel receives, not what its caller passes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..options import Options, empty_rows, row_strides, tf32_allowed
from . import configs, plans, vendor
from .backward import keys_kernel, queries_kernel, row_sums_kernel
from .forward import forward_kernel
from .launch import (
    Problem,
    cdiv,
    has_warpgroups,
    is_unit,
    mask,
    operand,
    packed,
    pointer,
    problem,
    readable_mask,
    unit,
)
from .plans import Launch


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """(O, LSE)."""
    q, k, v = map(unit, (q, k, v))
    if vendor.serves(q, k, v, bias, options):
        out, lse = vendor.forward(q, k, v, options)
        return _laid_out(out, q, options), lse
    out, lse = _outputs(q, v, bias, options)
    _forward(q, k, v, bias, seed, None, None, None, None, out, None, lse, None, options)
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
    out, lse = _outputs(q, v, bias, options)
    t_out, mu = torch.empty_like(out), _row_vector(q)
    _forward(q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu, options)
    return out, t_out, lse, mu


def prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    options: Options,
    jvp: bool,
) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The launches that a forward pass with these tensors left, as a function of others like them:
    (q, k, v, mask, tq, tk, tv) -> (O, tO). None where it had to copy one, or may be the vendor's.
    """
    given = (q, k, v, t_q, t_k, t_v)
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if not all(x is None or is_unit(x) for x in given) or (not jvp and pairs >= vendor.PAIRS):
        return None
    inputs = (q, k, v, readable_mask(mask), None, t_q, t_k, t_v, None)
    found = plans.find(_forward_key(q, options, jvp), inputs)
    if found is None:
        return None
    q, v = (torch.empty_strided(x.shape, x.stride(), device="meta") for x in (q, v))  # no memory
    out, rows = ((x.shape, x.stride()) for x in _outputs(q, v, mask, options))
    bool_mask = mask is not None and mask.dtype == torch.bool

    def launch(q, k, v, mask, t_q, t_k, t_v):
        device = q.device
        o = q.new_empty_strided(*out)
        lse = torch.empty_strided(*rows, dtype=torch.float32, device=device)
        t_o = torch.empty_like(o) if jvp else None
        mu = lse if jvp else None  # nobody reads either
        mask = mask.view(torch.int8) if bool_mask else mask
        tensors = (q, k, v, mask, None, t_q, t_k, t_v, None, o, t_o, lse, mu)
        plans.launch(found, tensors, device)
        return o, t_o

    return launch


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


def _forward(q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu, options):
    seed, bias, t_bias = packed(seed), readable_mask(bias), readable_mask(t_bias)

    def launches() -> Iterator[Launch]:
        p = problem(q, k, v, bias, options, t_q, t_k, t_v)
        hopper = _hopper(p) if t_out is not None else None
        if hopper is not None and hopper.serves_forward(p, bias, t_bias):
            yield hopper.forward_jvp(p, q, k, v, bias, t_q, t_k, t_v, out, t_out, lse, mu)
            return
        tile = p.tile("forward", jvp=t_out is not None)
        args = (
            operand(q, p, tile.BM, p.block_d),
            operand(k, p, tile.BN, p.block_d),
            operand(v, p, tile.BN, p.block_dv),
            operand(t_q, p, tile.BM, p.block_d),
            operand(t_k, p, tile.BN, p.block_d),
            operand(t_v, p, tile.BN, p.block_dv),
            *(mask(bias, p), mask(t_bias, p), seed),
            *(pointer(out), pointer(t_out), lse, mu),
            *p.numbers(seed),
        )
        switches = {
            "PRESCALE": bias is not None or options.scale <= 0.0,
            **p.switches("forward", tile, whole=p.S % tile.BN == 0 and not options.causal),
        }
        yield Launch(forward_kernel, (cdiv(p.L, tile.BM) * p.B * p.H,), args, switches)

    inputs = (q, k, v, bias, seed, t_q, t_k, t_v, t_bias)
    key = _forward_key(q, options, t_out is not None)
    plans.run(key, inputs, (out, t_out, lse, mu), launches)


def _forward_key(q: Tensor, options: Options, jvp: bool) -> tuple:
    return "forward", jvp, options, q.dtype == torch.float32 and tf32_allowed()


def _backward(
    d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
    options, bias_grad,
) -> Any:  # fmt: skip
    jvp = d_t_out is not None
    q, k, v, t_q, t_k, t_v = map(unit, (q, k, v, t_q, t_k, t_v))
    d_out, d_t_out, out, t_out = map(unit, (d_out, d_t_out, out, t_out))
    if not jvp and vendor.serves(q, k, v, bias, options, out, d_out):
        grads = vendor.backward(d_out, q, k, v, out, lse, options)
        return *map(_laid_out, grads, (q, k, v), (options,) * 3), *(None,) * 5
    of_q_k_v: Any = (q, k, v)
    d_q, d_k, d_v = (empty_rows(x, x.shape[3], options) for x in of_q_k_v)
    d_t_q, d_t_k, d_t_v = (empty_rows(x, x.shape[3], options) if jvp else None for x in of_q_k_v)
    d_bias = _bias_accumulator(bias, q, k) if bias_grad else None
    d_t_bias = _bias_accumulator(bias, q, k) if bias_grad and jvp else None
    w_sum = _row_vector(q)
    h_sum = _row_vector(q) if jvp else None
    statistics = _padded_row_vectors(q) if jvp and bias is None and has_warpgroups(q) else None
    seed, lse, mu = map(packed, (seed, lse, mu))
    mask_, t_mask = readable_mask(bias), readable_mask(t_bias)

    def launches() -> Iterator[Launch]:
        p = problem(q, k, v, mask_, options, t_q, t_k, t_v, d_out, d_t_out)
        hopper = _hopper(p) if statistics is not None else None
        sums = (
            *map(pointer, (d_out, d_t_out, out, t_out)),
            *(lse, mu, h_sum, w_sum, statistics, p.H, p.L),
        )
        warps = 8 if p.block_dv > 64 else 4
        switches = {"DV": p.DV, "BLOCK_DV": p.block_dv, "BM": 64, "num_warps": warps}
        yield Launch(row_sums_kernel, (cdiv(p.L, 64) * p.B * p.H,), sums, switches)

        def inputs(tile):
            """The arguments that both gradient kernels begin with."""
            return (
                operand(q, p, tile.BM, p.block_d),
                operand(k, p, tile.BN, p.block_d),
                operand(v, p, tile.BN, p.block_dv),
                operand(t_q, p, tile.BM, p.block_d),
                operand(t_k, p, tile.BN, p.block_d),
                operand(t_v, p, tile.BN, p.block_dv),
                *(mask(mask_, p), mask(t_mask, p), seed),
                operand(d_out, p, tile.BM, p.block_dv),
                operand(d_t_out, p, tile.BM, p.block_dv),
                *(lse, mu, h_sum, w_sum),
            )

        numbers = p.numbers(seed)
        together = (d_k, d_t_k, d_v, d_t_v)
        apart = (None, None, d_v, d_t_v), (d_k, d_t_k, None, None)
        wide = jvp and max(p.block_d, p.block_dv) >= configs.SPLIT_KEYS
        tile = p.tile("keys", jvp)
        if hopper is not None and not hopper.serves_backward(p, t_q, t_k, t_v):
            hopper = None
        if hopper is not None:
            yield hopper.keys(p, q, k, v, t_q, t_k, t_v, d_out, d_t_out, statistics, *together)
        for grads in () if hopper is not None else apart if wide else (together,):
            args = (*inputs(tile), *map(pointer, grads), *numbers)
            switches = p.switches("keys", tile, whole=p.L % tile.BM == 0)
            switches["SINGLE"] = p.S <= tile.BN and not options.sharded
            yield Launch(keys_kernel, (cdiv(p.S, tile.BN) * p.B * p.Hk,), args, switches)
        if hopper is not None and hopper.serves_queries(p):
            yield hopper.queries(p, q, k, v, t_q, t_k, t_v, d_out, d_t_out, statistics, d_q, d_t_q)
            return
        tile = p.tile("queries", jvp)
        args = (
            *inputs(tile),
            *map(pointer, (d_q, d_t_q)),
            *(mask(d_bias, p), mask(d_t_bias, p)),
            *numbers,
        )
        switches = {
            **p.switches("queries", tile, whole=p.S % tile.BN == 0 and not options.causal),
            "SINGLE": p.S <= tile.BN and not options.sharded,
            "BIAS_ROWS": d_bias is not None and d_bias.shape[2] == p.L,
            "BIAS_COLUMNS": d_bias is not None and d_bias.shape[3] == p.S,
        }
        yield Launch(queries_kernel, (cdiv(p.L, tile.BM) * p.B * p.H,), args, switches)

    given = (q, k, v, mask_, seed, t_q, t_k, t_v, t_mask, d_out, d_t_out, out, t_out, lse, mu)
    grads = (d_q, d_k, d_v, d_bias, d_t_q, d_t_k, d_t_v, d_t_bias)
    accumulator = None if d_bias is None else d_bias.shape
    key = ("backward", options, accumulator, d_q.dtype == torch.float32 and tf32_allowed())
    plans.run(key, given, (*grads, w_sum, h_sum, statistics), launches)
    d_bias, d_t_bias = (_bias_grad(g, bias) for g in (d_bias, d_t_bias))
    return d_q, d_k, d_v, d_bias, d_t_q, d_t_k, d_t_v, d_t_bias


def _hopper(p: Problem) -> ModuleType | None:
    """The warp-specialised passes, where they can run: Gluon is not imported elsewhere."""
    return import_module(".launch_hopper", __package__) if p.warpgroups and p.tma else None


def _outputs(q: Tensor, v: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """O, and the row statistics: LSE (B, H, L); with a floating mask m and log l apart, (B, H, L,
    2)."""
    split = bias is not None and bias.dtype != torch.bool
    return empty_rows(q, v.shape[3], options), _row_vector(q, *[2] * split)


def _row_vector(q: Tensor, *more: int) -> Tensor:
    return q.new_empty(*q.shape[:3], *more, dtype=torch.float32)


def _padded_row_vectors(q: Tensor) -> Tensor:
    """What `row_sums_kernel` leaves for `hopper_keys.py` and `hopper_queries.py`."""
    return q.new_empty(*q.shape[:2], 4, cdiv(q.shape[2], 64) * 64, dtype=torch.float32)


def _laid_out(result: Tensor, x: Tensor, options: Options) -> Tensor:
    """cuDNN's result with the strides that ours has beside x, which it has already as a rule."""
    if result.stride() == row_strides(x, result.shape[3], options):
        return result
    return empty_rows(x, result.shape[3], options).copy_(result)


def _bias_accumulator(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Where the atomic additions of a bias's gradient go: its own shape, in float32; the full shape
    where PyTorch is told to be deterministic, so that no two additions meet."""
    full = (*q.shape[:3], k.shape[2])
    shape = full if torch.are_deterministic_algorithms_enabled() else bias.shape
    return torch.zeros(shape, dtype=torch.float32, device=bias.device)


def _bias_grad(accumulator: Tensor | None, bias: Tensor) -> Tensor | None:
    return None if accumulator is None else accumulator.sum_to_size(bias.shape).to(bias.dtype)
