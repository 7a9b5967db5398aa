"""Ring attention: keys travel from process to process, queries stay.

The four passes over shards are a backend like any other. What differentiates, maps and compiles
attention (autograd.py, ops.py) calls them and knows of no process. With i counting the shards:

    forward    O, tO, LSE, μ    merged from those of each shard              (../merge.py)
    backward   dQ, dtQ          Σ of those from each shard
               dKᵢ, dVᵢ, ...    Σ over the processes, travelling with the shard

A shard's own backward needs nothing but the merged O, tO, LSE and μ, because those are all that
enters P = exp(S − LSE), h and w. Sums are kept in float32, float64 for float64.

Ring attention: Liu et al., arXiv 2310.01889. Zigzag: see sharding.py.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .. import api, backends
from ..call import Inputs, Saved, Spec, Tangents, is_default, wide
from ..merge import merge, nothing
from . import rules
from .exchange import Packed, agree, pass_on, rotate
from .sharding import Block, block, shard_lengths


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float = 0.0,
    mesh: DeviceMesh,
    layout: str = "contiguous",
    lengths: tuple[int, int] | None = None,
    backend: str | None = None,
    tangent_grad: bool = True,
) -> Tensor:
    """`attention` of sequences that are sharded over the processes of a mesh.

    Every process calls it with its own rows and the same flags. All derivatives of `attention` are
    there: tangents under `torch.func.jvp` and `forward_ad.dual_level`, gradients, gradients through
    the tangent. Gradients are those of a loss summed over the processes.

    Args:
        query: (..., H, local L, D), as `shard` gives it.
        key: (..., Hk, local S, D), of any number of rows in cross-attention.
        value: (..., Hk, local S, Dv).
        attn_mask: bool, broadcastable to (..., H, 1, local S), sharded with the keys: True attends.
        dropout_p: must be 0.
        is_causal: needs L == S. In the layout "zigzag" all processes have the same work, in
            "contiguous" the last one has most.
        scale, enable_gqa, softcap: as for `attention`.
        mesh: 1-D DeviceMesh.
        layout: in which queries and keys were sharded.
        lengths: (L, S) of the whole sequences; None where every process holds as many rows.
        backend, tangent_grad: as for `attention`.

    Returns:
        (..., H, local L, Dv) in query's dtype.

    Raises:
        TypeError, ValueError: as `attention`; the processes do not agree. That is checked the first
            time that a process sees a kind of call. Later on other flags on one process hang.
        NotImplementedError: dropout, a floating mask or one with rows; a third derivative.
    """
    name = _call(mesh, layout, lengths, backend, query, key, value, attn_mask, dropout_p)
    return api.attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        softcap=softcap, backend=name, tangent_grad=tangent_grad,
    )  # fmt: skip


def ring_attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    t_query: Tensor | None,
    t_key: Tensor | None,
    t_value: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float = 0.0,
    mesh: DeviceMesh,
    layout: str = "contiguous",
    lengths: tuple[int, int] | None = None,
    backend: str | None = None,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """`attention_jvp` of sharded sequences: value and tangent without dual numbers.

    Tangents are sharded as their primals; one that is None must be so on every process. The other
    arguments, the results and the errors are those of `ring_attention` and `attention_jvp`.
    """
    name = _call(mesh, layout, lengths, backend, query, key, value, attn_mask, dropout_p)
    return api.attention_jvp(
        query, key, value, t_query, t_key, t_value, attn_mask, dropout_p, is_causal, scale,
        enable_gqa, softcap=softcap, backend=name, tangent_grad=tangent_grad,
    )  # fmt: skip


Shards = list[Tensor | None]  # k, v, mask (b, h, S, 1), tk, tv of one process


class Ring(NamedTuple):
    """The four passes, of the signatures in `reference`, on this process's shards."""

    group: ProcessGroup
    layout: str
    lengths: tuple[int, int] | None
    backend: str | None  # of a shard

    def forward(self, x: Inputs, t: Tangents | None, spec: Spec) -> Saved:
        jvp = t is not None
        t = t or Tangents()
        q, k, v, mask, *_ = x
        lengths = self._agree("forward", x, (*t[:3], jvp or None), spec)
        size, rank = self.group.size(), self.group.rank()
        held = shard_lengths(lengths[1], size, self.layout)
        found = [self._block((rank - step) % size, lengths, spec) for step in range(size)]
        last = max((step for step, here in enumerate(found) if here is not None), default=-1)
        total = None
        turns = rotate(self.group, (k, v, _column(mask), t.k, t.v), held)
        for here, (step, (_source, shards)) in zip(found, enumerate(turns), strict=True):
            if here is None:
                continue
            local = self._local(spec, q, v, here)
            part = attend(here, q, t.q, shards, local, jvp)
            if total is None and here.rows == slice(None):
                total = part
                continue
            total = nothing(q, v, jvp) if total is None else total
            dtype = q.dtype if step == last else wide(q.dtype)
            total = merge(total, part, here.rows, dtype, local.backend)
        if total is None:
            total = nothing(q, v, jvp)
            out, t_out = (y if y is None else y.to(q.dtype) for y in (total.out, total.t_out))
            total = total._replace(out=out, t_out=t_out)
        out, t_out = (_laid_out(y, spec) for y in (total.out, total.t_out))
        return total._replace(out=out, t_out=t_out)

    def backward(
        self, d_out, d_t_out, x: Inputs, t: Tangents, saved: Saved, spec: Spec, mask_grad: bool
    ) -> tuple[Tangents, Tangents]:
        jvp = d_t_out is not None
        q, k, v, mask, *_ = x
        lengths = self._agree("backward", x, (*t[:3], d_out, d_t_out), spec)
        size, rank = self.group.size(), self.group.rank()
        held = shard_lengths(lengths[1], size, self.layout)
        sums: list[Tensor | None] = [None, None]  # dQ, dtQ
        present: Any = None  # dK, dV, dtK, dtV of the shard at hand; they follow it
        turns = rotate(self.group, (k, v, _column(mask), t.k, t.v), held)
        for source, shards in turns:
            transfer = None
            if present is not None:
                transfer = pass_on(self.group, present, present.like(held[source]))
            found, grads = self._block(source, lengths, spec), ()
            if found is not None:
                local = self._local(spec, q, v, found)
                grads = differentiate(found, d_out, d_t_out, q, t.q, shards, saved, local)
                sums = [_sum(sums[i], grads[i], found.rows, q) for i in range(2)]
            if transfer is not None:
                present = transfer.wait()
            elif found is not None and found.keys == slice(None):
                present, found = Packed.of(grads[2:], wide(k.dtype)), None
            else:
                present = _zeros((k, v, k, v) if jvp else (k, v, None, None), wide(k.dtype))
            if found is not None:
                for total, grad in zip(present.tensors, grads[2:], strict=True):
                    _sum(total, grad, found.keys, k)
        last = Packed.of(present.tensors, k.dtype)
        if size > 1:  # they are with the process before their own
            last = pass_on(self.group, last, last.like(held[rank])).wait()
        of_keys = [None if y is None else _laid_out(y.clone(), spec) for y in last.tensors]
        d_k, d_v, d_t_k, d_t_v = of_keys
        of_queries = (q.new_zeros(q.shape) if y is None else y.to(q.dtype) for y in sums)
        d_q, d_t_q = (_laid_out(y, spec) for y in of_queries)
        return Tangents(d_q, d_k, d_v), Tangents(d_t_q if jvp else None, d_t_k, d_t_v)

    def _agree(self, name, x: Inputs, given, spec: Spec) -> tuple[int, int]:
        """(L, S) of the whole sequences, once all processes have said that they make this call."""
        if not is_default(spec, but=("causal", "backend", "softcap", "rows_first", "compiled")):
            raise NotImplementedError(
                f"ring_attention supports scale, softcap and is_causal, got {spec}"
            )
        if x.cu_q is not None:
            raise NotImplementedError(
                "ring_attention takes no cu_seqlens; give each process whole sequences, and call"
                " attention"
            )
        q, k, v, mask, *_ = x
        size, rank = self.group.size(), self.group.rank()
        lengths = self.lengths or (size * q.shape[2], size * k.shape[2])
        call = (
            *(("lengths", lengths), ("layout", self.layout), ("dtype", q.dtype)),
            ("batch, heads, head dim", (*q.shape[:2], q.shape[3], k.shape[1], v.shape[3])),
            ("causal, scale, softcap", (spec.causal, spec.scale, spec.softcap)),
            ("mask", None if mask is None else tuple(mask.shape[:2])),
            ("tangents and cotangents", tuple(y is not None for y in given)),
        )
        fault = None
        for what, y, length in (("query", q, lengths[0]), ("key", k, lengths[1])):
            mine = shard_lengths(length, size, self.layout)[rank]
            if y.shape[2] != mine:
                fault = (
                    f"{what} must hold {mine} of {length} rows in the layout {self.layout!r}, got"
                    f" {y.shape[2]}; shard with `shard`, and pass lengths= where they differ"
                )
        if spec.causal and lengths[0] != lengths[1]:
            fault = f"is_causal needs queries and keys of one length, got {lengths}"
        agree(self.group, f"ring_attention ({name})", call, fault)
        return lengths

    def _block(self, source: int, lengths: tuple[int, int], spec: Spec) -> Block | None:
        rank, size = self.group.rank(), self.group.size()
        return block(rank, source, size, lengths, spec.causal, self.layout)

    def _local(self, spec: Spec, q: Tensor, v: Tensor, found: Block) -> Spec:
        backend = backends.choose(self.backend, q, v)
        return spec._replace(causal=found.causal, backend=backend, sharded=self.group.size() > 1)


