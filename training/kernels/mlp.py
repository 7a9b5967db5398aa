"""The MLP of a transformer block: two products, the GELU between them and the tangent's.

    z = x Aᵀ + a,   h = gelu(z),   y = h Bᵀ + b
    t_z = t_x Aᵀ,   t_h = gelu'(z) t_z,   t_y = t_h Bᵀ         of the last n images
    d_z = (d_y B) ∘ gelu'(z),   d_x = d_z A
    d_A = d_zᵀ x,   d_a = Σ d_z,   d_B = d_yᵀ h                   over the tokens

One operator a direction, so that GELU is no pass of its own where a kernel multiplies and applies
it (``gelu_products``). d_b = Σ d_y is left to whoever reads y. Tangents are constants: a gradient
through them takes the layers one by one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jvp_flash_attention.operators import operator
from training.dual import Dual
from training.kernels.gelu_products import gelu_product, gradient_product, tangent_product


@operator("flash_jvp_training::mlp")
def _forward(
    x: Tensor, A: Tensor, a: Tensor | None, B: Tensor, b: Tensor | None, t_x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, z, h and t_y. Biases may be wider than x."""
    x = x.contiguous()
    a, b = (None if bias is None else bias.to(x.dtype) for bias in (a, b))
    z, h = gelu_product(x, A, a)
    y = nn.functional.linear(h, B, b)
    if t_x is None:
        return y, z, h, x.new_empty(0)
    t_h = tangent_product(t_x.contiguous(), A, z[-len(t_x) :])
    return y, z, h, nn.functional.linear(t_h, B)


@_forward.register_fake
def _(x, A, a, B, b, t_x):
    z, y = x.new_empty(*x.shape[:-1], len(A)), x.new_empty(*x.shape[:-1], len(B))
    t_y = x.new_empty(0) if t_x is None else x.new_empty(*t_x.shape[:-1], len(B))
    return y, z, torch.empty_like(z), t_y


@operator("flash_jvp_training::mlp_backward")
def _backward(
    d_y: Tensor, x: Tensor, z: Tensor, h: Tensor, A: Tensor, B: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of d_x, d_A, d_a and d_B that are wanted, else empty; d_a in float32."""
    of_x, of_A, of_a, of_B = wanted
    d_y = d_y.contiguous()
    d_z, d_a = gradient_product(d_y, B, z, of_a)

    def weight(d: Tensor, x: Tensor, wanted: bool) -> Tensor:
        return d.flatten(0, -2).mT @ x.flatten(0, -2) if wanted else d.new_empty(0)

    d_x = d_z @ A if of_x else d_z.new_empty(0)
    return d_x, weight(d_z, x, of_A), d_a, weight(d_y, h, of_B)


@_backward.register_fake
def _(d_y, x, z, h, A, B, wanted):
    shapes = (x.shape, A.shape, A.shape[:1], B.shape)
    types = (x.dtype, x.dtype, torch.float32, x.dtype)
    return tuple(
        x.new_empty(shape if there else 0, dtype=dtype)
        for shape, there, dtype in zip(shapes, wanted, types, strict=True)
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, A, a, B, _, _ = inputs
    _, z, h, t_y = output
    ctx.mark_non_differentiable(z, h, t_y)
    ctx.save_for_backward(x, z, h, A, B)
    ctx.bias = None if a is None else a.dtype
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, d_y: Tensor | None, *_: Any) -> tuple:
    if d_y is None:
        return (None,) * 6
    *wanted, of_b = ctx.needs_input_grad[:5]
    if of_b:
        raise RuntimeError("mlp leaves the gradient of b to whoever reads y; give it b.detach()")
    found = _backward(d_y, *ctx.saved_tensors, wanted)
    d_x, d_A, d_a, d_B = (d if there else None for d, there in zip(found, wanted, strict=True))
    return d_x, d_A, None if d_a is None else d_a.to(ctx.bias), d_B, None, None


torch.library.register_autograd("flash_jvp_training::mlp", _grad, setup_context=_setup)


def mlp(x: Tensor | Dual, expand: nn.Linear, contract: nn.Linear) -> Any:
    """y = contract(gelu(expand(x))), GELU by its tanh formula, with x's tangent, a constant.
    The gradient of contract's bias is left to whoever reads y.

    x (B, N, W), of the dtype in which it is computed.
    """
    value, t_x = x[:2] if isinstance(x, Dual) else (x, None)
    A, B = (layer.weight.to(value.dtype) for layer in (expand, contract))
    bias = None if contract.bias is None else contract.bias.detach()
    y, _, _, t_y = _forward(value, A, expand.bias, B, bias, t_x)
    return x.follow(y, t_y) if isinstance(x, Dual) else y
