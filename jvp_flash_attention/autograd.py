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

from collections.abc import Callable
from inspect import Signature
from threading import local
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import vmap
from torch.nn import Parameter

from . import backends, ops
from .functorch import (
    SHORTCUTS,
    add_batch_dim,
    below,
    innermost,
    is_grad,
    is_legacy_batchedtensor,
    is_recorded,
    is_wanted,
    is_watched,
    nonzero,
    stopped_level,
    unbatched,
    unwrap_dead_wrappers,
)
from .options import Options

THIRD_ORDER = (
    "attention is differentiable twice, this asks for a third derivative; detach the tangent or"
    " the gradient (x.detach(), torch.no_grad()) where the third order is not wanted, take"
    " torch.func.jvp of torch.func.grad for torch.autograd.functional.hvp, or use plain PyTorch"
    " attention in float64"
)
NESTED_JVP = (
    "jvp of a jvp of attention is not supported; take the second directional derivative in reverse"
    " over forward (torch.func.grad or vjp of torch.func.jvp)"
)


def attention(q, k, v, bias, seed, options: Options, tangent_grad: bool = True) -> tuple[Tensor]:
    """(O,), differentiable in q, k, v and a floating bias."""
    function = Attention if tangent_grad else AttentionDetached
    return function.apply(q, k, v, bias, seed, options)[:1]


