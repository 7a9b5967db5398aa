"""What `torch.func` makes of the operators in a compiled function: the Functions of `autograd`.

An operator has no rule for a transform: grad drops its gradient, jvp its tangent, vmap raises. So
the two forward operators meet a transform as the Function that they stand for, which lowers itself
level by level and reaches the operator again below all of them.
"""

from functools import partial

import torch
from torch.library import Library

from . import autograd, ops
from .call import Spec

_library = Library(ops.NAMESPACE, "IMPL")


def _as_function(function, *args):
    tensors = args[: -len(Spec._fields)]
    return function.apply(*tensors, Spec(*args[len(tensors) :]))


_overloads = getattr(torch.ops, ops.NAMESPACE)
for _op, _function in (
    (_overloads.flash_attn_forward.default, autograd.Attention),
    (_overloads.flash_attn_forward_jvp.default, autograd.AttentionJvp),
):
    _library.impl(_op, partial(_as_function, _function), "FuncTorchDynamicLayerFrontMode")
