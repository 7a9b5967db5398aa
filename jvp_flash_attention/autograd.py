"""The eager path: four autograd.Functions that close under differentiation up to second order.

    Attention        (q, k, v, b) -> O                      backward AttentionGrad, jvp AttentionJvp
    AttentionJvp     (q, k, v, b, tq, tk, tv, tb) -> O, tO  backward AttentionJvpGrad, jvp raises
    AttentionGrad    (dO, q, k, v, b) -> dq, dk, dv, db     backward and jvp by the two Jvp ones
    AttentionJvpGrad (dO, dtO, ...) -> all eight gradients  backward and jvp raise: third order

Why AttentionGrad needs nothing of its own: with F = ⟨dq, ddq⟩ + ⟨dk, ddk⟩ + ⟨dv, ddv⟩ + ⟨db, ddb⟩ =
⟨dO, tO(tangents = dd)⟩, ∂F/∂dO is a forward+JVP with tangents dd, and ∂F/∂(q, k, v, b) its backward
with dtO := dO, dO := 0. The tangent of (dq, dk, dv, db) along (tq, tk, tv, tb, tdO) is the backward
of (O, tO) with dtO := dO, dO := tdO.

Every Function has `setup_context` (for torch.func) and a vmap rule that folds the mapped dimension
into the batch. AttentionDetached and AttentionJvpDetached serve `tangent_grad=False`: tO is a
constant to whoever differentiates further, and nothing of it is saved.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from inspect import Signature
from threading import local
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import vmap

from . import backends, ops
from .call import Inputs, Saved, Spec, Tangents, padded, split, without_ranges
from .functorch import (
    PLAIN,
    SHORTCUTS,
    add_batch_dim,
    below,
    innermost,
    is_bare,
    is_grad,
    is_legacy_batchedtensor,
    is_recorded,
    is_wanted,
    is_watched,
    nonzero,
    primals,
    stopped_level,
    unbatched,
    unwrap_dead_wrappers,
)

THIRD_ORDER = (
    "attention is differentiable twice, this asks for a third derivative; detach the tangent or"
    " the gradient (x.detach(), torch.no_grad()) where the third order is not wanted, take"
    " torch.func.jvp of torch.func.grad for torch.autograd.functional.hvp, or use plain PyTorch"
    " attention in float64"
)
MAPPED_SEQUENCES = (
    "vmap over cu_seqlens is not supported, all entries are packed alike; pack the sequences of all"
    " entries behind one another into one call"
)
NESTED_JVP = (
    "jvp of a jvp of attention is not supported; take the second directional derivative in reverse"
    " over forward (torch.func.grad or vjp of torch.func.jvp)"
)


def attention(x: Inputs, spec: Spec, tangent_grad: bool = True) -> tuple[Tensor]:
    """(O,), differentiable in q, k, v and a floating mask."""
    if is_bare(*x):
        return (backends.implementation(spec).forward(x, None, spec).out,)
    function = Attention if tangent_grad else AttentionDetached
    return function.apply(*x, spec)[:1]


def attention_jvp(
    x: Inputs, t: Tangents, spec: Spec, tangent_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """(O, tO); a tangent may be None. O is differentiable in the inputs, tO in inputs and tangents
    where `tangent_grad` says so."""
    if is_bare(*x, *t):
        saved = backends.implementation(spec).forward(x, t, spec)
        return saved.out, saved.t_out
    function = AttentionJvp
    if not tangent_grad:
        function = AttentionJvpDetached
        t = Tangents(*(None if each is None else each.detach() for each in t))
    out, _lse, t_out, _mu = function.apply(*x, *t, spec)
    if _is_batched(out) and not any(map(_is_batched, x)):  # only the tangents are many
        out = unbatched(out)[0][0]
    return out, t_out


def _implementation(spec: Spec, *tensors: Tensor | None):
    """The backend itself; behind operators where a dispatch mode or a tensor subclass watches,
    which would see a kernel's outputs being allocated and not being written."""
    subclass = not PLAIN.issuperset(map(type, tensors))
    if subclass and "torch.distributed.tensor" in sys.modules:
        import_module(f"{__package__}.distributed.dtensor")  # registers its rules, once
    watched = is_watched() or subclass
    return ops if watched else backends.implementation(spec)


class _Stop(local):
    """The level up to which PyTorch runs a Function with gradients enabled though `torch.no_grad()`
    stops them; 0 is that outside of every transform."""

    level = -1


_stop = _Stop()


class _Positional(Signature):
    """The signature of a function without defaults, which binds arguments as they come.
    `Function.apply` binds every call's; inspecting took longer than everything else in it."""

    def bind(self, *args, **kwargs) -> Any:
        return SimpleNamespace(args=args, kwargs=kwargs, apply_defaults=lambda: None)


