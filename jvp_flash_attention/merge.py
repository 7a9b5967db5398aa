"""Attention over parts of the keys, put together.

With the results of each part i on its own,

    LSE = log Σ exp(LSEᵢ)         wᵢ = exp(LSEᵢ − LSE)
    O   = Σ wᵢ Oᵢ                 μ  = Σ wᵢ μᵢ
    tO  = Σ wᵢ (tOᵢ + (μᵢ − μ) Oᵢ)

One after the other, with w = wᵢ of the new part and δ = μᵢ − μ, ΔO = Oᵢ − O, ΔtO = tOᵢ − tO:

    O ← O + w ΔO        μ ← μ + w δ        tO ← tO + w ΔtO + w (1 − w) δ ΔO

A row that sees nothing of a part has LSEᵢ = −inf there, hence w = 0; one that has seen nothing
before has w = 1; one that sees nothing at all keeps O = tO = μ = 0 and LSE = −inf.
"""

import torch
from torch import Tensor

from .call import Saved, wide


def nothing(q: Tensor, v: Tensor, jvp: bool) -> Saved:
    """Attention over no key at all."""
    dtype = wide(q.dtype)
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    if not jvp:
        return Saved(out, lse)
    return Saved(out, lse, torch.zeros_like(out), torch.zeros_like(lse))


def merge(
    total: Saved,
    part: Saved,
    rows: slice,
    dtype: torch.dtype,
    backend: str,
    into: tuple[Tensor, Tensor | None] | None = None,
) -> Saved:
    """`total`, which may be overwritten, with `part`, which is of its rows from `rows.start` on and
    of other keys. Where the total has tO, a part without it and μ has zeros. O and tO are in
    `dtype`, and where `into` is given in these two; on the way they are `wide`."""
    if backend == "triton":
        from .kernels.merge import merge as fused

        return fused(total, part, rows.start or 0, dtype, into)
    out, lse, t_out, mu = total
    out = out.to(wide(out.dtype))
    before, after = lse[:, :, rows], part.lse
    w = torch.sigmoid(after - before).masked_fill_(after == float("-inf"), 0.0)
    before.copy_(torch.logaddexp(before, after))
    d_out = part.out - out[:, :, rows]
    if t_out is not None and mu is not None:
        t_out = t_out.to(out.dtype)
        delta = (0.0 if part.mu is None else part.mu) - mu[:, :, rows]
        d_t_out = (0.0 if part.t_out is None else part.t_out) - t_out[:, :, rows]
        mu[:, :, rows] += w * delta
        c = (w * (1 - w) * delta).unsqueeze(-1)
        t_out[:, :, rows] += w.unsqueeze(-1) * d_t_out + c * d_out
        t_out = t_out.to(dtype)
    out[:, :, rows] += w.unsqueeze(-1) * d_out
    out = out.to(dtype)
    if into is not None:
        out = into[0].copy_(out)
        t_out = None if t_out is None or into[1] is None else into[1].copy_(t_out)
    return Saved(out, lse, t_out, mu)