def attention_jvp(
    q, k, v, bias, seed, t_q, t_k, t_v, t_bias, options: Options, tangent_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """(O, tO); a tangent may be None. O is differentiable in the inputs, tO in inputs and tangents
    where `tangent_grad` says so."""
    function, tangents = AttentionJvp, (t_q, t_k, t_v, t_bias)
    if not tangent_grad:
        function = AttentionJvpDetached
        tangents = (None if t is None else t.detach() for t in tangents)
    primals = (q, k, v, bias, seed)
    out, t_out = function.apply(*primals, *tangents, options)[:2]
    if _is_batched(out) and not any(map(_is_batched, primals)):  # only the tangents are many
        out = unbatched(out)[0][0]
    return out, t_out


def _implementation(options: Options, *tensors: Tensor | None):
    """The backend itself; behind operators where a dispatch mode or a tensor subclass watches,
    which would see a kernel's outputs being allocated and not being written."""
    watched = is_watched() or not _PLAIN.issuperset(map(type, tensors))
    return ops if watched else backends.implementation(options.backend)


_PLAIN = {Tensor, Parameter, type(None)}


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
        B = _batch(args[cls.query_index], in_dims[cls.query_index])
        outputs = cls.apply(*(_fold(x, dim, V, B) for x, dim in zip(args, in_dims, strict=True)))
        outputs = [x.unflatten(0, (V, B)) for x in outputs]
        for i, j in cls.bias_grads.items():
            if args[-1] and _batch(args[j], in_dims[j]) != B:
                outputs[i] = outputs[i].sum(1, keepdim=True)
        return tuple(outputs), (0,) * len(outputs)

    query_index = 0
    bias_grads: ClassVar[dict[int, int]] = {}  # output i is a gradient of the bias, argument j


class Attention(_Folded):
    @staticmethod
    def forward(q, k, v, bias, seed, options):
        return _implementation(options, q, k, v, bias).forward(q, k, v, bias, seed, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.save_for_forward(*tensors, out, lse)

    @staticmethod
    def backward(ctx: Any, d_out, _d_lse):
        if d_out is None:
            return (None,) * 6
        q, k, v, bias, seed, out, lse = ctx.saved_tensors
        need = ctx.needs_input_grad
        grads = _grad(d_out, q, k, v, bias, seed, out, lse, ctx.options, need[3])
        return (*grads, None, None)

    @staticmethod
    def jvp(ctx, t_q, t_k, t_v, t_bias, _t_seed, _t_options):
        q, k, v, bias, seed, _out, _lse = ctx.saved_tensors
        inputs = (q, k, v, bias, seed, t_q, t_k, t_v, t_bias, ctx.options)
        return attention_jvp(*inputs, tangent_grad=True)[1], None


class AttentionDetached(Attention):
    """`Attention` whose tangent is not differentiated."""

    @staticmethod
    def jvp(ctx, t_q, t_k, t_v, t_bias, _t_seed, _t_options):
        q, k, v, bias, seed, _out, _lse = ctx.saved_tensors
        inputs = (q, k, v, bias, seed, t_q, t_k, t_v, t_bias, ctx.options)
        with torch.no_grad():
            return attention_jvp(*inputs, tangent_grad=False)[1], None


class AttentionJvp(_Folded):
    @staticmethod
    def forward(q, k, v, bias, seed, t_q, t_k, t_v, t_bias, options):
        run = _implementation(options, q, k, v, bias, t_q, t_k, t_v, t_bias).forward_jvp
        return run(q, k, v, bias, seed, t_q, t_k, t_v, t_bias, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        out, t_out, lse, mu = output
        ctx.mark_non_differentiable(lse, mu)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, t_out, lse, mu)

    @staticmethod
    def backward(ctx: Any, d_out, d_t_out, _d_lse, _d_mu):
        q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu = ctx.saved_tensors
        need = ctx.needs_input_grad
        bias_grad = need[3] or need[8]
        d_out, d_t_out = nonzero(d_out), nonzero(d_t_out)
        if d_t_out is None:  # the tangent was detached: an ordinary backward
            if d_out is None:
                return (None,) * 10
            grads = _grad(d_out, q, k, v, bias, seed, out, lse, ctx.options, bias_grad)
            return (*grads, None, None, None, None, None, None)
        grads = _jvp_grad(
            d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias,
            out, t_out, lse, mu, ctx.options, bias_grad,
        )  # fmt: skip
        tangents = (t_q, t_k, t_v, t_bias)
        t_grads = [g if t is not None else None for g, t in zip(grads[4:], tangents, strict=True)]
        return (*grads[:4], None, *t_grads, None)

    @staticmethod
    def jvp(ctx, *_tangents):
        raise NotImplementedError(NESTED_JVP)


class AttentionJvpDetached(AttentionJvp):
    """`AttentionJvp` whose tO is not differentiated: what is saved, and the backward, are those of
    `Attention`."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, t_out, lse, mu = output
        ctx.options = inputs[-1]
        ctx.mark_non_differentiable(t_out, lse, mu)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], out, lse)

    @staticmethod
    def backward(ctx: Any, d_out, *_):
        return (*Attention.backward(ctx, d_out, None)[:5], *(None,) * 5)


class AttentionGrad(_Folded):
    query_index = 1
    bias_grads: ClassVar = {3: 4}

    @staticmethod
    def forward(d_out, q, k, v, bias, seed, out, lse, options, bias_grad):
        run = _implementation(options, d_out, q, k, v, bias).backward
        grads = run(d_out, q, k, v, bias, seed, out, lse, options, bias_grad)
        return tuple(g for g in grads if g is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, ctx.bias_grad = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *dd):
        d_out, q, k, v, bias, seed, _out, _lse = ctx.saved_tensors
        dd_q, dd_k, dd_v, dd_bias = (*dd, None)[:4]
        if all(g is None for g in dd):
            return (None,) * 10
        inputs = (q, k, v, bias, seed, dd_q, dd_k, dd_v, dd_bias)
        out, t_out, lse, mu = AttentionJvp.apply(*inputs, ctx.options)
        if not any(is_wanted(ctx, at) for at in range(1, 4 + (bias is not None))):
            return (t_out, *(None,) * 9)  # torch.autograd.functional.jvp: only the tangent counts
        grads = _jvp_grad(
            None, d_out, *inputs, out, t_out, lse, mu, ctx.options, ctx.needs_input_grad[4]
        )
        return (t_out, *grads[:4], None, None, None, None, None)

    @staticmethod
    def jvp(ctx, t_d_out, t_q, t_k, t_v, t_bias, *_):
        d_out, q, k, v, bias, seed, out, lse = ctx.saved_tensors
        options, bias_grad = ctx.options, ctx.bias_grad
        if all(t is None for t in (t_q, t_k, t_v, t_bias)):  # linear in the cotangent
            grads = _grad(t_d_out, q, k, v, bias, seed, out, lse, options, bias_grad)
        else:
            inputs = (q, k, v, bias, seed, t_q, t_k, t_v, t_bias)
            saved = AttentionJvp.apply(*inputs, options)
            grads = _jvp_grad(t_d_out, d_out, *inputs, *saved, options, bias_grad)[:4]
        return tuple(grads[:4] if bias_grad else grads[:3])


class AttentionJvpGrad(_Folded):
    query_index = 2
    bias_grads: ClassVar = {3: 5, 7: 5}

    @staticmethod
    def forward(
        d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
        options, bias_grad,
    ):  # fmt: skip
        run = _implementation(options, d_out, d_t_out, q, k, v, bias, t_q, t_k, t_v, t_bias)
        grads = run.backward_jvp(
            d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
            options, bias_grad,
        )  # fmt: skip
        return tuple(g for g in grads if g is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx: Any, *_):
        raise NotImplementedError(THIRD_ORDER)

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(THIRD_ORDER)


def _grad(d_out, q, k, v, bias, seed, out, lse, options, bias_grad):
    """(dq, dk, dv, db) with db None unless `bias_grad`."""
    grads = AttentionGrad.apply(d_out, q, k, v, bias, seed, out, lse, options, bias_grad)
    return grads if bias_grad else (*grads, None)


def _jvp_grad(*args):
    """(dq, dk, dv, db, dtq, dtk, dtv, dtb) with db and dtb None unless the last argument,
    `bias_grad`."""
    grads = AttentionJvpGrad.apply(*args)
    return grads if args[-1] else (*grads[:3], None, *grads[3:], None)


def _batch(x: Tensor, dim: int | None) -> int:
    """Length of the batch dimension of a tensor mapped over `dim`."""
    return x.shape[1 if dim == 0 else 0]


def _fold(x, dim: int | None, V: int, B: int):
    if not isinstance(x, Tensor):
        return x
    x = x.unsqueeze(0).expand(V, *x.shape) if dim is None else x.movedim(dim, 0)
    if x.dim() == 5 and x.shape[1] == 1:  # a bias broadcast over the batch
        x = x.expand(V, B, *x.shape[2:])
    return x.flatten(0, 1)
