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

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache
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
    wide,
    without_ranges,
)
from .merge import merge

BESIDE = 2**28  # pairs of rows and keys from which on a second stream pays


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
    calls = _calls(x.q.shape[2], x.k.shape[2], spec, split)
    if not calls:  # no rows
        return implementation(inner).forward(x, t, inner)
    if len(calls) == 1:
        return _merged(calls[0], x, t)
    out = empty_rows(x.q, x.v.shape[3], spec)
    t_out = torch.empty_like(out)
    total: Any = None

    def run(parts: list[Part]) -> None:
        nonlocal total
        rows = parts[0].rows
        found: Any = _merged(parts, x, t, (_cut(out, rows), _cut(t_out, rows)))
        if total is None:
            lse, mu = (y.new_empty(*y.shape[:2], out.shape[2], *y.shape[3:]) for y in found[1::2])
            total = Saved(out, lse, t_out, mu)
        for y, given in ((total.lse, found.lse), (total.mu, found.mu)):
            _cut(y, rows).copy_(given)

    with_t = [y for y in calls if y[0].t_rows]
    plain = [y for y in calls if not y[0].t_rows]
    with _beside(x, with_t, plain) as stream:
        for y in with_t:
            run(y)
        with stream:
            for y in plain:
                run(y)
    return total


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
    L, S = x.q.shape[2], x.k.shape[2]
    calls = [[y for part in parts for y in _squared(part)] for parts in _calls(L, S, spec, split)]
    first, second = (_nothing(x, spec, mask_grad) for _ in range(2))
    dtype = wide(x.k.dtype) if len(calls) > 2 else x.k.dtype  # two add up as well in their own
    for parts in calls:
        of_rows = []
        for part in parts:
            if d_out is None and not part.t_rows:
                continue
            x_i, t_i = _inputs(x, part), _tangents(t, part)
            if part.t_rows and t.k is not None and t_i.q is None and t_i.k is None:
                t_i = t_i._replace(q=torch.zeros_like(x_i.q))  # tS is 0, but tS − μ is not
            d_o, d_t_o = (_cut(y, part.rows) for y in (d_out, d_t_out if part.t_rows else None))
            saved_i = _saved(saved, part)
            spec_i = part.spec._replace(sharded=len(parts) > 1)
            d, d_t = run(d_o, d_t_o, x_i, t_i, saved_i, spec_i, mask_grad)
            of_rows.append((d.q, d_t.q))
            first = _added(first, d, part, x, spec, dtype)
            second = _added(second, d_t, part, x, spec, dtype)
        for at, total in enumerate((first.q, second.q)):
            grads = [pair[at] for pair in of_rows if pair[at] is not None]
            rows = _cut(total, parts[0].rows)
            if grads:
                _place(rows, _sum(grads))
            else:
                _words(rows)[0].zero_()
    first, second = (_narrow(y, x, spec) for y in (first, second))
    if spec.t_keys_stop is not None:
        for y in (second.k, second.v):
            _zero_outside(y, spec)
    return first, second


@contextmanager
def _beside(x: Inputs, *calls: list) -> Iterator[Any]:
    """A stream for the second of two kinds of calls: it begins on multiprocessors that the first
    leaves idle at its end. What lives on is allocated outside of it. The current stream where one
    of them is empty or the host is what takes time."""
    (B, H, L, _), S, q = x.q.shape, x.k.shape[2], x.q
    if not q.is_cuda or B * H * L * S < BESIDE or not all(calls):
        yield nullcontext()
        return
    current, side = torch.cuda.current_stream(q.device), _stream(q.device)
    side.wait_stream(current)
    try:
        yield torch.cuda.stream(side)
    finally:
        current.wait_stream(side)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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


@lru_cache(4096)
def _calls(L: int, S: int, spec: Spec, split: bool) -> list[list[Part]]:
    """What a call becomes: of each range of its rows the parts of the keys, those with a tangent
    first."""
    rows: Any = (0, L) if spec.t_rows_stop is None else (spec.t_rows_start, spec.t_rows_stop)
    keys: Any = (spec.t_keys_start, spec.t_keys_stop)
    found = []
    for start, stop, t_rows in _pieces(L, *rows):
        pieces = [(0, S, True)]
        if split and t_rows:
            pieces = sorted(_pieces(S, *keys), key=lambda piece: not piece[2])
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


def _merged(parts: list[Part], x: Inputs, t: Tangents, into: Any = None) -> Saved:
    """O, LSE, tO and μ of some rows, O and tO in `into` if that is given."""
    if into is not None and not _reads_tangents(parts[0], t):
        _words(into[1])[0].zero_()  # before O: it waits for nothing
    total = _forward(parts[0], x, t, into)
    if total.t_out is None:
        mu = total.lse.new_zeros(total.out.shape[:3])
        t_out = torch.zeros_like(total.out) if into is None else into[1]
        total = total._replace(t_out=t_out, mu=mu)
    into = total.out, total.t_out
    for part in parts[1:]:
        last = part is parts[-1]
        dtype = x.q.dtype if last else wide(x.q.dtype)
        found, backend = _forward(part, x, t), part.spec.backend
        total = merge(total, found, slice(None), dtype, backend, into if last else None)
    return total