def _mapped(f: Callable, *inputs: Any) -> Any:
    """f(*inputs), also of tensors of PyTorch's older vmap (`is_grads_batched=True`), which knows no
    rule of a Function's: they are unpacked, mapped by `torch.func.vmap` and packed again."""
    at = [i for i, x in enumerate(inputs) if _is_batched(x)]
    mapped, levels = zip(*(unbatched(inputs[i]) for i in at), strict=True)

    def one(*mapped):
        given = list(inputs)
        for i, x in zip(at, mapped, strict=True):
            given[i] = x
        return f(*given)

    return tuple(add_batch_dim(x, 0, levels[0]) for x in vmap(one)(*mapped))


def _is_batched(x: Any) -> bool:
    return isinstance(x, Tensor) and is_legacy_batchedtensor(x)


class _Folded(Function):
    """A Function whose vmap rule folds the mapped dimension into the batch: (V, B, ...) -> (V·B,
    ...)."""

    def __init_subclass__(cls) -> None:
        cls.forward.__signature__ = _Positional.from_callable(cls.forward)

    @classmethod
    def apply(cls, *args) -> Any:
        """`Function.apply`, or only the forward where nobody records a graph."""
        if any(map(_is_batched, args)):
            return _mapped(cls.apply, *args)
        if not SHORTCUTS:
            return super().apply(*args)
        transform = innermost()
        if transform is None:
            args = unwrap_dead_wrappers(args)  # of transforms that ended
            if _stop.level >= 0:
                with torch.no_grad():
                    return cls.forward(*args)
            return super().apply(*args) if is_recorded(args) else cls.forward(*args)
        # inside of torch.func.grad and jvp a Function enables gradients for every level below
        before, level = _stop.level, max(_stop.level, stopped_level(transform))
        if transform.level() <= level and is_grad(transform):
            return below(transform, cls.apply, *unwrap_dead_wrappers(args))
        _stop.level = level
        try:
            return super().apply(*args)
        finally:
            _stop.level = before

    @classmethod
    def vmap(cls, info, in_dims, *args):
        V = info.batch_size
        B = _batch(args[cls.query], in_dims[cls.query])
        shared = [cls.query + Inputs._fields.index(name) for name in ("cu_q", "cu_k")]
        if any(in_dims[i] is not None for i in shared):
            raise NotImplementedError(MAPPED_SEQUENCES)
        folded = [_fold(x, dim, V, B) for x, dim in zip(args, in_dims, strict=True)]
        for i in shared:
            folded[i] = args[i]
        outputs = cls.apply(*folded)
        outputs = [x.unflatten(0, (V, B)) for x in outputs]
        at = cls.query + Inputs._fields.index("mask")
        for i in cls.mask_grads if args[-1] else ():
            if _batch(args[at], in_dims[at]) != B:
                outputs[i] = outputs[i].sum(1, keepdim=True)
        return tuple(outputs), (0,) * len(outputs)

    query = 0  # which argument is q
    mask_grads: ClassVar[tuple[int, ...]] = ()  # outputs, where the last argument wants them


class Attention(_Folded):
    @staticmethod
    def forward(*args):
        x, spec = split(args, Inputs)
        return _implementation(spec, *x).forward(x, None, spec)[:2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.save_for_forward(*tensors, out, lse)

    @staticmethod
    def backward(ctx: Any, d_out, _d_lse):
        grads: Any = ()
        if d_out is not None:
            x, *saved = split(ctx.saved_tensors, Inputs)
            mask_grad = ctx.needs_input_grad[Inputs._fields.index("mask")]
            grads = _grad(d_out, x, Saved(*saved), ctx.spec, mask_grad)
        return *padded(grads, Inputs), None

    @staticmethod
    def jvp(ctx, *tangents):
        x, *_ = split(primals(ctx.saved_tensors), Inputs)
        t, *_ = split(tangents, Tangents)
        return attention_jvp(x, t, ctx.spec)[1], None


class AttentionDetached(Attention):
    """`Attention` whose tangent is not differentiated."""

    @staticmethod
    def jvp(ctx, *tangents):
        x, *_ = split(ctx.saved_tensors, Inputs)
        t, *_ = split(tangents, Tangents)
        with torch.no_grad():
            return attention_jvp(x, t, ctx.spec, tangent_grad=False)[1], None


class AttentionJvp(_Folded):
    @staticmethod
    def forward(*args):
        x, t, spec = split(args, Inputs, Tangents)
        return tuple(_implementation(spec, *x, *t).forward(x, t, spec))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec = inputs
        out, lse, _t_out, mu = output
        constant = [] if any(ctx.needs_input_grad[: len(Inputs._fields)]) else [out]
        ctx.mark_non_differentiable(*constant, lse, mu)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, d_out, _d_lse, d_t_out, _d_mu):
        x, t, saved = split(ctx.saved_tensors, Inputs, Tangents, Saved)
        needs, needs_t, _ = split(ctx.needs_input_grad, Inputs, Tangents)
        mask_grad = needs.mask or needs_t.mask
        d_out, d_t_out = nonzero(d_out), nonzero(d_t_out)
        grads: Any = ()
        t_grads = Tangents()
        if d_t_out is not None:
            grads, t_grads = _jvp_grad(d_out, d_t_out, x, t, saved, ctx.spec, mask_grad)
            t_grads = [g if y is not None else None for g, y in zip(t_grads, t, strict=True)]
        elif d_out is not None:  # the tangent was detached: an ordinary backward
            grads = _grad(d_out, x, saved, ctx.spec, mask_grad)
        return *padded(grads, Inputs), *t_grads, None

    @staticmethod
    def jvp(ctx, *_tangents):
        raise NotImplementedError(NESTED_JVP)


