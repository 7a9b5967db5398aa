"""Ranges without a tangent: their rows and keys cost what a plain call costs.

A backend above the one that a call names. Let only the queries R carry a tangent (`t_rows`), and
of the keys only C (`t_keys`), of all others it is zero by definition and not read:

    O    of every row what it is without ranges
    tO   of a row of R along tQ, tb, and tK and tV on C; of any other row 0

Nothing else changes: a gradient of O is the ordinary one, one of tO reaches every input, and of the
tangents those that were read.

    forward    the rows before, in and behind R are calls of their own; that of R is one of C, and
               one or two of the other keys, merged by their LSE (merge.py)
    backward   of (O, tO): the gradients of the same calls, from the O, tO, LSE and μ of all keys,
               added; rows outside have no dtO

Bounds of positions (causal, windows) move along with rows and keys, and keys that they hide from
all rows of a call are left out of it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import implementation
from .block_mask import layout_of, lists
from .call import (
    Band,
    Inputs,
    Saved,
    Spec,
    Tangents,
    band,
    banded,
    empty_rows,
    laid_out,
    without_ranges,
)
from .merge import merge, wide


class Part(NamedTuple):
    """A call of some rows and some keys."""

    rows: slice
    keys: slice
    spec: Spec
    t_rows: bool  # the rows carry a tangent
    t_keys: bool  # those of the keys are read


def forward(x: Inputs, t: Tangents | None, spec: Spec) -> Saved:
    """As `reference.forward`."""
    inner = without_ranges(spec)
    if t is None:
        return implementation(inner).forward(x, None, inner)
    t, split = _read(x, t, spec)
    calls = _calls(x, spec, split)
    if len(calls) == 1:
        return _merged(calls[0], x, t, spec)
    out = empty_rows(x.q, x.v.shape[3], spec)
    t_out = torch.empty_like(out)
    found = [
        _merged(parts, x, t, spec, (_rows(out, parts[0]), _rows(t_out, parts[0])))
        for parts in calls
    ]
    lse, mu = (torch.cat(y, 2) for y in zip(*[(y.lse, y.mu) for y in found], strict=True))
    return Saved(out, lse, t_out, mu)


def backward(
    d_out: Tensor | None,
    d_t_out: Tensor | None,
    x: Inputs,
    t: Tangents,
    saved: Saved,
    spec: Spec,
    mask_grad: bool,
) -> tuple[Tangents, Tangents]:
    """As `reference.backward`."""
    inner = without_ranges(spec)
    run = implementation(inner).backward
    if d_t_out is None:
        return run(d_out, None, x, Tangents(), Saved(*saved[:2]), inner, mask_grad)
    t, split = _read(x, t, spec)
    calls = [[y for part in parts for y in _squared(part)] for parts in _calls(x, spec, split)]
    first, second = (_zeros(x, spec, mask_grad, len(calls)) for _ in range(2))
    for parts in calls:
        of_rows = []
        for part in parts:
            if d_out is None and not part.t_rows:
                continue
            x_i, t_i = _inputs(x, part), _tangents(t, part)
            if part.t_rows and t.k is not None and t_i.q is None and t_i.k is None:
                t_i = t_i._replace(q=torch.zeros_like(x_i.q))  # tS is 0, but tS − μ is not
            d_o, d_t_o = (_rows(y, part) for y in (d_out, d_t_out if part.t_rows else None))
            saved_i = _saved(saved, part)
            spec_i = part.spec._replace(sharded=len(parts) > 1)
            d, d_t = run(d_o, d_t_o, x_i, t_i, saved_i, spec_i, mask_grad)
            of_rows.append((d.q, d_t.q))
            _add(first, d, part)
            _add(second, d_t, part)
        for total, grads in zip((first.q, second.q), zip(*of_rows, strict=True), strict=False):
            if grads[0] is not None:
                total[:, :, parts[0].rows] = _sum(grads)
    if spec.t_keys_stop is not None:
        for y in (second.k, second.v):
            _zero_outside(y, spec)
    first, second = (_narrow(y, x) for y in (first, second))
    return first, second


def _read(x: Inputs, t: Tangents, spec: Spec) -> tuple[Tangents, bool]:
    """The tangents, and whether their keys are split. A floating mask keeps its keys together,
    because a large one leaves an LSE no digits to weigh parts by: there t_k and t_v become zero
    outside of the range."""
    if spec.t_keys_stop is None or (t.k is None and t.v is None):
        return t, False
    if spec.t_keys_start == spec.t_keys_stop:
        return t._replace(k=None, v=None), False
    if x.mask is None or x.mask.dtype == torch.bool:
        return t, True
    k, v = (None if y is None else _zero_outside(y.clone(), spec) for y in (t.k, t.v))
    return t._replace(k=k, v=v), False


def _zero_outside(y: Any, spec: Spec) -> Tensor:
    """y, overwritten, with zero for the keys outside of the range."""
    y[:, :, : spec.t_keys_start] = 0.0
    y[:, :, spec.t_keys_stop :] = 0.0
    return y


def _calls(x: Inputs, spec: Spec, split: bool) -> list[list[Part]]:
    """What a call becomes: of each range of its rows the parts of the keys."""
    L, S = x.q.shape[2], x.k.shape[2]
    rows: Any = (0, L) if spec.t_rows_stop is None else (spec.t_rows_start, spec.t_rows_stop)
    keys: Any = (spec.t_keys_start, spec.t_keys_stop)
    found = []
    for start, stop, t_rows in _pieces(L, *rows):
        pieces = _pieces(S, *keys) if split and t_rows else [(0, S, True)]
        seen = [y for y in (_seen(start, stop, *piece, spec) for piece in pieces) if y is not None]
        if not seen:  # one key, and it is hidden
            seen = [_part(start, stop, 0, min(1, S), True, spec)]
        found.append([y._replace(t_rows=t_rows) for y in seen])
    return found


def _pieces(n: int, start: int, stop: int) -> list[tuple[int, int, bool]]:
    """What lies before, in and behind a range of n, as far as there is any, and whether it is the
    range."""
    pieces = (0, start, False), (start, stop, True), (stop, n, False)
    return [piece for piece in pieces if piece[0] < piece[1]]


def _seen(start: int, stop: int, first: int, last: int, t_keys: bool, spec: Spec) -> Part | None:
    """Rows and those of the keys that they see."""
    left, right = band(spec)
    first = first if left is None else max(first, start - left)
    last = last if right is None else min(last, stop + right)
    return _part(start, stop, first, last, t_keys, spec) if first < last else None


def _part(start: int, stop: int, first: int, last: int, t_keys: bool, spec: Spec) -> Part:
    """Rows and keys, with the bounds that they have when both are counted from their own first."""
    left, right = band(spec)
    inner = without_ranges(spec)
    if left is not None or right is not None:
        left = None if left is None else left - start + first
        right = None if right is None else right + start - first
        inner = inner._replace(causal=False, left=None, right=None)
        inner = banded(inner, Band(left, right), stop - start, last - first)
    return Part(slice(start, stop), slice(first, last), inner, False, t_keys)


def _squared(part: Part) -> list[Part]:
    """A part of which all rows see some first keys and from there on it is causal, as two: more
    kernels support those, and none is compiled for where the diagonal begins. Gradients of parts
    need no merging."""
    bound, keys = band(part.spec), part.keys
    at = keys.start + (bound.right or 0)
    if bound.left is not None or not keys.start < at < keys.stop:
        return [part]
    whole = part.spec._replace(right=None)
    return [
        part._replace(keys=slice(keys.start, at), spec=whole),
        part._replace(keys=slice(at, keys.stop), spec=whole._replace(causal=True)),
    ]


def _merged(parts: list[Part], x: Inputs, t: Tangents, spec: Spec, into: Any = None) -> Saved:
    """O, LSE, tO and μ of some rows, in `into` if that is given."""
    if len(parts) == 1:
        return _forward(parts[0], x, t, into)
    total, *others = (_forward(part, x, t) for part in parts)
    for i, other in enumerate(others):
        dtype = x.q.dtype if i == len(others) - 1 else wide(x.q.dtype)
        total = merge(total, other, slice(None), dtype, spec.backend)
    if into is not None:
        into[0].copy_(total.out)
        into[1].copy_(total.t_out)
        return total
    out, t_out = (laid_out(y, x.q, spec) for y in (total.out, total.t_out))  # type: ignore[arg-type]
    return total._replace(out=out, t_out=t_out)


def _forward(part: Part, x: Inputs, t: Tangents, into: Any = None) -> Saved:
    """O, LSE, tO and μ of a part."""
    t_i: Any = _tangents(t, part)
    if all(y is None for y in t_i):
        t_i = None
    given = None if into is None else (into[0], None if t_i is None else into[1])
    how = {"into": given} if part.spec.backend == "triton" else {}
    found = implementation(part.spec).forward(_inputs(x, part), t_i, part.spec, **how)
    if into is not None and not how:
        into[0].copy_(found.out)
        if t_i is not None:
            into[1].copy_(found.t_out)
    if t_i is None:
        t_out = torch.zeros_like(found.out) if into is None else into[1].zero_()
        mu = found.lse.new_zeros(found.out.shape[:3])
        found = found._replace(t_out=t_out, mu=mu)
    return found


def _inputs(x: Inputs, part: Part) -> Inputs:
    q, k, v, mask, *_ = x
    mask = None if mask is None else _of_mask(mask, part)
    k, v = k[:, :, part.keys], v[:, :, part.keys]
    listed: Any = (None, None)
    if x.kv_blocks is not None:
        sizes: Any = part.spec.block_q, part.spec.block_k
        at = [
            slice(each.start // size, -(-each.stop // size))
            for each, size in zip((part.rows, part.keys), sizes, strict=True)
        ]
        listed = lists(layout_of(x.kv_blocks)[:, :, at[0], at[1]], *sizes)[:2]
    return Inputs(q[:, :, part.rows], k, v, mask, None, None, None, *listed)


def _tangents(t: Tangents, part: Part) -> Tangents:
    if not part.t_rows:
        return Tangents()
    k, v = (None if y is None or not part.t_keys else y[:, :, part.keys] for y in (t.k, t.v))
    return Tangents(_rows(t.q, part), k, v, None if t.mask is None else _of_mask(t.mask, part))


def _saved(saved: Saved, part: Part) -> Saved:
    out, lse, t_out, mu = (_rows(y, part) for y in saved)
    if not part.t_rows:
        return Saved(out, lse.contiguous())
    return Saved(out, lse.contiguous(), t_out, mu.contiguous())


def _rows(y: Tensor | None, part: Part) -> Any:
    return None if y is None else y[:, :, part.rows]


def _of_mask(mask: Tensor, part: Part) -> Tensor:
    """A mask, which may be broadcast, of a part."""
    rows = part.rows if mask.shape[2] > 1 else slice(None)
    return mask[:, :, rows, part.keys if mask.shape[3] > 1 else slice(None)]


def _zeros(x: Inputs, spec: Spec, mask_grad: bool, calls: int) -> Any:
    """What gradients are added in: two add up in their own dtype as well as in a wider one."""
    k, v = (
        empty_rows(y, y.shape[3], spec, wide(y.dtype) if calls > 2 else y.dtype).zero_()
        for y in (x.k, x.v)
    )
    mask = None
    if mask_grad and x.mask is not None:
        mask = torch.zeros(x.mask.shape, dtype=wide(x.mask.dtype), device=x.mask.device)
    return Tangents(empty_rows(x.q, x.q.shape[3], spec).zero_(), k, v, mask)


def _add(total: Tangents, grads: Tangents, part: Part) -> None:
    """Adds the gradients of a part's keys and mask."""
    for y, of in ((total.k, grads.k), (total.v, grads.v)):
        if y is not None and of is not None:
            y[:, :, part.keys] += of
    if total.mask is not None and grads.mask is not None:
        at = _of_mask(total.mask, part)
        at += grads.mask


def _sum(grads: Any) -> Any:
    """Of one or more, rounded once."""
    if len(grads) > 2:
        grads = [y.to(wide(y.dtype)) for y in grads]
    return sum(grads[1:], grads[0])


def _narrow(grads: Tangents, x: Inputs) -> Tangents:
    """In the inputs' dtypes."""
    pairs = zip(grads, x, strict=False)
    return Tangents(*[None if y is None or of is None else y.to(of.dtype) for y, of in pairs])
