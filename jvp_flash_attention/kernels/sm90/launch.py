"""Which problems the warp-specialised passes support, and their launches, for operands that TMA
reads."""

from collections.abc import Iterator
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ... import call
from ...call import Band, Tangents, is_default
from .. import configs
from ..block_info import band
from ..launch_cache import Launch
from ..portable.launch import repair
from ..problem import (
    DETAILS,
    Call,
    Problem,
    blocks_pointer,
    cdiv,
    in_units,
    multiprocessors,
    pointer,
    tma_can_read,
)
from .bwd import bwd_kernel
from .bwd_dkdv import bwd_dkdv_jvp_kernel
from .bwd_dq import bwd_dq_jvp_kernel
from .bwd_head import bwd_head_kernel
from .forward import forward_jvp_kernel
from .forward_plain import forward_kernel

# What a call may ask for beside a mask.
SUPPORTED = (*DETAILS, "causal", "left", "right", "lower_right", "block_q", "block_k")
LAYOUT_TYPES = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
    torch.int8: gl.int8,
}


def unsupported_reason(name: str, p: Problem, c: Call) -> str | None:
    """Why a pass cannot take the problem, or should not; None where it does."""
    if not p.tma or p.itemsize != 2:
        return "needs operands that TMA reads, in 16 bits"
    if not (p.D == p.DV <= 128 and p.D % 8 == 0):  # rows of the results, which TMA writes
        return f"needs D = Dv up to 128, a multiple of 8, got {p.D} and {p.DV}"
    if not is_default(p.spec, but=SUPPORTED):
        return f"has no dropout and no soft cap, got {p.spec}"
    if min(p.B, p.H, p.L, p.S) == 0:
        return "needs elements"
    if p.short(name) is not None:
        return "leaves short sequences to the portable kernels"
    if name == "fwd":
        return _not_without_tangent(p) or (None if p.spec.scale > 0.0 else "needs a scale > 0")
    if name == "fwd_jvp":
        if c.x.kv_blocks is not None and (p.mask or call.band(p.spec) != Band()):
            return "takes blocks alone"
        if p.mask and p.sequences is not None:
            return "takes no mask beside packed sequences"
        if p.spec.scale <= 0.0:
            return "needs a scale > 0"
        if c.x.mask is not None and _mask_kind(c.x.mask, p) == "":
            return "needs a mask that TMA or a row of keys can hold"
        return None if c.t.mask is None else _no_tangent_of(c.x.mask, c.t, p)
    if not c.jvp:
        return _not_in_one_launch(p, c)
    if p.mask or None in c.t[:3]:
        return "needs every tangent and no mask but causal"
    if p.S <= 64:
        return "leaves few keys to the portable kernels, which take h and w from the tile"
    if name == "bwd_dq_jvp" and p.D <= 64 and not _pays_for_dq(p):
        return "leaves head dims up to 64 to the portable kernel, which is as fast"
    return None


def _pays_for_dq(p: Problem) -> bool:
    """Whether dQ through the tangent is faster here at D = 64: a window, and a band of packed
    sequences, whose portable tiles are narrow and mostly checked."""
    left, right = call.band(p.spec)
    return p.D > 32 and (left is not None or (right is not None and p.sequences is not None))


def _not_without_tangent(p: Problem) -> str | None:
    """Why neither O alone nor its gradients can be computed, or should not; None where they are."""
    if p.mask or p.sequences is not None or not is_default(p.spec, but=DETAILS):
        return f"has no mask, band or packed sequences without a tangent, got {p.spec}"
    if p.D <= 32:
        return "leaves head dims up to 32 to the portable kernels, which do not pad them to 64"
    return None


