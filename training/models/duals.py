"""Layers that bring their own tangent under ``torch.func.jvp``.

Where an operand has no tangent (a weight, a constant), PyTorch's rules put a zero in its place and
compute with it: one product of matrices more for every linear layer, which ``torch.compile`` keeps,
and for every such sum or product a look-up of its shape that takes the host longer than a launch.
Here y = f(x) and t_y = f'(x) t_x are written out, ⟨·⟩ being the mean over the features:

    linear      y = x Wᵀ + b                                 t_y = t_x Wᵀ
    rms norm    y = ρ x,         ρ = (⟨x²⟩ + ε)^-½             t_y = ρ (t_x - y ⟨y t_x⟩)
    layer norm  y = ρ (x - ⟨x⟩), ρ = (⟨(x - ⟨x⟩)²⟩ + ε)^-½     t_y = ρ (t_x - ⟨t_x⟩ - y ⟨y t_x⟩)
    modulation  y = x (1 + s) + b                            t_y = t_x (1 + s) + x t_s + t_b

The Jacobian of layer norm is symmetric, so that the kernel of its backward pass computes t_y.
"""

from typing import Any

import torch
from torch import nn
from torch._C._functorch import TransformType, get_interpreter_stack, is_functorch_wrapped_tensor
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter as innermost_transform,
)
from torch.nn import functional

EPSILON = 1e-6


def split(
    x: torch.Tensor, *constants: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and its tangent, where one ``torch.func.jvp`` is the only transform and the others are its
    constants. Elsewhere (x, None) with x whole: PyTorch's rules are right in every composition.
    """
    if torch.compiler.is_compiling():
        if eager_transforms.JVP_NESTING != 1 or not _is_jvp(innermost_transform()):
            return x, None
        # The level is named: the compiler takes the global that forward_ad reads for a constant.
        duals = [torch._VF._unpack_dual(a, level=0) for a in (x, *constants) if a is not None]
        return duals[0] if all(t is None for _, t in duals[1:]) else (x, None)
    transforms = get_interpreter_stack()
    if transforms is None or len(transforms) > 1 or not _is_jvp(transforms[0]):
        return x, None
    # A graph recorded inside of the jvp needs the dual; what the jvp does not wrap is constant.
    if x.requires_grad or any(a is not None and is_functorch_wrapped_tensor(a) for a in constants):
        return x, None
    return torch.autograd.forward_ad.unpack_dual(x)


def _is_jvp(transform: Any) -> bool:
    return transform.key() == TransformType.Jvp


class Linear(nn.Linear):
    """``nn.Linear`` whose tangent is one product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, t_x = split(input, self.weight, self.bias)
        y = functional.linear(x, self.weight, self.bias)
        if t_x is None:
            return y
        return torch.autograd.forward_ad.make_dual(y, functional.linear(t_x, self.weight))


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norm without weights (arXiv 1910.07467)."""
    x, t_x = split(x)
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPSILON)
    y = x * scale
    if t_x is None:
        return y
    t_y = scale * (t_x - y * (y * t_x).mean(dim=-1, keepdim=True))
    return torch.autograd.forward_ad.make_dual(y, t_y)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights: PyTorch's kernels, or primitives where these cannot be
    differentiated once more (a transform of a transform) or a compiler has better ones.
    """
    eager = not torch.compiler.is_compiling()
    if torch.is_autocast_enabled(x.device.type):  # to what F.layer_norm casts, with its tangent
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    primal, t_x = split(x)
    if eager and t_x is not None:
        shape = x.shape[-1:]
        y, *statistics = torch.native_layer_norm(primal, shape, None, None, EPSILON)
        t_y, *_ = torch.ops.aten.native_layer_norm_backward(
            t_x, primal, shape, *statistics, None, None, [True, False, False]
        )
        return torch.autograd.forward_ad.make_dual(y, t_y)
    if eager and get_interpreter_stack() is None and torch.autograd.forward_ad._current_level < 0:
        return functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
    return rms_norm(x - x.mean(dim=-1, keepdim=True))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(B, N, W) with (B or 1, 1, W)."""
    (y, t_x), (b, t_b), (s, t_s) = split(x), split(shift), split(scale)
    if t_x is None or t_b is None or t_s is None:
        return x * (1 + scale) + shift
    s = 1 + s
    return torch.autograd.forward_ad.make_dual(
        y * s + b, torch.addcmul(torch.addcmul(t_b, t_x, s), y, t_s)
    )