def attend(
    found: Block, q: Tensor, t_q: Tensor | None, shards: Shards, spec: Spec, jvp: bool
) -> Saved:
    """Attention of a block of scores on its own."""
    q, t_q = (_part(y, found.rows) for y in (q, t_q))
    k, v, mask, t_k, t_v = (_part(y, found.keys) for y in shards)
    t = Tangents(t_q, t_k, t_v) if jvp else None
    return backends.implementation(spec).forward(Inputs(q, k, v, _column(mask)), t, spec)


def differentiate(
    found: Block, d_out, d_t_out, q, t_q, shards: Shards, saved: Saved, spec: Spec
) -> tuple[Tensor | None, ...]:
    """(dQ, dtQ, dK, dV, dtK, dtV) of a block of scores, from what all keys gave; without dtO the
    gradients of tangents are None."""
    q, t_q, d_out, d_t_out = (_part(y, found.rows) for y in (q, t_q, d_out, d_t_out))
    k, v, mask, t_k, t_v = (_part(y, found.keys) for y in shards)
    x, t = Inputs(q, k, v, _column(mask)), Tangents(t_q, t_k, t_v)
    saved = Saved(*(_part(y, found.rows) for y in saved))
    run = backends.implementation(spec).backward
    d, d_t = run(d_out, d_t_out, x, t, saved, spec, False)
    return d.q, d_t.q, d.k, d.v, d_t.k, d_t.v


