"""Layers that carry a value and its tangent: y = f(x) and t_y = f'(x) t_x, written out.

A network of these layers computes its Jacobian-vector product by itself, layer by layer, on
ordinary tensors: no transform is around it. So one block after the other can be compiled, sharded
and checkpointed, and nothing is multiplied by a zero tangent. ⟨·⟩ is the mean over the features:

    linear      y = x Wᵀ + b                                 t_y = t_x Wᵀ
    rms norm    y = ρ x,         ρ = (⟨x²⟩ + ε)^-½             t_y = ρ (t_x - y ⟨y t_x⟩)
    layer norm  y = ρ (x - ⟨x⟩), ρ = (⟨(x - ⟨x⟩)²⟩ + ε)^-½     t_y = ρ (t_x - ⟨t_x⟩ - y ⟨y t_x⟩)
    product     y = a b                                      t_y = t_a b + a t_b
    activation  y = σ(x)                                     t_y = σ'(x) t_x
    attention   O = softmax(Q Kᵀ) V                          tO of ``attention_jvp``

Every function here takes plain tensors too and is then the ordinary layer, right under any
transform of PyTorch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from training.attentions import attend_jvp
from training.dual import Dual

EPSILON = 1e-6


Tensor = torch.Tensor | Dual


def primal(x: Tensor) -> torch.Tensor:
    return x.primal if isinstance(x, Dual) else x


def last(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The examples of x that have the tangent t (n, ...); x may be one for all, to be broadcast."""
    return x if x.dim() < t.dim() or len(x) in (1, len(t)) else x[-len(t) :]


def linear_map(f: Callable[[torch.Tensor], torch.Tensor], x: Tensor) -> Tensor:
    """f of value and tangent, where f is linear and has no parameters (a change of layout, say)."""
    if not isinstance(x, Dual):
        return f(x)
    y = f(x.primal)
    with x.rule():
        return x.follow(y, f(x.tangent))


def unpack(f: Callable[[torch.Tensor], Sequence[torch.Tensor]], x: Tensor) -> list[Tensor]:
    """``linear_map`` of an f that returns several tensors."""
    if not isinstance(x, Dual):
        return list(f(x))
    ys = f(x.primal)
    with x.rule():
        return [x.follow(*pair) for pair in zip(ys, f(x.tangent), strict=True)]


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, each (B or 1, ...)."""
    if not isinstance(x, Dual):
        if not isinstance(y, Dual):
            return x + y
        x, y = y, x
    total = x.primal + primal(y)
    with x.rule():
        if isinstance(y, Dual):
            return x.follow(total, x.tangent + y.tangent)
        shape = (len(x.tangent), *total.shape[1:])
        return x.follow(total, x.tangent.expand(shape))


def add_in_place(x: Tensor, y: torch.Tensor) -> Tensor:
    """x + y, rounded to x's dtype, in x's place, of a constant y: every derivative of the sum is
    x's own. Autograd is not told, because where x is a view it would copy gradients. So x must be
    new, and a result that its own derivative does not need: that of a product.
    """
    primal(x).data.add_(y)
    return x


def subtract(x: Tensor, y: Tensor) -> Tensor:
    return add(x, linear_map(torch.neg, y))


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x y, each (B or 1, ...)."""
    if not isinstance(x, Dual):
        if not isinstance(y, Dual):
            return x * y
        x, y = y, x
    product = x.primal * primal(y)
    with x.rule():
        t = x.tangent * last(primal(y), x.tangent)
        if isinstance(y, Dual):
            t = t + last(x.primal, y.tangent) * y.tangent
        return x.follow(product, t)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y. (B, N, W), (B or 1, 1, W), (B, N, W)"""
    return add(x, multiply(y, gate))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift. (B, N, W), twice (B or 1, 1, W)"""
    scale = scale.follow(1 + scale.primal, scale.tangent) if isinstance(scale, Dual) else 1 + scale
    return add(multiply(x, scale), shift)


