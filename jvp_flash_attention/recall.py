"""A call like an earlier one goes straight to the launches that were prepared then.

A call is bare where only its values are wanted: no graph is recorded, no transform lies around it
but one `torch.func.jvp` or a dual level, whose tangents are then inputs; no autocast, no mode that
watches operators, no dropout; its tensors are PyTorch's own and nothing but memory. What a bare
call does follows from its numbers and from the layout of its tensors. The first one of a kind takes
the long way, where everything is checked and chosen, and leaves its launches under that key.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import backends
from .functorch import (
    SHORTCUTS,
    CInterpreter,
    TransformType,
    dispatch_keys,
    is_fwd_grad_enabled,
    len_torch_dispatch_stack,
    peek_interpreter_stack,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
    unpack_dual,
    unwrap_for_grad,
    without_torch_function,
    wrap_for_grad,
)
from .options import Options, layout, tf32_allowed

MOST = 4096  # kinds of calls; a program with more starts to collect anew

_known: dict[tuple, Callable] = {}
_PLAIN = {Tensor, Parameter, type(None)}
_REAL = (float, int)
# of the numbers of a call: equal keys must mean equal arguments, and 1 == True
_KINDS = set(product(_REAL, [bool], [*_REAL, type(None)], [bool], [str, type(None)]))


class Bare(NamedTuple):
    """A bare call: q, k, v, mask, t_q, t_k, t_v without duals and wrappers, and the key of its
    kind."""

    tensors: tuple[Tensor | None, ...]
    key: tuple
    jvp: bool
    transform: CInterpreter | None  # the torch.func.jvp around it

    def run(self) -> tuple[Tensor, Tensor | None] | None:
        """(O, tO) by the launches of an earlier call, None where there was none; tO is None in a
        call without tangents."""
        launch = _known.get(self.key)
        if launch is None or self.transform is None:
            return launch and launch(*self.tensors)
        out, t_out = _below_the_transform(launch, *self.tensors)
        return wrap_for_grad(out, 1), t_out if t_out is None else wrap_for_grad(t_out, 1)

    def remember(self, options: Options) -> None:
        """Keeps what this call, having gone the long way, launched."""
        if options.backend != "triton" or any(x is not None and x.dim() != 4 for x in self.tensors):
            return
        prepared = backends.implementation("triton").prepared
        if self.transform is not None:
            prepared = partial(_below_the_transform, prepared)
        launch = prepared(*self.tensors, options, self.jvp)
        if launch is not None:
            if len(_known) >= MOST:
                _known.clear()
            _known[self.key] = launch


def _below_the_transform(f: Callable, *args) -> Any:
    layer = pop_dynamic_layer_stack()
    try:
        return f(*args)
    finally:
        push_dynamic_layer_stack(layer)


def attention(query, key, value, attn_mask, numbers: tuple) -> Bare | None:
    """The call of `api.attention` with these arguments, where it is bare; `numbers` are dropout_p,
    is_causal, scale, enable_gqa and backend."""
    if not SHORTCUTS:
        return None
    inputs = (query, key, value, attn_mask)
    transform = peek_interpreter_stack()  # torch.func's innermost around this call
    if transform is None:
        if forward_ad._current_level < 0 or not is_fwd_grad_enabled():
            return _bare((*inputs, None, None, None), numbers, False, None)
    elif transform.level() != 1 or transform.key() != TransformType.Jvp:
        return None
    if not _are_plain(inputs) or _recorded(inputs):
        return None
    try:
        if transform is not None and _recorded(_unwrapped(inputs)):
            return None
        pairs = [(x, None) if x is None else unpack_dual(x, level=0) for x in inputs]
    except RuntimeError:  # a sparse tensor, or a wrapper whose transform has ended
        return None
    (q, t_q), (k, t_k), (v, t_v), (mask, t_mask) = pairs
    if t_mask is not None:
        return None
    tensors = (q, k, v, mask, t_q, t_k, t_v)
    if transform is not None:
        tensors = _unwrapped(tensors)
    jvp = not (t_q is None and t_k is None and t_v is None)
    return _bare(tensors, numbers, jvp, transform)


def attention_jvp(q, k, v, mask, t_q, t_k, t_v, numbers: tuple) -> Bare | None:
    """The call of `api.attention_jvp` with these arguments, where it is bare."""
    if not SHORTCUTS:
        return None
    duals = forward_ad._current_level >= 0 and is_fwd_grad_enabled()
    if duals or peek_interpreter_stack() is not None:
        return None
    return _bare((q, k, v, mask, t_q, t_k, t_v), numbers, True, None)


def _bare(tensors: tuple, numbers: tuple, jvp: bool, transform: CInterpreter | None) -> Bare | None:
    if tuple(map(type, numbers)) not in _KINDS or numbers[0] != 0.0:
        return None
    if not _are_plain(tensors) or len_torch_dispatch_stack():
        return None
    q: Any = tensors[0]
    kind = "cuda" if q.is_cuda else "cpu" if q.is_cpu else None
    if kind is None:  # no kernel runs there, and autocast may not know it
        return None
    keys, recording = _dense_keys(kind), torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (
            dispatch_keys(x).raw_repr() not in keys or (recording and x.requires_grad)
        ):
            return None
    if kind == "cuda" and q.get_device() != torch.cuda.current_device():
        return None
    if torch.is_autocast_enabled(kind):
        return None
    tf32 = q.dtype == torch.float32 and tf32_allowed()
    return Bare(tensors, (jvp, tf32, *numbers, *map(layout, tensors)), jvp, transform)


def _are_plain(tensors: tuple) -> bool:
    """Whether q, k and v are tensors, and the others tensors or absent; subclasses are not."""
    q, k, v, *_ = tensors
    there = q is not None and k is not None and v is not None
    return there and _PLAIN.issuperset(map(type, tensors))


def _unwrapped(tensors: tuple) -> tuple:
    """What lies below the outermost transform."""
    return tuple([None if x is None else unwrap_for_grad(x, 1) for x in tensors])


def _recorded(tensors: tuple) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@cache
def _dense_keys(kind: str) -> frozenset[int]:
    """The dispatch keys of tensors on a kind of device that nothing wraps, negates or leaves
    without memory: ordinary ones, and those made in inference mode."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference), without_torch_function():
            x = torch.empty(0, device=kind)  # inside torch.func.jvp it comes wrapped
            found.add(dispatch_keys(unwrap_for_grad(x, 1)).raw_repr())
    return frozenset(found)