class AttentionJvpDetached(AttentionJvp):
    """`AttentionJvp` whose tO is not differentiated: what is saved, and the backward, are those of
    `Attention`."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _t, ctx.spec = split(inputs, Inputs, Tangents)
        out, lse, t_out, mu = output
        ctx.mark_non_differentiable(lse, t_out, mu)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*x, out, lse)

    @staticmethod
    def backward(ctx: Any, d_out, *_):
        *grads, _ = Attention.backward(ctx, d_out, None)
        return *grads, *Tangents(), None


class AttentionGrad(_Folded):
    query = 1
    mask_grads: ClassVar = (3,)

    @staticmethod
    def forward(d_out, *args):
        x, saved, spec, mask_grad = split(args, Inputs, Saved)
        run = _implementation(spec, d_out, *x).backward
        grads, _ = run(d_out, None, x, Tangents(), saved, spec, mask_grad)
        return tuple(g for g in grads if g is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.spec, ctx.mask_grad = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *dd):
        d_out, *tensors = ctx.saved_tensors
        x, _saved = split(tensors, Inputs, Saved)
        t = Tangents(*dd)
        t_out, grads = None, ()
        spec = without_ranges(ctx.spec)  # what forward mode leaves out has all its gradients
        if any(g is not None for g in dd):
            out, lse, t_out, mu = AttentionJvp.apply(*x, *t, spec)
            # torch.autograd.functional.jvp: only the tangent counts
            if any(is_wanted(ctx, at) for at in range(1, 4 + (x.mask is not None))):
                saved, mask_grad = Saved(out, lse, t_out, mu), ctx.needs_input_grad[4]
                grads, _ = _jvp_grad(None, d_out, x, t, saved, spec, mask_grad)
        return t_out, *padded(grads, Inputs), *padded((), Saved), None, None

    @staticmethod
    def jvp(ctx, t_d_out, *tangents):
        d_out, *tensors = ctx.saved_tensors
        x, saved = split(tensors, Inputs, Saved)
        t, *_ = split(tangents, Tangents)
        how = (ctx.spec, ctx.mask_grad)
        if all(each is None for each in t):  # linear in the cotangent
            grads = _grad(t_d_out, x, saved, *how)
        else:
            saved = Saved(*AttentionJvp.apply(*x, *t, ctx.spec))
            grads, _ = _jvp_grad(t_d_out, d_out, x, t, saved, *how)
        return tuple(grads if ctx.mask_grad else grads[:3])


class AttentionJvpGrad(_Folded):
    query = 2
    mask_grads: ClassVar = (3, 7)

    @staticmethod
    def forward(d_out, d_t_out, *args):
        x, t, saved, spec, mask_grad = split(args, Inputs, Tangents, Saved)
        run = _implementation(spec, d_out, d_t_out, *x, *t).backward
        grads, t_grads = run(d_out, d_t_out, x, t, saved, spec, mask_grad)
        return tuple(g for g in (*grads, *t_grads) if g is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx: Any, *_):
        raise NotImplementedError(THIRD_ORDER)

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(THIRD_ORDER)


def _grad(d_out, x: Inputs, saved: Saved, spec: Spec, mask_grad: bool) -> Tangents:
    """The gradients, that of the mask None unless `mask_grad`."""
    plain = Saved(saved.out, saved.lse)
    return Tangents(*AttentionGrad.apply(d_out, *x, *plain, spec, mask_grad))


def _jvp_grad(
    d_out, d_t_out, x: Inputs, t: Tangents, saved: Saved, spec: Spec, mask_grad: bool
) -> tuple[Tangents, Tangents]:
    """The gradients of inputs and of tangents, those of the mask None unless `mask_grad`."""
    grads = AttentionJvpGrad.apply(d_out, d_t_out, *x, *t, *saved, spec, mask_grad)
    half = len(grads) // 2
    return Tangents(*grads[:half]), Tangents(*grads[half:])


def _batch(x: Tensor, dim: int | None) -> int:
    """Length of the batch dimension of a tensor mapped over `dim`."""
    return x.shape[1 if dim == 0 else 0]


def _fold(x, dim: int | None, V: int, B: int):
    if not isinstance(x, Tensor):
        return x
    x = x.unsqueeze(0).expand(V, *x.shape) if dim is None else x.movedim(dim, 0)
    if x.dim() == 5 and x.shape[1] == 1:  # a mask broadcast over the batch
        x = x.expand(V, B, *x.shape[2:])
    return x.flatten(0, 1)