def _not_in_one_launch(p: Problem, c: Call) -> str | None:
    """Why the gradients of O cannot be computed together, or should not; None where they are."""
    if reason := _not_without_tangent(p):
        return reason
    if p.Hk != p.H:
        return f"needs as many key heads as heads without a tangent, got {p.H} and {p.Hk}"
    if p.S <= 64:
        return "leaves few keys to the portable kernels, which take w from the tile"
    if c.sums is not None and p.L != p.S:
        return f"gives sums of as many queries as keys, got {p.L} and {p.S}"
    return None if all(map(tma_can_read, c.grads[:3])) else "needs results that TMA can write"


def needs_row_sums(p: Problem, c: Call) -> bool:
    """Whether gradients read w, and h, of `bwd_preprocess`, or compute w themselves."""
    return c.jvp or configs.whole_head(p.D, p.L, p.S) is None


def launches(name: str, p: Problem, c: Call) -> Iterator[Launch]:
    """Those of a pass. Where no tangent is there, dQ comes with dK and dV."""
    if name != "bwd_dq":
        yield PASSES[name](p, c)
    if name == "fwd_jvp" and _hides(p, c):
        yield repair(p, c)


def _fwd_jvp(p: Problem, c: Call) -> Launch:
    q, k, v, mask, *_ = c.x
    kind = "none" if mask is None else _mask_kind(mask, p)
    mask_bytes = 0 if mask is None else mask.element_size()
    schedule = configs.schedule(p.D, mask_bytes, c.t.mask is not None)
    N, D1, D2 = schedule.BLOCK_N, schedule.D1, schedule.D2
    packed, listed = p.sequences is not None, c.x.kv_blocks is not None
    tiles = p.tiles(p.L, 128)
    items = tiles * p.B * p.H
    bounds = band(p.spec)
    left, right = bounds["LEFT"], bounds["RIGHT"]
    banded = left is not None or right is not None
    triangle = right is not None and left is None and not packed
    pairs = listed or triangle  # late tiles may see more than early ones

    seen = N, _seen_keys(p)
    operands = (
        (q, 64), (k, *seen), (v, *seen), (c.t.q, 64), (c.t.k, *seen), (c.t.v, *seen),
        (c.saved.out, 64), (c.saved.t_out, 64),
    )  # fmt: skip
    args = (
        *_pieces(p, D1, D2, *operands),
        *_mask(mask, c.t.mask, kind, p, N),
        *(c.x.cu_q, c.x.cu_k, blocks_pointer(c.x.kv_blocks, p)),
        *(pointer(x if packed else None) for x in (c.saved.out, c.saved.t_out)),
        *(c.saved.lse, c.saved.mu, p.spec.scale, p.H, p.L, p.S, p.sequences, tiles, items),
    )
    constexprs = {
        "GROUP": p.H // p.Hk,
        **schedule._asdict(),
        **bounds,
        "PAIRS": pairs,
        "SEQUENCES": p.sequence_slots,
        "BLOCK_Q": p.spec.block_q,
        "BLOCK_K": p.spec.block_k,
        "EMPTY": mask is not None or left is not None or packed or listed,
        "EDGE": banded or packed or listed or p.S % N != 0,
        "MASK": kind,
        "BOOL": p.bool_mask,
        "THRESHOLD": _threshold(q),
        "HIDES": _hides(p, c),
        "num_warps": 4,
    }
    return Launch(forward_jvp_kernel, _grid(items, p, q, pairs), args, constexprs)


def _fwd(p: Problem, c: Call) -> Launch:
    schedule = configs.plain(p.D, p.L)
    q, k, v, *_ = c.x
    grid, work = _shares(p, cdiv(p.L, 64 * schedule.GROUPS), q)
    given = ((q, 64), (k, schedule.BLOCK_N), (v, schedule.BLOCK_N), (c.saved.out, 64))
    args = (
        *_pieces(p, schedule.D1, schedule.D2, *given),
        *(c.saved.lse, p.spec.scale, p.H, p.L, p.S, *work),
    )
    constexprs = {
        "GROUP": p.H // p.Hk,
        **schedule._asdict(),
        "EDGE": p.S % schedule.BLOCK_N != 0,
        "THRESHOLD": _threshold(q),
        "num_warps": 4,
    }
    return Launch(forward_kernel, grid, args, constexprs)


