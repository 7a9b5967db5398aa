"""q, k and v of any rank, whose batch and head dimensions broadcast as in SDPA, and the (B, heads,
rows, D) of the implementations. Dimensions are expanded with stride 0: of up to four dimensions
nothing is copied. A single key and value head needs not even that, since grouped heads share one.
"""

from typing import NamedTuple

from torch import Tensor

from .call import Tangents


class Sizes(NamedTuple):
    """What the leading dimensions of q, k and v broadcast to."""

    lead: tuple[int, ...]  # (..., H) of the result, () where no input has heads
    kv_heads: int  # 1, a divisor of H or H


def together(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that all broadcast to, None where there is none."""
    rank = max(map(len, shapes))
    result = []
    for at in range(-rank, 0):
        size = 1
        for shape in shapes:
            n = shape[at] if len(shape) >= -at else 1
            if n != 1:
                if size != 1 and size != n:
                    return None
                size = n
        result.append(size)
    return tuple(result)


def queries(x: Tensor, sizes: Sizes) -> Tensor:
    """q or its tangent as (B, H, L, D)."""
    return _four(x, sizes.lead)


def keys(x: Tensor, sizes: Sizes) -> Tensor:
    """k, v or a tangent of theirs as (B, Hk, S, D)."""
    lead = sizes.lead and (*sizes.lead[:-1], sizes.kv_heads)
    if x.dim() > 2 and 1 < x.shape[-3] < sizes.kv_heads:  # grouped otherwise than its partner
        x = x.repeat_interleave(sizes.kv_heads // x.shape[-3], -3)
    return _four(x, lead)


def mask(mask: Tensor, sizes: Sizes) -> Tensor:
    """A mask that broadcasts to (..., H, L, S) as (b, h, l, s) with each of them full or 1."""
    mask = mask[(None,) * (max(len(sizes.lead) + 2, 4) - mask.dim())]
    if mask.dim() > 4:
        mask = mask.expand(*sizes.lead[:-1], *mask.shape[-3:]).flatten(0, -4)
    return mask


def tangents(t_q, t_k, t_v, t_mask, sizes: Sizes) -> Tangents:
    """Each as its primal is: four-dimensional."""
    fits = zip((queries, keys, keys), (t_q, t_k, t_v), strict=True)
    t_q, t_k, t_v = [None if t is None else fit(t, sizes) for fit, t in fits]
    return Tangents(t_q, t_k, t_v, None if t_mask is None else mask(t_mask, sizes))


def result(out: Tensor, sizes: Sizes) -> Tensor:
    """(B, H, L, Dv) as (..., H, L, Dv)."""
    return out if len(sizes.lead) == 2 else out.reshape(*sizes.lead, *out.shape[-2:])


def _four(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    if x.shape[:-2] != lead:
        x = x.expand(*lead, *x.shape[-2:])
    if x.dim() == 4:
        return x
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]
