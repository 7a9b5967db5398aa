"""Ulysses attention: each process attends the whole sequence with a part of the heads.

One all-to-all turns rows into heads, (B, H, L/n, D) -> (B, H/n, L, D), for queries, keys, values,
their tangents and the mask together. Ordinary attention follows. A second all-to-all brings O and
tO back to rows. An all-to-all is a permutation: its tangent is itself, its gradient its inverse.

Grouped queries: where the key heads are no multiple of n, each is repeated until they are.

Jacobs et al., arXiv 2309.14509.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.library import custom_op

from .. import api, broadcast, functorch
from ..call import Inputs, Spec, Tangents
from ..ops import NAMESPACE
from . import rules
from .exchange import agree, all_to_all
from .sharding import split

NAME = "ulysses_attention"
NESTED = (
    "in a compiled torch.func.jvp ulysses_attention must not lie inside another transform (grad,"
    " vjp, vmap, jvp); run this jvp without torch.compile"
)
VMAP = "ulysses_attention has no vmap; put the mapped dimension into the batch"


def ulysses_attention(
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
    lengths: tuple[int, int] | None = None,
    backend: str | None = None,
    tangent_grad: bool = True,
) -> Tensor:
    """`attention` of sequences that are sharded over the processes of a mesh, heads dealt out.

    Every process calls it with its own rows, in the layout "contiguous", and the same flags.
    Tangents, gradients and gradients through the tangent are those of `attention`, of a loss summed
    over the processes.

    Args:
        query: (..., H, local L, D), as `shard` gives it; H divisible by the number of processes.
        key: (..., Hk, local S, D), of any number of rows in cross-attention.
        value: (..., Hk, local S, Dv).
        attn_mask: bool, broadcastable to (..., H, 1, local S), sharded with the keys: True attends.
        dropout_p: must be 0.
        is_causal, scale, enable_gqa, softcap: as for `attention`.
        mesh: 1-D DeviceMesh.
        lengths: (L, S) of the whole sequences; None where every process holds as many rows.
        backend, tangent_grad: as for `attention`.

    Returns:
        (..., H, local L, Dv) in query's dtype.

    Raises:
        TypeError, ValueError: as `attention`; heads that cannot be dealt out; the processes do not
            agree, which is checked the first time that a process sees a kind of call.
        NotImplementedError: dropout, a floating mask or one with rows, vmap; what `attention`
            raises.
    """
    numbers = (dropout_p, is_causal, scale, enable_gqa, backend, softcap)
    who = members(mesh)
    return attend(query, key, value, attn_mask, numbers, who, lengths, tangent_grad)


def ulysses_attention_jvp(
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
    lengths: tuple[int, int] | None = None,
    backend: str | None = None,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """`attention_jvp` of sharded sequences: value and tangent without dual numbers.

    Tangents are sharded as their primals; one that is None must be so on every process. The other
    arguments, the results and the errors are those of `ulysses_attention` and `attention_jvp`.
    """
    numbers = (dropout_p, is_causal, scale, enable_gqa, backend, softcap)
    tangents = (t_query, t_key, t_value)
    given, who = (query, key, value), members(mesh)
    return attend_jvp(*given, tangents, attn_mask, numbers, who, lengths, tangent_grad)


class Members(NamedTuple):
    """The processes among which heads are dealt out, and which of them this is."""

    group: str  # what an operator takes in place of a group
    size: int
    rank: int


def members(mesh: DeviceMesh) -> Members:
    """Those of a 1-D mesh."""
    rules.outside_of_compile(NAME)
    rules.dimensions(NAME, mesh, 1)
    group = mesh.get_group()
    return Members(_named(group), group.size(), group.rank())


def attend(
    query, key, value, attn_mask, numbers: tuple, who: Members, lengths, tangent_grad: bool = True
) -> Tensor:
    """`ulysses_attention` among the members; `numbers` are dropout_p, is_causal, scale, enable_gqa,
    the backend of the whole sequence and the soft cap."""
    x, _, spec, sizes = _prepare(query, key, value, attn_mask, numbers, who, lengths)
    if torch.compiler.is_compiling():
        pairs = functorch.unpack_compiled(*x, nested=NESTED)
    else:
        pairs = functorch.unpack(*x)
    x, t = api.paired(x, pairs)
    if t is None:
        return broadcast.result(_between(x, t, spec, who, lengths, tangent_grad)[0], sizes)
    out, t_out = _between(x, t, spec, who, lengths, tangent_grad)
    return broadcast.result(functorch.pack(out, t_out), sizes)


def attend_jvp(
    query,
    key,
    value,
    tangents,
    attn_mask,
    numbers: tuple,
    who: Members,
    lengths,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """`ulysses_attention_jvp` among the members."""
    given = (query, key, value, attn_mask, numbers, who, lengths)
    x, t, spec, sizes = _prepare(*given, tangents=(*tangents, None))
    out, t_out = _between(x, t, spec, who, lengths, tangent_grad)
    return broadcast.result(out, sizes), broadcast.result(t_out, sizes)


def _prepare(query, key, value, attn_mask, numbers, who: Members, lengths, tangents=None):
    rules.arguments(NAME, query, key, attn_mask, numbers[0])
    rules.whole(NAME, lengths)
    x, t, spec, sizes = api.prepare(query, key, value, attn_mask, *numbers, tangents=tangents)
    rules.heads(NAME, x.q.shape[1], who.size)
    return x, t, spec, sizes


def _between(
    x: Inputs, t: Tangents | None, spec: Spec, who: Members, lengths, tangent_grad: bool
) -> list[Tensor]:
    """[O] or, with tangents, [O, tO]: rows to heads, attention, heads to rows."""
    jvp = t is not None
    t = t or Tangents()
    if not tangent_grad:
        t = Tangents(*[None if y is None else y.detach() for y in t])
    L, S = lengths or (who.size * x.q.shape[2], who.size * x.k.shape[2])
    if not torch.compiler.is_compiling():  # the graphs must be the same anyway
        _agree(who, x, (*t[:3], jvp or None), spec, (L, S))
    repeats = who.size // gcd(x.k.shape[1], who.size)
    k, v, t_k, t_v = (_repeat(y, repeats) for y in (x.k, x.v, t.k, t.v))
    mask = None if x.mask is None else x.mask.transpose(2, 3)
    given, rows = (x.q, k, v, t.q, t_k, t_v, mask), (L, S, S, L, S, S, S)
    there = [(i, y) for i, y in enumerate(given) if y is not None]
    heads = tuple(y.shape[1] for _, y in there)
    plan = Deal(*who, True, tuple(rows[i] for i, _ in there), heads)
    dealt = exchange(plan, [y for _, y in there])
    whole: Any = dict(zip((i for i, _ in there), dealt, strict=True))
    q_, k_, v_, t_q, t_k, t_v, mask = (whole.get(i) for i in range(7))
    mask = None if mask is None else mask.transpose(2, 3)
    numbers = (mask, 0.0, spec.causal, spec.scale, True)
    how: Any = {"backend": spec.backend, "tangent_grad": tangent_grad, "softcap": spec.softcap}
    if jvp:
        results = list(api.attention_jvp(q_, k_, v_, t_q, t_k, t_v, *numbers, **how))
    else:
        results = [api.attention(q_, k_, v_, *numbers, **how)]
    count = len(results)
    back = exchange(Deal(*who, False, (L,) * count, (x.q.shape[1],) * count), results)
    return [back[0], *(y if tangent_grad else y.detach() for y in back[1:])]


def _agree(who: Members, x: Inputs, given, spec: Spec, lengths: tuple[int, int]) -> None:
    q, k, v, mask, *_ = x
    call = (
        *(("lengths", lengths), ("dtype", q.dtype)),
        ("batch, heads, head dim", (*q.shape[:2], q.shape[3], k.shape[1], v.shape[3])),
        ("causal, scale, softcap", (spec.causal, spec.scale, spec.softcap)),
        ("mask", None if mask is None else tuple(mask.shape[:2])),
        ("tangents", tuple(y is not None for y in given)),
    )
    fault = None
    for what, y, length in (("query", q, lengths[0]), ("key", k, lengths[1])):
        mine = split(length, who.size)[who.rank]
        if y.shape[2] != mine:
            fault = (
                f"{what} must hold {mine} of {length} rows, got {y.shape[2]}; shard with `shard`,"
                " and pass lengths= where they differ"
            )
    agree(_groups[who.group], NAME, call, fault)


def _repeat(x: Tensor | None, count: int) -> Tensor | None:
    return x if x is None or count == 1 else x.repeat_interleave(count, 1)


class Deal(NamedTuple):
    """An all-to-all of several tensors. `gather`: rows become heads, (B, heads, local rows, ...) ->
    (B, heads / n, rows, ...); otherwise back."""

    group: str
    size: int
    rank: int
    gather: bool
    lengths: tuple[int, ...]  # of the whole sequence, for each tensor
    heads: tuple[int, ...]  # in all, for each tensor; 1: every process gets the same one

    def inverse(self) -> "Deal":
        return self._replace(gather=not self.gather)

    def of(self, which: Sequence[int]) -> "Deal":
        """The same for some of the tensors."""
        lengths, heads = (tuple(x[i] for i in which) for x in (self.lengths, self.heads))
        return self._replace(lengths=lengths, heads=heads)

    def shape(self, i: int, x: Tensor) -> tuple[int, ...]:
        """Of what becomes of tensor i."""
        heads = self.heads[i]
        if self.gather:
            return (x.shape[0], max(heads // self.size, 1), self.lengths[i], *x.shape[3:])
        return (x.shape[0], heads, split(self.lengths[i], self.size)[self.rank], *x.shape[3:])

    def rows(self, i: int, x: Tensor, process: int) -> Tensor:
        """Those of a process, in a tensor of all rows."""
        return x[:, :, _share(self.lengths[i], self.size, process)]

    def part(self, i: int, x: Tensor, process: int) -> Tensor:
        """The heads of a process, in a tensor of all heads."""
        return x if self.heads[i] == 1 else x[:, _share(self.heads[i], self.size, process)]


def deal(plan: Deal, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The all-to-all, in one collective."""
    out = [x.new_empty(plan.shape(i, x)) for i, x in enumerate(tensors)]
    leave, arrive = (plan.part, plan.rows) if plan.gather else (plan.rows, plan.part)
    sent = [[leave(i, x, to) for i, x in enumerate(tensors)] for to in range(plan.size)]
    places = [[arrive(i, x, come) for i, x in enumerate(out)] for come in range(plan.size)]
    kinds = [[(tuple(x.shape), x.dtype) for x in some] for some in places]
    received = all_to_all(_groups[plan.group], sent, kinds)
    for some, others in zip(places, received, strict=True):
        for place, x in zip(some, others, strict=True):
            place.copy_(x)
    return out


