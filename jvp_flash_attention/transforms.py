"""What `torch.func` makes of the operators in a compiled function: the Functions of `autograd`.

An operator has no rule for a transform: grad drops its gradient, jvp its tangent, vmap raises. So
the two forward operators meet a transform as the Function that they stand for, which lowers itself
level by level and reaches the operator again below all of them.
"""

import torch
from torch.library import Library

from . import autograd, ops
from .options import Options

_library = Library(ops.NAMESPACE, "IMPL")


def _forward(q, k, v, bias, seed, *options):
    return autograd.Attention.apply(q, k, v, bias, seed, Options(*options))


def _forward_jvp(q, k, v, bias, seed, t_q, t_k, t_v, t_bias, *options):
    inputs = (q, k, v, bias, seed, t_q, t_k, t_v, t_bias)
    return autograd.AttentionJvp.apply(*inputs, Options(*options))


_overloads = getattr(torch.ops, ops.NAMESPACE)
for _op, _function in (
    (_overloads.flash_attn_forward.default, _forward),
    (_overloads.flash_attn_forward_jvp.default, _forward_jvp),
):
    _library.impl(_op, _function, "FuncTorchDynamicLayerFrontMode")