class Linear(nn.Linear):
    """``nn.Linear`` of a value and its tangent: one product each."""

    def forward(self, input: Tensor) -> Any:
        if not isinstance(input, Dual):
            return functional.linear(input, self.weight, self.bias)
        y = functional.linear(input.primal, self.weight, self.bias)
        with input.rule():
            return input.follow(y, functional.linear(input.tangent, self.weight))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Statistics of half precision are those of its float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square norm without weights (arXiv 1910.07467); of half precision in float32."""
    v = _wide(primal(x))
    scale = torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + EPSILON)
    y = v * scale
    if not isinstance(x, Dual):
        return y
    with x.rule():
        return x.follow(y, _norm_tangent(_wide(x.tangent), y, scale))


def _norm_tangent(t: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    y, scale = last(y, t), last(scale, t)
    return scale * (t - y * (y * t).mean(dim=-1, keepdim=True))


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without weights; of half precision in float32.

    A compiler gets primitives. Elsewhere PyTorch's kernels serve: the Jacobian is symmetric, so
    that the kernel of the backward pass computes t_y. Under a transform they do not: the gradient
    through the tangent of ``F.layer_norm`` is wrong (torch 2.13: it takes mean and variance
    for constants).
    """
    v = _wide(primal(x))
    if torch.compiler.is_compiling() or _transformed(v):
        centred = v - v.mean(dim=-1, keepdim=True)
        if not isinstance(x, Dual):
            return rms_norm(centred)
        with x.rule():
            t = _wide(x.tangent)
            t = t - t.mean(dim=-1, keepdim=True)
        return rms_norm(x.follow(centred, t))
    shape = v.shape[-1:]
    if not isinstance(x, Dual):
        return functional.layer_norm(v, shape, eps=EPSILON)
    y, *statistics = torch.native_layer_norm(v, shape, None, None, EPSILON)
    with x.rule():
        t = _wide(x.tangent)
        of_t = (last(s, t) for s in statistics)
        t, *_ = torch.ops.aten.native_layer_norm_backward(
            t, last(v, t), shape, *of_t, None, None, [True, False, False]
        )
        return x.follow(y, t)


def _transformed(x: torch.Tensor) -> bool:
    """Whether x is inside a transform of ``torch.func`` or a dual number of PyTorch's."""
    return (
        torch.func.debug_unwrap(x) is not x
        or torch.autograd.forward_ad.unpack_dual(x).tangent is not None
    )


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh formula (arXiv 1606.08415)."""
    if not isinstance(x, Dual):
        return functional.gelu(x, approximate="tanh")
    y = functional.gelu(x.primal, approximate="tanh")
    with x.rule():
        v = last(x.primal, x.tangent)
        return x.follow(y, torch.ops.aten.gelu_backward(x.tangent, v, approximate="tanh"))


def silu(x: Tensor) -> Tensor:
    if not isinstance(x, Dual):
        return functional.silu(x)
    y = functional.silu(x.primal)
    with x.rule():
        v = last(x.primal, x.tangent)
        sigmoid = v.sigmoid()
        return x.follow(y, x.tangent * sigmoid * (1 + v * (1 - sigmoid)))


class Dropout(nn.Dropout):
    """Value and tangent lose the same units."""

    @property
    def drops(self) -> bool:
        return self.training and self.p > 0

    def forward(self, input: Tensor) -> Any:
        if not isinstance(input, Dual):
            return super().forward(input)
        if not self.drops:
            return input
        kept = functional.dropout(torch.ones_like(input.primal), self.p)
        return multiply(input, kept)


def concatenate(parts: list[Tensor], dim: int) -> Tensor:
    """Along a dimension other than that of the examples; parts without tangent have a zero one."""
    joined = torch.cat([primal(x) for x in parts], dim)
    duals = [x for x in parts if isinstance(x, Dual)]
    if not duals:
        return joined
    first = duals[0]
    n = len(first.tangent)
    with first.rule():
        tangents = [
            x.tangent if isinstance(x, Dual) else torch.zeros_like(x[-n:]).to(first.tangent.dtype)
            for x in parts
        ]
        return first.follow(joined, torch.cat(tangents, dim))


def attend(attention: Callable[..., torch.Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, a function with SDPA's signature, of values and their tangents. (B, H, N, D)

    Where the tangent is a constant of at most half of the examples, the values are one ordinary
    call, so that their gradient is one backward of all examples, whichever have a tangent. The
    values of some are then computed twice, which costs less than joining results and gradients.
    """
    inputs = (q, k, v)
    duals = [x for x in inputs if isinstance(x, Dual)]
    if not duals:
        return attention(*inputs)
    dual = duals[0]
    values = [primal(x) for x in inputs]
    tangents = [x.tangent if isinstance(x, Dual) else None for x in inputs]
    B, n = len(values[0]), len(dual.tangent)
    if n == B:
        return dual.follow(*attend_jvp(attention, values, tangents, dual.through))
    if not dual.through and 2 * n <= B:
        with dual.rule():
            _, t_out = attend_jvp(attention, [x[B - n :] for x in values], tangents, False)
        return dual.follow(attention(*values), t_out)
    first, rest = zip(*(x.split([B - n, n]) for x in values), strict=True)
    out, t_out = attend_jvp(attention, rest, tangents, dual.through)
    return dual.follow(torch.cat([attention(*first), out]), t_out)