def exchange(plan: Deal, tensors: list[Tensor]) -> list[Tensor]:
    """`deal`, differentiable in whatever way the moment asks for."""
    if torch.compiler.is_compiling():
        return deal_op(tensors, *plan)
    return list(AllToAll.apply(plan, *tensors))


class AllToAll(Function):
    """Linear, and orthogonal: its gradient is its inverse."""

    @staticmethod
    def forward(plan, *tensors):
        return tuple(deal(plan, tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plan = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in output if not x.is_floating_point()))

    @staticmethod
    def backward(ctx, *grads):
        return (None, *_some(ctx.plan.inverse(), grads))

    @staticmethod
    def jvp(ctx, _plan, *tangents):
        return tuple(_some(ctx.plan, tangents))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise NotImplementedError(VMAP)


def _some(plan: Deal, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The all-to-all of those that are there."""
    which = [i for i, x in enumerate(tensors) if x is not None]
    dealt = AllToAll.apply(plan.of(which), *(tensors[i] for i in which))
    found: Any = dict(zip(which, dealt, strict=True))
    return [found.get(i) for i in range(len(tensors))]


_groups: dict[str, ProcessGroup] = {}


@cache
def _named(group: ProcessGroup) -> str:
    """What an operator takes in place of a group."""
    name = f"group {len(_groups)}"
    _groups[name] = group
    return name


@custom_op(
    f"{NAMESPACE}::all_to_all",
    mutates_args=(),
    # torch 2.8 may not read it off the annotations
    schema="(Tensor[] tensors, str group, SymInt size, SymInt rank, bool gather,"
    " SymInt[] lengths, SymInt[] heads) -> Tensor[]",
)
def deal_op(
    tensors: list[Tensor], group: str, size: int, rank: int, gather: bool,
    lengths: list[int], heads: list[int],
) -> list[Tensor]:  # fmt: skip
    plan = Deal(group, size, rank, gather, tuple(lengths), tuple(heads))
    return deal(plan, tensors)


@deal_op.register_fake
def _(tensors, group, size, rank, gather, lengths, heads):
    plan = Deal(group, size, rank, gather, tuple(lengths), tuple(heads))
    return [x.new_empty(plan.shape(i, x)) for i, x in enumerate(tensors)]


def _save(ctx, inputs, output):
    _, *plan = inputs
    ctx.plan = Deal(*plan)
    ctx.like = [(x.shape, x.dtype, x.device) for x in output]


def _backward(ctx, grads):
    floating = [i for i, (_, dtype, _) in enumerate(ctx.like) if dtype.is_floating_point]
    given = [
        torch.zeros(shape, dtype=dtype, device=device) if grads[i] is None else grads[i]
        for i, (shape, dtype, device) in enumerate(ctx.like)
        if i in floating
    ]
    plan = ctx.plan.of(floating).inverse()
    found = dict(zip(floating, deal_op(given, *plan), strict=True))
    return [found.get(i) for i in range(len(ctx.like))], *(None,) * 6


deal_op.register_autograd(_backward, setup_context=_save)


def _share(length: int, size: int, process: int) -> slice:
    """Those of a process, of rows or heads."""
    ends = [0, *accumulate(split(length, size))]
    return slice(ends[process], ends[process + 1])
