"""Every private name of PyTorch that the library uses, in one guarded place.

Most of them serve shortcuts: to see which transforms lie around a call, to run it below those that
have nothing to do with it, to recognise a call of which only the value is wanted. Where a version
of PyTorch lacks one of these, `SHORTCUTS` is False: every derivative goes through PyTorch's own
`autograd.Function`, more slowly and with the same results, and `torch.compile` leaves attention to
eager, because what lies around a call could not be known. What is used alone has its own guard.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C import (
        _dispatch_keys as dispatch_keys,
    )
    from torch._C import (
        _is_fwd_grad_enabled as is_fwd_grad_enabled,
    )
    from torch._C import (
        _len_torch_dispatch_stack as len_torch_dispatch_stack,
    )
    from torch._C import (
        _set_fwd_grad_enabled as set_fwd_grad_enabled,
    )
    from torch._C._functorch import (
        CGradInterpreterPtr,
        CInterpreter,
        CJvpInterpreterPtr,
        TransformType,
        get_interpreter_stack,
        peek_interpreter_stack,
        pop_dynamic_layer_stack,
        push_dynamic_layer_stack,
    )
    from torch._C._functorch import (
        _unwrap_for_grad as unwrap_for_grad,
    )
    from torch._C._functorch import (
        _wrap_for_grad as wrap_for_grad,
    )
    from torch._functorch import eager_transforms
    from torch._functorch.pyfunctorch import (
        FuncTorchInterpreter,
        retrieve_current_functorch_interpreter,
    )
    from torch._functorch.utils import unwrap_dead_wrappers
    from torch.utils._python_dispatch import _get_current_dispatch_mode as get_current_dispatch_mode

    # torch._VF looks its functions up anew, which takes longer than the calls
    unpack_dual: Callable = torch._C._VariableFunctions._unpack_dual  # type: ignore[attr-defined]
    make_dual: Callable = torch._C._VariableFunctions._make_dual  # type: ignore[attr-defined]
    without_torch_function = torch._C.DisableTorchFunction
    _ = forward_ad._current_level, forward_ad._set_fwd_grad_enabled, eager_transforms.JVP_NESTING
    SHORTCUTS = True
except (ImportError, AttributeError):
    SHORTCUTS = False
    CInterpreter = FuncTorchInterpreter = TransformType = CGradInterpreterPtr = Any
    CJvpInterpreterPtr = eager_transforms = retrieve_current_functorch_interpreter = Any
    dispatch_keys = get_current_dispatch_mode = get_interpreter_stack = is_fwd_grad_enabled = Any
    len_torch_dispatch_stack = make_dual = peek_interpreter_stack = pop_dynamic_layer_stack = Any
    push_dynamic_layer_stack = set_fwd_grad_enabled = unpack_dual = unwrap_dead_wrappers = Any
    unwrap_for_grad = without_torch_function = wrap_for_grad = Any

try:
    from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportAssignmentType]
except ImportError:  # PyTorch's older vmap has gone, or is not to be recognized

    def is_legacy_batchedtensor(_x: Tensor) -> bool:
        return False


add_batch_dim: Any = getattr(torch, "_add_batch_dim", None)
remove_batch_dim: Any = getattr(torch, "_remove_batch_dim", None)

try:
    from torch._library.autograd import make_autograd_impl
except ImportError:  # recorded attention then drops a tangent, as every operator does
    make_autograd_impl = None


# inside of it tensors are what they are at the bottom of every transform
without_functorch: Callable = getattr(torch._C, "_DisableFuncTorch", nullcontext)


def _without_memory(x: Tensor) -> bool:
    try:
        return x.numel() > 0 and not x.is_meta and x.data_ptr() == 0
    except RuntimeError:  # a wrapper
        return False


is_zerotensor: Callable[[Tensor], bool] = getattr(Tensor, "_is_zerotensor", _without_memory)


_executes: Any = getattr(torch._C, "_will_engine_execute_node", None)


def is_wanted(ctx: Any, at: int) -> bool:
    """Whether the engine that runs this backward goes on to the Function's tensor input `at`.
    `ctx.needs_input_grad` only says whether it could. Where that is not to be known, it does."""
    edges = getattr(ctx, "next_functions", None)
    if _executes is None or not isinstance(edges, tuple) or at >= len(edges):
        return True
    node = edges[at][0]
    if node is None:
        return False
    try:
        return _executes(node)
    except RuntimeError:  # a leaf, of which PyTorch does not say
        return True


def inside_a_jvp() -> bool:
    """Whether dual numbers may be about: a `torch.func.jvp` or a `dual_level` lies around."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def nonzero(x: Tensor | None) -> Tensor | None:
    """None for a symbolic zero, which has no memory: the gradient of an output that is not used."""
    return None if x is None or is_zerotensor(x) else x


def materialized(x: Tensor) -> Tensor:
    """The elements in memory: a symbolic zero has none, a negative view holds the others."""
    if is_zerotensor(x):
        return x.clone()
    return x.resolve_neg() if x.is_neg() else x


def unbatched(x: Tensor) -> tuple[Tensor, int]:
    """A tensor of PyTorch's older vmap with its mapped dimension in front, and the level of that.

    Raises:
        NotImplementedError: there are several levels, or PyTorch cannot take them apart.
    """
    for level in range(1, 65 if add_batch_dim and remove_batch_dim else 1):
        inner = remove_batch_dim(x, level, 1, 0)
        if not is_legacy_batchedtensor(inner):
            return inner, level
    raise NotImplementedError(BATCHED)


BATCHED = (
    "cotangents batched more than once (is_grads_batched=True, torch.autograd.functional with"
    " vectorize=True) are not supported; use torch.func.vmap of torch.func.vjp, or"
    " torch.func.jacrev"
)