def _forward(part: Part, x: Inputs, t: Tangents, into: Any = None) -> Saved:
    """O, LSE, tO and μ of a part; tO and μ are None where none of its tangents is read."""
    t_i = _tangents(t, part) if _reads_tangents(part, t) else None
    if t_i is None and into is not None:
        into = into[0], None
    how = {"into": into} if part.spec.backend == "triton" else {}
    found = implementation(part.spec).forward(_inputs(x, part), t_i, part.spec, **how)
    if into is None or found.out is into[0]:
        return found
    for y, given in zip(into, (found.out, found.t_out), strict=True):
        if y is not None:
            _place(y, given)
    return found._replace(out=into[0], t_out=into[1])


def _place(rows: Tensor, given: Tensor) -> None:
    """Copies to rows of a larger tensor."""
    if rows.dtype == given.dtype:
        rows, given = _words(rows, given)
    rows.copy_(given)


def _words(*tensors: Tensor) -> Any:
    """The same memory as words of 8 bytes, where rows divide into such: of rows of a larger tensor
    PyTorch copies or fills one element a thread, whatever its size."""
    try:
        return [y.view(torch.int64) for y in tensors]
    except RuntimeError:
        return tensors


def _inputs(x: Inputs, part: Part) -> Inputs:
    q, k, v, mask, *_ = x
    mask = None if mask is None else _of_mask(mask, part)
    k, v = _cut(k, part.keys), _cut(v, part.keys)
    listed: Any = (None, None)
    if x.kv_blocks is not None:
        sizes: Any = part.spec.block_q, part.spec.block_k
        at = [
            slice(each.start // size, -(-each.stop // size))
            for each, size in zip((part.rows, part.keys), sizes, strict=True)
        ]
        listed = lists(layout_of(x.kv_blocks)[:, :, at[0], at[1]], *sizes)[:2]
    return Inputs(_cut(q, part.rows), k, v, mask, None, None, None, *listed)


def _reads_tangents(part: Part, t: Tangents) -> bool:
    of_keys = part.t_keys and (t.k is not None or t.v is not None)
    return part.t_rows and (of_keys or t.q is not None or t.mask is not None)


def _tangents(t: Tangents, part: Part) -> Tangents:
    if not part.t_rows:
        return Tangents()
    k, v = (_cut(y, part.keys) if part.t_keys else None for y in (t.k, t.v))
    return Tangents(_cut(t.q, part.rows), k, v, None if t.mask is None else _of_mask(t.mask, part))


def _saved(saved: Saved, part: Part) -> Saved:
    out, lse, t_out, mu = (_cut(y, part.rows) for y in saved)
    if not part.t_rows:
        return Saved(out, lse.contiguous())
    return Saved(out, lse.contiguous(), t_out, mu.contiguous())


def _cut(y: Tensor | None, at: slice) -> Any:
    """These of its rows or keys."""
    if y is None or at.stop - at.start == y.shape[2]:
        return y
    return y.narrow(2, at.start, at.stop - at.start)


def _of_mask(mask: Tensor, part: Part) -> Tensor:
    """A mask, which may be broadcast, of a part."""
    rows = part.rows if mask.shape[2] > 1 else slice(None)
    return mask[:, :, rows, part.keys if mask.shape[3] > 1 else slice(None)]


def _nothing(x: Inputs, spec: Spec, mask_grad: bool) -> Any:
    """What gradients are added to: K and V have none yet, and each row of Q will be written."""
    mask = None
    if mask_grad and x.mask is not None:
        mask = torch.zeros(x.mask.shape, dtype=wide(x.mask.dtype), device=x.mask.device)
    return Tangents(empty_rows(x.q, x.q.shape[3], spec), None, None, mask)


def _added(
    total: Tangents, grads: Tangents, part: Part, x: Inputs, spec: Spec, dtype: torch.dtype
) -> Tangents:
    """The total, which is overwritten, with the gradients of a part's keys and mask."""
    keys = []
    for y, of, like in zip(total[1:3], grads[1:3], x[1:3], strict=True):
        if y is None and of is not None and of.shape == like.shape and of.dtype == dtype:
            y = of  # the first ones, of all keys
        elif of is not None:
            y = _zeros(like, spec, dtype) if y is None else y
            _cut(y, part.keys).add_(of)
        keys.append(y)
    if total.mask is not None and grads.mask is not None:
        _of_mask(total.mask, part).add_(grads.mask)
    return total._replace(k=keys[0], v=keys[1])


def _zeros(like: Any, spec: Spec, dtype: torch.dtype) -> Tensor:
    return empty_rows(like, like.shape[3], spec, dtype).zero_()


def _sum(grads: Any) -> Any:
    """Of one or more, rounded once."""
    if len(grads) > 2:
        grads = [y.to(wide(y.dtype)) for y in grads]
    return sum(grads[1:], grads[0])


def _narrow(grads: Tangents, x: Inputs, spec: Spec) -> Tangents:
    """In the inputs' dtypes; of keys that no part has given any, zero."""
    k, v = (
        _zeros(of, spec, of.dtype) if y is None else y.to(of.dtype)
        for y, of in ((grads.k, x.k), (grads.v, x.v))
    )
    mask = None if grads.mask is None or x.mask is None else grads.mask.to(x.mask.dtype)
    return grads._replace(k=k, v=v, mask=mask)
