"""Attention over shards of the keys, put together.

With the results of each shard i on its own,

    LSE = log Σ exp(LSEᵢ)         wᵢ = exp(LSEᵢ − LSE)
    O   = Σ wᵢ Oᵢ                 μ  = Σ wᵢ μᵢ
    tO  = Σ wᵢ (tOᵢ + (μᵢ − μ) Oᵢ)

One after the other, with w = wᵢ of the new shard and δ = μᵢ − μ, ΔO = Oᵢ − O, ΔtO = tOᵢ − tO:

    O ← O + w ΔO        μ ← μ + w δ        tO ← tO + w ΔtO + w (1 − w) δ ΔO

A row that sees nothing of a shard has LSEᵢ = −inf there, hence w = 0; one that has seen nothing
before has w = 1; one that sees nothing at all keeps O = tO = μ = 0 and LSE = −inf.
"""

from typing import NamedTuple

import torch
from torch import Tensor

HEADS = 8  # of which one temporary is as large as the results


class Partial(NamedTuple):
    """Attention over a part of the keys; without a tangent tO and μ are None."""

    out: Tensor  # (B, H, L, Dv)
    t_out: Tensor | None
    lse: Tensor  # (B, H, L)
    mu: Tensor | None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which results are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nothing(q: Tensor, v: Tensor, jvp: bool) -> Partial:
    """Attention over no key at all."""
    dtype = wide(q.dtype)
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    if not jvp:
        return Partial(out, None, lse, None)
    return Partial(out, torch.zeros_like(out), lse, torch.zeros_like(lse))


def widened(part: Partial) -> Partial:
    """As the total to which others are added."""
    dtype = wide(part.out.dtype)
    t_out = None if part.t_out is None else part.t_out.to(dtype)
    return part._replace(out=part.out.to(dtype), t_out=t_out)


def merge_(total: Partial, part: Partial, rows: slice) -> None:
    """Adds `part`, which is of the rows `rows` and of other keys, to `total` in place."""
    lse = total.lse[:, :, rows]
    joint = torch.logaddexp(lse, part.lse)
    w = torch.sigmoid(part.lse - lse).nan_to_num_(nan=0.0)  # NaN: −inf on both sides
    lse.copy_(joint)
    c = None
    if total.mu is not None and part.mu is not None:
        mu = total.mu[:, :, rows]
        delta = part.mu - mu
        c = (w * (1 - w) * delta).unsqueeze(-1)
        mu.addcmul_(w, delta)
    w = w.unsqueeze(-1)
    for start in range(0, w.shape[1], HEADS):
        h = slice(start, start + HEADS)
        out = total.out[:, h, rows]
        d_out = part.out[:, h] - out
        if total.t_out is not None and part.t_out is not None and c is not None:
            t_out = total.t_out[:, h, rows]
            t_out.addcmul_(w[:, h], part.t_out[:, h] - t_out).addcmul_(c[:, h], d_out)
        out.addcmul_(w[:, h], d_out)
