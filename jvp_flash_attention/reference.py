"""Attention, its tangent and the gradients of both in plain PyTorch: the oracle and the CPU
backend.

    S  = s Q Kᵀ + b            tS = s (tQ Kᵀ + Q tKᵀ) + tb      capped: see below
    P  = softmax(S)            μ  = rowsum(P ∘ tS)            R = P ∘ (tS − μ)
    O  = (P ∘ Z) V             tO = (R ∘ Z) V + (P ∘ Z) tV

Z is the dropout mask divided by its keep probability (all ones without dropout). With cotangents dO
and dtO:

    h   = rowsum(dtO ∘ O)                 w  = rowsum(dO ∘ O) + rowsum(dtO ∘ tO)
    Hm  = Z ∘ (dtO Vᵀ) − h                G  = Z ∘ (dO Vᵀ + dtO tVᵀ)
    dtS = P ∘ Hm                          dS = P ∘ (G + Hm ∘ (tS − μ) − w)
    dQ  = s (dS K + dtS tK)      dK  = s (dSᵀ Q + dtSᵀ tQ)      dV  = (P ∘ Z)ᵀ dO + (R ∘ Z)ᵀ dtO
    dtQ = s dtS K                dtK = s dtSᵀ Q                 dtV = (P ∘ Z)ᵀ dtO
    db  = dS                     dtb = dtS                      summed over broadcast dimensions

With a soft cap c, u = tanh(s Q Kᵀ / c) and the slope 1 − u², the uncapped tangent is tX = s (tQ Kᵀ
+ Q tKᵀ), and before the products with Q, K, tQ and tK dtS and dS become dtX and dX:

    S   = c u + b                         tS  = (1 − u²) ∘ tX + tb
    dtX = (1 − u²) ∘ dtS                  dX  = (1 − u²) ∘ dS − (2 / c) u ∘ tX ∘ dtX

Queries are taken ROWS at a time against all keys, so memory is O(L + S) in the lengths. The
arithmetic is float64 for float64 inputs and float32 for everything else. Each function has a twin
of the same signature in `kernels`.

Shapes: q (B, H, L, D), k (B, Hk, S, D), v (B, Hk, S, Dv), mask b broadcastable to (B, H, L, S), LSE
and μ (B, H, L). Of packed sequences every pair is computed, and those of two sequences are masked.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block_mask import layout_of
from .call import Band, Inputs, Saved, Spec, Tangents, band, empty_rows, wide
from .philox import keep_mask

ROWS = 512


class Block(NamedTuple):
    """What one block of query rows knows before any product with the values."""

    rows: slice
    p: Tensor  # (B, H, l, S) probabilities
    t_s: Tensor | None  # (B, H, l, S) tangent of the scores
    z: Tensor | None  # (B, H, l, S) dropout factor
    lse: Tensor  # (B, H, l)
    masked: Tensor | None  # broadcastable to (B, H, l, S) pairs that count for nothing
    slope: Tensor | None  # (B, H, l, S) of the soft cap, 1 − u²
    bend: Tensor | None  # (B, H, l, S) (2 / c) u ∘ tX


class Rows(NamedTuple):
    """Keys, values or queries of which a pair that is masked must not see NaN or inf: 0 · NaN is
    NaN. Their finite elements, and which ones are not, where there are any."""

    x: Tensor
    bad: Tensor | None = None

    def __getitem__(self, at) -> "Rows":
        return Rows(self.x[at], None if self.bad is None else self.bad[at])


def _as_written(run: Callable) -> Callable:
    """A pass in the arithmetic that it names, also inside of autocast, which would compute its
    products in 16 bits."""

    @wraps(run)
    def pass_(*args):
        (x,) = (x for x in args if isinstance(x, Inputs))
        device = x.q.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return run(*args)
        with torch.autocast(device, enabled=False):
            return run(*args)

    return pass_


@_as_written
def forward(x: Inputs, t: Tangents | None, spec: Spec) -> Saved:
    """O and LSE; with tangents, of which an absent one is zero, tO and μ too."""
    q, k, v, *_ = x
    out, lse = _outputs(q, v, spec)
    t_out, mu = (None, None) if t is None else (torch.zeros_like(out), torch.zeros_like(lse))
    t_q, t_k, t_v, t_mask = Tangents() if t is None else t
    q, k, v, t_q, t_k, t_v = _wide(q, k, v, t_q, t_k, t_v)
    v_rows = _rows(v, x, spec)
    t_v_rows = None if t_v is None else _rows(t_v, x, spec)
    for block in _blocks(x._replace(q=q, k=k), Tangents(t_q, t_k, None, t_mask), spec):
        p_z = _times(block.p, block.z)
        o = _values(p_z, v_rows, block)
        out[:, :, block.rows], lse[:, :, block.rows] = o.to(out.dtype), block.lse
        if t_out is None or mu is None:
            continue
        t_o = torch.zeros_like(o)
        if block.t_s is not None:
            m = (block.p * block.t_s).sum(-1)
            t_o += _values(p_z * block.t_s, v_rows, block) - m.unsqueeze(-1) * o
            mu[:, :, block.rows] = m
        if t_v_rows is not None:
            t_o += _values(p_z, t_v_rows, block)
        t_out[:, :, block.rows] = t_o.to(out.dtype)
    return Saved(out, lse, t_out, mu)


@_as_written
def backward(
    d_out: Tensor | None,
    d_t_out: Tensor | None,
    x: Inputs,
    t: Tangents,
    saved: Saved,
    spec: Spec,
    mask_grad: bool,
) -> tuple[Tangents, Tangents]:
    """(dQ, dK, dV, db) and, with dtO, (dtQ, dtK, dtV, dtb); db and dtb are None unless
    `mask_grad`."""
    run = _backward if d_t_out is None else _backward_jvp
    inputs = x._replace(mask=x.mask if mask_grad else None)[:4]
    grads = run(d_out, d_t_out, x, t, saved, spec, mask_grad)
    pairs = zip(grads, (*inputs, *inputs), strict=False)
    grads = [None if g is None or y is None else g.to(y.dtype) for g, y in pairs]
    return Tangents(*grads[:4]), Tangents(*grads[4:])


def _backward(d_out, _d_t_out, x: Inputs, _t, saved: Saved, spec: Spec, mask_grad: bool):
    q, k, v, mask, *_ = x
    grads: Any = [_zeros(y, spec) for y in (q, k, v)]
    d_q, d_k, d_v = grads
    d_mask = _zeros(mask, spec, mask=True) if mask is not None and mask_grad else None
    q, k, v, out, d_out = _wide(q, k, v, saved.out, d_out)
    q_rows, k_rows, d_out_rows = (_rows(y, x, spec) for y in (q, k, d_out))
    for block in _blocks(x._replace(q=q, k=k), Tangents(), spec, saved.lse):
        rows = block.rows
        d_o = d_out[:, :, rows]
        w = (d_o * out[:, :, rows]).sum(-1, keepdim=True)
        d_s = _hide(block.p * (_times(_scores(d_o, v), block.z) - w), block)
        _accumulate(d_mask, d_s, rows)
        d_s = _times(d_s, block.slope)
        d_q[:, :, rows] = spec.scale * _values(d_s, k_rows, block)
        d_k += spec.scale * _keys(d_s, q_rows[:, :, rows], d_k, block)
        d_v += _keys(_times(block.p, block.z), d_out_rows[:, :, rows], d_v, block)
    return *grads, d_mask


def _backward_jvp(d_out, d_t_out, x: Inputs, t: Tangents, saved: Saved, spec: Spec, mask_grad):
    q, k, v, mask, *_ = x
    inputs = (q, k, v, mask if mask_grad else None)
    grads: Any = [
        None if y is None else _zeros(y, spec, mask=y is mask) for y in (*inputs, *inputs)
    ]
    d_q, d_k, d_v, d_mask, d_t_q, d_t_k, d_t_v, d_t_mask = grads
    q, k, v, t_q, t_k, t_v = _wide(q, k, v, *t[:3])
    out, t_out, mu, d_out, d_t_out = _wide(saved.out, saved.t_out, saved.mu, d_out, d_t_out)
    operands = (q, k, t_q, t_k, d_out, d_t_out)
    rows_of: Any = [None if y is None else _rows(y, x, spec) for y in operands]
    q_all, k_all, t_q_all, t_k_all, d_out_all, d_t_out_all = rows_of
    scale = spec.scale
    tangents = Tangents(t_q, t_k, None, t.mask)
    for block in _blocks(x._replace(q=q, k=k), tangents, spec, saved.lse):
        rows, p, t_s = block.rows, block.p, block.t_s
        q_i, d_to_i = q_all[:, :, rows], d_t_out_all[:, :, rows]
        d_to, p_z = d_t_out[:, :, rows], _times(block.p, block.z)
        w = (d_to * t_out[:, :, rows]).sum(-1, keepdim=True)
        h_m = _times(_scores(d_to, v), block.z) - (d_to * out[:, :, rows]).sum(-1, keepdim=True)
        h_m = _hide(h_m, block)
        g = torch.zeros_like(p)
        d_t_v += _keys(p_z, d_to_i, d_t_v, block)
        if d_out is not None:
            d_o = d_out[:, :, rows]
            w = w + (d_o * out[:, :, rows]).sum(-1, keepdim=True)
            g = g + _times(_scores(d_o, v), block.z)
            d_v += _keys(p_z, d_out_all[:, :, rows], d_v, block)
        if t_v is not None:
            g = g + _times(_scores(d_to, t_v), block.z)
        if t_s is not None:
            t_s = t_s - mu[:, :, rows].unsqueeze(-1)
            g = g + h_m * t_s
            d_v += _keys(_hide(p_z * t_s, block), d_to_i, d_v, block)
        d_t_s, d_s = p * h_m, _hide(p * (g - w), block)
        _accumulate(d_mask, d_s, rows)
        _accumulate(d_t_mask, d_t_s, rows)
        d_t_s, d_s = _times(d_t_s, block.slope), _times(d_s, block.slope)
        if block.bend is not None:
            d_s = d_s - block.bend * d_t_s
        d_q[:, :, rows] = scale * _values(d_s, k_all, block)
        d_k += scale * _keys(d_s, q_i, d_k, block)
        if t_k_all is not None:
            d_q[:, :, rows] += scale * _values(d_t_s, t_k_all, block)
        if t_q_all is not None:
            d_k += scale * _keys(d_t_s, t_q_all[:, :, rows], d_k, block)
        d_t_q[:, :, rows] = scale * _values(d_t_s, k_all, block)
        d_t_k += scale * _keys(d_t_s, q_i, d_t_k, block)
    return grads


def _blocks(x: Inputs, t: Tangents, spec: Spec, lse: Tensor | None = None) -> Iterator[Block]:
    """`lse` is given in a backward pass; it may be of more keys than these, as in a shard."""
    q, k, _v, mask, seed, *_ = x
    t_q, t_k, _t_v, t_mask = t
    B, H, L, _ = q.shape
    S = k.shape[2]
    if mask is not None:
        mask = mask.expand(B, H, L, S)
    if t_mask is not None:
        t_mask = t_mask.expand(B, H, L, S)
    for start in range(0, L, ROWS):
        rows = slice(start, min(start + ROWS, L))
        s = _scores(q[:, :, rows], k) * spec.scale
        t_s = _sum(
            None if t_q is None else _scores(t_q[:, :, rows], k) * spec.scale,
            None if t_k is None else _scores(q[:, :, rows], t_k) * spec.scale,
        )
        slope, bend = None, None
        if spec.softcap > 0.0:
            u = torch.tanh(s / spec.softcap)
            slope = torch.cosh(s / spec.softcap) ** -2  # 1 − u² has no digits far out
            if t_s is not None:
                bend, t_s = 2.0 / spec.softcap * u * t_s, slope * t_s
            s = spec.softcap * u
        t_s = _sum(t_s, None if t_mask is None else t_mask[:, :, rows].to(s.dtype))
        masked = None
        if mask is not None and mask.dtype == torch.bool:
            masked = ~mask[:, :, rows]
        elif mask is not None:
            s = s + mask[:, :, rows].to(s.dtype)
            masked = mask[:, :, rows] == float("-inf")
        for outside in _outside(rows, x, spec):
            masked = outside if masked is None else masked | outside
        if masked is not None:
            # scores and tangents of masked pairs count for nothing, even where they are not finite
            s = s.masked_fill(masked, float("-inf"))
            t_s, slope, bend = (
                None if y is None else y.masked_fill(masked, 0.0) for y in (t_s, slope, bend)
            )
        here = torch.logsumexp(s, -1)
        # not exp(s − LSE): beside a finite mask of −1e9 in every column, LSE has no digits left
        # for log l; the factor is exactly 1 unless LSE is of more keys than these
        p = torch.softmax(s, -1)
        if lse is not None:
            p = p * torch.exp(here - lse[:, :, rows]).unsqueeze(-1)
        p = p.masked_fill((here == float("-inf")).unsqueeze(-1), 0.0)  # attends nothing here
        if masked is not None:  # of a query that is not finite
            p = p.masked_fill(masked, 0.0)
        z = None
        if spec.dropout_p > 0.0:
            keep = keep_mask(seed, (B, H, L, S), rows, spec.dropout_p)  # type: ignore[arg-type]
            z = keep.to(s.dtype) / (1.0 - spec.dropout_p)
        yield Block(rows, p, t_s, z, here, masked, slope, bend)


def _outside(rows: slice, x: Inputs, spec: Spec) -> Iterator[Tensor]:
    """(l, S): the pairs of two sequences, and for each bound of the band those beyond it."""
    left, right = band(spec)
    if not _hides(x, spec):
        return
    i = torch.arange(rows.start, rows.stop, device=x.q.device).unsqueeze(-1)
    j = torch.arange(x.k.shape[2], device=x.q.device)
    if x.cu_q is not None:
        cu_k = x.cu_q if x.cu_k is None else x.cu_k
        n, n_k = _sequences(i, x.cu_q), _sequences(j, cu_k)
        yield (n != n_k) | (n < 0)
        at = int(spec.lower_right)  # of the diagonal: the first row of a sequence, or the last
        i = i - _starts(x.cu_q, n + at)
        j = j - _starts(cu_k, n_k + at)
    if x.kv_blocks is not None:
        sizes: Any = spec.block_q, spec.block_k
        yield ~layout_of(x.kv_blocks)[:, :, i.squeeze(-1) // sizes[0]][..., j // sizes[1]]
    if right is not None:
        yield j > i + right
    if left is not None:
        yield j < i - left


def _hides(x: Inputs, spec: Spec) -> bool:
    """Whether positions alone hide pairs."""
    return x.cu_q is not None or x.kv_blocks is not None or band(spec) != Band()


def _sequences(rows: Tensor, cu: Tensor) -> Tensor:
    """The packed sequence of each row; −1 of those that lie in none."""
    n = torch.bucketize(rows, cu, right=True) - 1
    return n.masked_fill(n == len(cu) - 1, -1)


def _starts(cu: Tensor, n: Tensor) -> Tensor:
    return cu[n.clamp(0, len(cu) - 1)]


def _scores(x: Tensor, y: Tensor) -> Tensor:
    """(B, H, l, D) and (B, Hk, S, D) -> (B, H, l, S); the query heads of a group are folded into
    the rows."""
    B, H, l, D = x.shape
    Hk, S = y.shape[1:3]
    return (x.reshape(B, Hk, _group(H, Hk) * l, D) @ y.mT).view(B, H, l, S)


def _values(p: Tensor, y: Rows, block: Block) -> Tensor:
    """(B, H, l, S) and (B, Hk, S, D) -> (B, H, l, D)."""
    B, H, l, S = p.shape
    Hk, D = y.x.shape[1], y.x.shape[3]
    times = lambda p, y: (p.reshape(B, Hk, _group(H, Hk) * l, S) @ y).view(B, H, l, D)  # noqa: E731
    return _spoil(times(p, y.x), times, y, block)


def _keys(p: Tensor, x: Rows, like: Tensor, block: Block) -> Tensor:
    """(B, H, l, S)ᵀ and (B, H, l, D) -> (B, Hk, S, D), the shape of `like`, summed over the heads
    of a group."""
    B, H, l, S = p.shape
    fold = B, like.shape[1], _group(H, like.shape[1]) * l
    times = lambda p, x: p.reshape(*fold, S).mT @ x.reshape(*fold, x.shape[-1])  # noqa: E731
    return _spoil(times(p, x.x), times, x, block)


def _group(H: int, Hk: int) -> int:
    """Query heads that share a key head; 1 where there are none."""
    return H // Hk if Hk else 1


def _rows(y: Tensor, x: Inputs, spec: Spec) -> Rows:
    if x.mask is None and not _hides(x, spec):
        return Rows(y)
    finite = y.isfinite()
    return (
        Rows(y)
        if y.is_meta or finite.all()
        else Rows(y.masked_fill(~finite, 0.0), (~finite).to(y.dtype))
    )


def _spoil(product: Tensor, times: Callable, x: Rows, block: Block) -> Tensor:
    """NaN in the product where a pair that is seen has an element that is not finite."""
    if x.bad is None or block.masked is None:
        return product
    seen = (~block.masked).to(block.p.dtype).expand_as(block.p)
    return product.masked_fill(times(seen, x.bad) > 0, float("nan"))


def _hide(x: Tensor, block: Block) -> Tensor:
    """0 where a pair is masked, whatever its product was."""
    return x if block.masked is None else x.masked_fill(block.masked, 0.0)


def _times(p: Tensor, z: Tensor | None) -> Tensor:
    return p if z is None else p * z


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


def _wide(*tensors: Tensor | None) -> Any:
    return [x if x is None or x.dtype == torch.float64 else x.float() for x in tensors]


def _zeros(x: Tensor, spec: Spec, mask: bool = False) -> Tensor:
    """What the gradient of x is summed in."""
    if mask:
        return torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device)
    return empty_rows(x, x.shape[3], spec, wide(x.dtype)).zero_()


def _outputs(q: Tensor, v: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    B, H, L, _ = q.shape
    return empty_rows(q, v.shape[3], spec), q.new_empty(B, H, L, dtype=wide(q.dtype))


def _accumulate(d_mask: Tensor | None, d_s: Tensor, rows: slice) -> None:
    """Adds a block of dS to the gradient of the mask, summed over the dimensions in which the mask
    was broadcast."""
    if d_mask is None:
        return
    target = d_mask if d_mask.shape[2] == 1 else d_mask[:, :, rows]
    target += d_s.sum_to_size(target.shape)
