"""Launches of the portable kernels, which support every problem."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ... import call
from ...call import Band
from .. import configs
from ..block_info import band
from ..launch_cache import Launch
from ..problem import (
    Call,
    Operands,
    Problem,
    blocks_pointer,
    cdiv,
    in_units,
    mask_pointer,
    multiprocessors,
    operand,
    pointer,
)
from .bwd_dkdv import bwd_dkdv_kernel
from .bwd_dq import bwd_dq_kernel
from .bwd_preprocess import bwd_preprocess_kernel
from .forward import forward_kernel
from .repair import repair_kernel
from .split import split_kernel

MOST_ITEMS = 64  # tiles that one program of the repair looks at


def unsupported_reason(name: str, _p: Problem, c: Call) -> str | None:
    """Why a pass cannot take the problem; None where it does."""
    return None if c.sums is None or name != "bwd_dkdv" else "gives no sums of dQ"


def needs_row_sums(_p: Problem, _c: Call) -> bool:
    """Whether gradients read w, and h, of `bwd_preprocess`."""
    return True


def launches(name: str, p: Problem, c: Call) -> Iterator[Launch]:
    """Those of a pass."""
    return PASSES[name.removesuffix("_jvp")](name, p, c)


def _fwd(name: str, p: Problem, c: Call) -> Iterator[Launch]:
    tile = p.tile(name)
    out, lse, t_out, mu = c.saved
    args = (
        *_operands(name, p, c, tile, c.x.kv_blocks),
        pointer(out),
        pointer(t_out),
        lse,
        mu,
        *p.scalars(c.x.seed),
        None,
    )
    constexprs = {
        "PRESCALE": p.mask or p.spec.softcap > 0.0 or p.spec.scale <= 0.0,
        **_constexprs(name, p, tile),
        "WHOLE": _keys_whole(p, tile),
    }
    yield Launch(forward_kernel, _grid(p, p.L, tile.BLOCK_M, p.H), args, constexprs)


def repair(p: Problem, c: Call) -> Launch:
    """The forward with its JVP once more, of those tiles where another kernel left an LSE NaN."""
    (whole,) = _fwd("fwd_jvp", p, c)
    (items,) = whole.grid
    share = min(cdiv(items, multiprocessors(c.x.q.device)), MOST_ITEMS)
    args = (*whole.args[:-1], items, share)
    constexprs = {**whole.constexprs, "MOST": MOST_ITEMS}
    return Launch(repair_kernel, (cdiv(items, share),), args, constexprs)


def _split(_name: str, p: Problem, c: Call) -> Iterator[Launch]:
    """Of each tensor and its tangent, where the call has room for their parts."""
    x, y = c.operands, c.parts or ()
    for pair in zip(x[::2], x[1::2], y[::2], y[1::2], strict=False):
        given = [z for z in pair if z is not None]
        if not given:
            continue
        (B, heads, rows, D), width = given[0].shape, given[-1].shape[3]
        constexprs = {"PARTS": width // p.widest, "D": D, "BLOCK_D": p.widest, "BLOCK": 64}
        args = (*map(pointer, pair), heads, rows)
        yield Launch(split_kernel, (cdiv(rows, 64) * B * heads,), args, constexprs)


def _bwd_preprocess(_name: str, p: Problem, c: Call) -> Iterator[Launch]:
    out, lse, t_out, mu = c.saved
    *pointers, unit = in_units(c.d_out, c.d_t_out, out, t_out if c.jvp else None)
    args = (
        *pointers,
        *(lse, mu if c.jvp else None, c.h_sum, c.w_sum, c.statistics, c.sums, c.x.cu_q),
        *(p.H, p.L, p.sequences),
    )
    D1, D2 = configs.pieces(p.DV)
    constexprs = {"DV": p.DV, "D1": D1, "D2": D2, "BLOCK_M": 64, "UNIT": unit}
    constexprs["SEQUENCES"] = p.sequence_slots
    # sums of columns cross the warps: two took 25 us at (96, 12, 256, 64), four 30, eight 34
    constexprs["num_warps"] = 2 if c.sums is not None else 8 if p.DV > 64 else 4
    yield Launch(bwd_preprocess_kernel, (p.tiles(p.L, 64) * p.B * p.H,), args, constexprs)


def _bwd_dkdv(name: str, p: Problem, c: Call) -> Iterator[Launch]:
    if p.sequences is not None:  # queries of the next one are not checked for behind TMA
        p = p._replace(tma=False)
    for row, grads in _results(name, p, c):
        tile = p.tile(row)
        constexprs = {
            **_constexprs(row, p, tile),
            "WHOLE": p.L % tile.BLOCK_M == 0 and p.sequences is None,
            "SINGLE": _single(p, tile),
        }
        given = _given(row, p, c, tile, c.x.q_blocks)
        args = (*given, *map(pointer, grads), *p.scalars(c.x.seed))
        grid = _grid(p, p.S, tile.BLOCK_N, p.Hk)
        yield Launch(bwd_dkdv_kernel, grid, args, constexprs)


def _results(name: str, p: Problem, c: Call) -> Iterator[tuple[str, tuple]]:
    """What each launch of `bwd_dkdv_kernel` computes, and its row in the table of tiles."""
    d, d_t = c.grads, c.t_grads
    values, keys = (None, None, d.v, d_t.v), (d.k, d_t.k, None, None)
    if c.jvp and p.parts("bwd_dv_jvp") > 1:
        yield from (("bwd_dv_jvp", values), ("bwd_dk_jvp", keys))
    elif c.jvp and p.widest >= configs.SPLIT_DKDV:
        yield from ((name, values), (name, keys))
    else:
        yield name, (d.k, d_t.k, d.v, d_t.v)


def _bwd_dq(name: str, p: Problem, c: Call) -> Iterator[Launch]:
    tile = p.tile(name)
    d, d_t = c.grads, c.t_grads
    args = (
        *_given(name, p, c, tile, c.x.kv_blocks),
        *map(pointer, (d.q, d_t.q)),
        *(mask_pointer(d.mask, p), mask_pointer(d_t.mask, p)),
        *p.scalars(c.x.seed),
    )
    constexprs = {
        **_constexprs(name, p, tile),
        "WHOLE": _keys_whole(p, tile),
        "SINGLE": _single(p, tile),
        "MASK_ROWS": d.mask is not None and d.mask.shape[2] == p.L,
        "MASK_COLUMNS": d.mask is not None and d.mask.shape[3] == p.S,
    }
    yield Launch(bwd_dq_kernel, _grid(p, p.L, tile.BLOCK_M, p.H), args, constexprs)


PASSES = {
    "split": _split,
    "fwd": _fwd,
    "bwd_preprocess": _bwd_preprocess,
    "bwd_dkdv": _bwd_dkdv,
    "bwd_dq": _bwd_dq,
}


def _multiplied(name: str, p: Problem, c: Call) -> Operands:
    """The operands of a pass, or their parts."""
    return c.operands if c.parts is None or p.parts(name) == 1 else c.parts


def _operands(name: str, p: Problem, c: Call, tile: configs.Tile, blocks: Tensor | None) -> tuple:
    """The arguments that every kernel but the first begins with."""
    q, t_q, k, t_k, v, t_v, *_ = _multiplied(name, p, c)
    mask, seed, cu_q, cu_k = c.x[3:7]
    of_q, of_v = p.columns(name)
    return (
        operand(q, p, tile.BLOCK_M, of_q),
        operand(k, p, tile.BLOCK_N, of_q),
        operand(v, p, tile.BLOCK_N, of_v),
        operand(t_q, p, tile.BLOCK_M, of_q),
        operand(t_k, p, tile.BLOCK_N, of_q),
        operand(t_v, p, tile.BLOCK_N, of_v),
        *(mask_pointer(mask, p), mask_pointer(c.t.mask, p), seed, cu_q, cu_k),
        blocks_pointer(blocks, p),
    )


def _given(name: str, p: Problem, c: Call, tile: configs.Tile, blocks: Tensor | None) -> tuple:
    """The arguments that both gradient kernels begin with."""
    *_, d_out, d_t_out = _multiplied(name, p, c)
    _, of_v = p.columns(name)
    return (
        *_operands(name, p, c, tile, blocks),
        operand(d_out, p, tile.BLOCK_M, of_v),
        operand(d_t_out, p, tile.BLOCK_M, of_v),
        *(c.saved.lse, c.saved.mu if c.jvp else None, c.h_sum, c.w_sum),
    )


def _constexprs(name: str, p: Problem, tile: configs.Tile) -> dict[str, Any]:
    """Compile-time arguments that the kernels share."""
    of_q, of_v = p.columns(name)
    return {
        "GROUP": p.H // p.Hk,
        "D": p.D,
        "DV": p.DV,
        "BLOCK_D": of_q,
        "BLOCK_DV": of_v,
        **band(p.spec),
        "SEQUENCES": p.sequence_slots,
        "BLOCK_Q": p.spec.block_q,
        "BLOCK_K": p.spec.block_k,
        "BOOL": p.bool_mask,
        "PRECISION": p.precision(name),
        "PARTS": p.parts(name),
        "TMA": p.tma,
        **tile._asdict(),
    }


def _grid(p: Problem, rows: int, block: int, heads: int) -> tuple[int]:
    """A program for each tile of rows of each head."""
    return (p.tiles(rows, block) * p.B * heads,)


def _keys_whole(p: Problem, tile: configs.Tile) -> bool:
    """Whether every query sees every key of every tile, but for a mask."""
    return p.S % tile.BLOCK_N == 0 and p.sequences is None and call.band(p.spec) == Band()


def _single(p: Problem, tile: configs.Tile) -> bool:
    return p.S <= tile.BLOCK_N and not p.spec.sharded