def _call(mesh, layout, lengths, backend, query, key, value, attn_mask, dropout_p) -> str:
    """The name of the backend of the call, whose arguments are checked."""
    rules.arguments("ring_attention", query, key, attn_mask, dropout_p)
    return ring_backend(mesh, layout, lengths, backend)


def ring_backend(
    mesh: DeviceMesh, layout: str, lengths: tuple[int, int] | None, backend: str | None
) -> str:
    """The name of the backend of a ring over a 1-D mesh."""
    rules.outside_of_compile("ring_attention")
    rules.ring("ring_attention", mesh, layout, lengths)
    return _registered(mesh.get_group(), layout, lengths and tuple(lengths), backend)


@cache
def _registered(group: ProcessGroup, layout: str, lengths, backend: str | None) -> str:
    name = f"ring {_registered.cache_info().misses}"
    return backends.register(name, Ring(group, layout, lengths, backend))


def _column(mask: Tensor | None) -> Tensor | None:
    """(b, h, 1, S) <-> (b, h, S, 1)."""
    return None if mask is None else mask.transpose(2, 3)


def _part(x: Tensor | None, rows: slice) -> Any:
    return x if x is None or rows == slice(None) else x[:, :, rows].contiguous()


def _laid_out(x: Tensor | None, spec: Spec) -> Any:
    """(B, L, H, D) in memory where an operator promises that."""
    return (
        x.transpose(1, 2).contiguous().transpose(1, 2) if spec.rows_first and x is not None else x
    )


def _zeros(outline, dtype: torch.dtype) -> Packed:
    kinds = [None if x is None else (tuple(x.shape), dtype) for x in outline]
    packed = Packed(kinds, outline[0].device)
    packed.buffer.zero_()
    return packed


def _sum(total: Tensor | None, grad: Tensor | None, rows: slice, x: Tensor) -> Tensor | None:
    """`total`, overwritten, with the gradient of these rows of x."""
    if grad is None or (total is None and rows == slice(None)):
        return grad if grad is None else grad.to(wide(x.dtype))
    total = x.new_zeros(x.shape, dtype=wide(x.dtype)) if total is None else total
    total[:, :, rows] += grad
    return total