def _shares(p: Problem, tiles: int, x: Tensor) -> tuple[tuple[int], tuple[int, int, int]]:
    """The grid, and of the work items: tiles a head, after how many heads a tile of the same place
    comes to the same block again, and all."""
    items = tiles * p.B * p.H
    (blocks,) = grid = _grid(items, p, x, False)
    return grid, (tiles, blocks // gcd(blocks, tiles), items)


def _threshold(q: Tensor) -> str:
    """8 and 2, as PTX writes them: p̃, beside a tangent times its score, must fit float16."""
    return "0f41000000" if q.dtype == torch.bfloat16 else "0f40000000"


def _bwd(p: Problem, c: Call) -> Launch:
    if (head := configs.whole_head(p.D, p.L, p.S)) is not None:
        return _bwd_head(p, c, head)
    schedule = configs.backward(p.D)
    grid, work = _shares(p, cdiv(max(p.L, p.S), 64 * schedule.GROUPS), c.x.q)
    args = (
        *_operands(schedule, p, c),
        *(c.statistics, c.sums, p.spec.scale, p.H, p.L, p.S, *work),
    )
    constexprs = {"D": p.D, **schedule._asdict(), "EDGE": p.S % 64 != 0, "num_warps": 4}
    return Launch(bwd_kernel, grid, args, constexprs)


def _bwd_head(p: Problem, c: Call, head: configs.WholeHead) -> Launch:
    items = p.B * p.H
    out, unit = in_units(c.saved.out)
    args = (
        *_operands(head, p, c),
        *(c.saved.lse, out, c.sums, p.spec.scale, p.H, p.L, p.S, items),
    )
    constexprs = {"D": p.D, "UNIT": unit, **head._asdict(), "EDGE": p.S % 64 != 0, "num_warps": 4}
    return Launch(bwd_head_kernel, _grid(items, p, c.x.q, False), args, constexprs)


def _operands(schedule: configs.Backward | configs.WholeHead, p: Problem, c: Call) -> list:
    """Of the gradients of O, and results."""
    tensors = (*c.x[:3], c.d_out, *c.grads[:3])
    return _pieces(p, schedule.D1, schedule.D2, *((x, 64) for x in tensors))


def _bwd_dkdv_jvp(p: Problem, c: Call) -> Launch:
    pipeline = configs.pipeline(p.D)
    tiles = p.tiles(p.S, 64)
    items = tiles * p.B * p.Hk
    results = c.grads.k, c.t_grads.k, c.grads.v, c.t_grads.v
    args = (
        *_given(p, c, pipeline.D, c.x.q_blocks, results),
        *(p.spec.scale, p.Hk, p.L, p.S, p.sequences, tiles, items),
    )
    constexprs = {"STAGES_Q": pipeline.stages, "BLOCK_M": 64, **_constexprs(p, pipeline)}
    grid = _grid(items, p, c.x.q, constexprs["PAIRS"])
    return Launch(bwd_dkdv_jvp_kernel, grid, args, constexprs)


def _bwd_dq_jvp(p: Problem, c: Call) -> Launch:
    pipeline = configs.pipeline(p.D)
    tiles = p.tiles(p.L, 64)
    items = tiles * p.B * p.H
    args = (
        *_given(p, c, pipeline.D, c.x.kv_blocks, (c.grads.q, c.t_grads.q)),
        *(p.spec.scale, p.H, p.L, p.S, p.sequences, tiles, items),
    )
    edge = call.band(p.spec) != Band() or p.S % 64 != 0 or p.sequences is not None
    constexprs = {"STAGES_K": pipeline.stages, "BLOCK_N": 64, "EDGE": edge}
    constexprs |= _constexprs(p, pipeline)
    grid = _grid(items, p, c.x.q, constexprs["PAIRS"])
    return Launch(bwd_dq_jvp_kernel, grid, args, constexprs)


PASSES = {
    "fwd": _fwd,
    "fwd_jvp": _fwd_jvp,
    "bwd_dkdv": _bwd,
    "bwd_dkdv_jvp": _bwd_dkdv_jvp,
    "bwd_dq_jvp": _bwd_dq_jvp,
}


def _given(p: Problem, c: Call, columns: int, blocks: Tensor | None, results: tuple) -> tuple:
    """The arguments that both gradient kernels begin with, up to the results: as descriptors, and
    as pointers where packed sequences end inside of a tile."""
    packed = p.sequences is not None
    (q, k, v, *_), (t_q, t_k, t_v, _) = c.x, c.t
    keys = _seen_keys(p)
    return (
        *_squares(columns, q),
        *_squares(columns, k, v, length=keys),
        *_squares(columns, t_q),
        *_squares(columns, t_k, t_v, length=keys),
        *_squares(columns, c.d_out, c.d_t_out),
        *(c.statistics, c.x.cu_q, c.x.cu_k, blocks_pointer(blocks, p)),
        *_squares(columns, *results),
        *(pointer(x if packed else None) for x in results),
    )


def _pieces(p: Problem, D1: int, D2: int, *given: tuple) -> list:
    """Descriptors of (tensor, rows of a tile[, rows of a head]): of first pieces, then of second.

    A row of 72 columns ends in the middle of a sector of memory (32 bytes), where the next head of
    its token begins. A tile of columns 0 to 63 would cut two sectors of each row of an odd head,
    and stores to a part of one are slow. So odd heads begin with the short piece, in all operands.
    Heads then count by two. From an even one to the odd one behind it the long piece moves on by a
    head and the short piece's columns, the short piece by a head less the long piece's.
    """
    by_two = D2 > 0 and p.D % 16 > 0 and p.H == p.Hk > 1 and p.sequences is None
    if not by_two or any(x is not None and x.stride(1) < p.D for x, *_ in given):
        return [
            _descriptor(x, rows, D, *length) if x is not None and D else None
            for D in (D1, D2)
            for x, rows, *length in given
        ]
    return [
        None if x is None else _descriptor_by_two(x, rows, D, width, x.stride(1) + step, *length)
        for D, width, step in ((D1, D1, p.D - D1), (D2, p.D, -D1))
        for x, rows, *length in given
    ]


def _squares(columns: int, *tensors: Tensor | None, length: int | None = None) -> list:
    """Descriptors of tiles of 64 rows."""
    return [None if x is None else _descriptor(x, 64, columns, length) for x in tensors]


def _hides(p: Problem, c: Call) -> bool:
    """Whether a tile that the forward walks may hold a key that some of its rows do not see. One is
    walked where a list of blocks is empty."""
    structured = p.sequences is not None or c.x.kv_blocks is not None
    return p.mask or structured or call.band(p.spec) != Band()


def _seen_keys(p: Problem) -> int:
    """How many keys are seen at all. The others read as zero, whatever they hold."""
    right = call.band(p.spec).right
    if right is None or p.spec.lower_right or p.sequences is not None:
        return p.S
    return max(min(p.S, p.L + right), 1)


def _constexprs(p: Problem, pipeline: configs.Pipeline) -> dict[str, Any]:
    left, right = call.band(p.spec)  # whether rows see nothing matters to no gradient
    # tiles see more and more, or less and less
    pairs = (left is None) != (right is None) or p.spec.block_q is not None
    return {
        "GROUP": p.H // p.Hk,
        "D": pipeline.D,
        "LEFT": left,
        "RIGHT": right,
        "LOWER_RIGHT": p.spec.lower_right,
        "PAIRS": pairs and p.sequences is None,
        "SEQUENCES": p.sequence_slots,
        "BLOCK_Q": p.spec.block_q,
        "BLOCK_K": p.spec.block_k,
        "num_warps": 4,
    }


def _grid(items: int, p: Problem, x: Tensor, pairs: bool) -> tuple[int]:
    """A program a multiprocessor, which share out the tiles at launch. Beside a ring's transfers,
    which hold some multiprocessors, a program a tile: they begin as places become free.
    """
    blocks = cdiv(items, 2) if pairs else items
    return (blocks if p.spec.sharded else min(blocks, multiprocessors(x.device)),)


def _mask_kind(mask: Tensor, p: Problem) -> str:
    """full (L, S), keys (1, S), or nothing that the pass can read."""
    if mask.shape[3] != p.S or mask.dtype not in LAYOUT_TYPES:
        return ""
    if mask.shape[2] == 1 and p.L > 1:
        return "keys" if mask.stride(3) == 1 else ""
    solid = mask.as_strided(mask.shape, _solid_strides(mask))
    return "full" if mask.stride(3) == 1 and tma_can_read(solid) else ""


def _no_tangent_of(mask: Any, t: Tangents, p: Problem) -> str | None:
    """Why the tangent of a mask cannot be read beside it, if so."""
    t_mask: Any = t.mask
    alike = mask is not None and (mask.shape, mask.dtype) == (t_mask.shape, t_mask.dtype)
    if not alike or {_mask_kind(x, p) for x in (mask, t_mask)} != {"full"}:
        return "needs a mask (L, S) with a tangent of its own shape and dtype"
    if t.q is None and t.k is None:
        return "needs a tangent of q or k beside that of a mask"
    if p.D > 96 and mask.element_size() > 2:
        return "has no room for a float32 mask and its tangent above head dim 96"
    return None


def _mask(mask: Tensor | None, t_mask: Tensor | None, kind: str, p: Problem, BLOCK_N: int):
    """Descriptors of tiles, also of the tangent's, pointer to rows, and how far a batch entry and a
    head move either."""
    if mask is None:
        return None, None, None, 0, 0
    if kind == "full":
        tiles, t_tiles = (
            None if x is None else _descriptor(x, 64, BLOCK_N, strides=_solid_strides(x))
            for x in (mask, t_mask)
        )
        return tiles, t_tiles, None, int(mask.shape[0] > 1), int(mask.shape[1] > 1)
    b, h = (step if n > 1 else 0 for step, n in zip(mask.stride()[:2], mask.shape[:2], strict=True))
    return None, None, mask, b, h


def _solid_strides(x: Tensor) -> list[int]:
    """Strides that TMA accepts, also for dimensions of length 1."""
    step = x.stride(2) if x.shape[2] > 1 else 128
    return [s if n > 1 else step for s, n in zip(x.stride()[:3], x.shape, strict=False)] + [1]


def _descriptor(
    x: Tensor, rows: int, columns: int, length: int | None = None, strides: list[int] | None = None
):
    """Of the first `length` rows of each head."""
    block = [1, 1, rows, columns]
    layout: Any = _layout(rows, columns, x.dtype)
    shape = [*x.shape[:2], x.shape[2] if length is None else length, x.shape[3]]
    return TensorDescriptor(x, shape, strides or list(x.stride()), block, layout)


def _descriptor_by_two(
    x: Tensor, rows: int, columns: int, width: int, step: int, length: int | None = None
):
    """With even and odd heads in a dimension, `step` elements apart; rows have `width` elements."""
    B, H, L, _ = x.shape
    b, h, row, _ = x.stride()
    shape = [B, cdiv(H, 2), 2, L if length is None else length, width]
    layout: Any = _layout(rows, columns, x.dtype, 5)
    block = [1, 1, 1, rows, columns]
    return TensorDescriptor(x, shape, [b, 2 * h, step, row, 1], block, layout)


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype, rank: int = 4):
    block = [1] * (rank - 2) + [rows, columns]
    return gl.NVMMASharedLayout.get_default_for(block, LAYOUT_TYPES[dtype])
