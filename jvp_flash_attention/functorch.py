"""Every private name of PyTorch that the library uses, in one guarded place, and what is done with
them: duals unpacked and packed, a call run below the transforms that it has nothing to do with.

Most of them serve shortcuts: to see which transforms lie around a call, to run it below those that
have nothing to do with it, to recognise a call of which only the value is wanted. Where a version
of PyTorch lacks one of these, `SHORTCUTS` is False: every derivative goes through PyTorch's own
`autograd.Function`, more slowly and with the same results, and `torch.compile` leaves attention to
eager, because what lies around a call could not be known. What is used alone has its own guard.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

Pairs = list[tuple[Any, Tensor | None]]
SHORTCUTS = True


def _private(name: str, alone: bool = False) -> Any:
    """What has this name; None where this version of PyTorch does not have it. `alone`: the
    shortcuts need it not."""
    global SHORTCUTS
    try:
        return resolve_name(name)
    except (ImportError, AttributeError):
        SHORTCUTS = SHORTCUTS and alone
        return None


is_fwd_grad_enabled = _private("torch._C:_is_fwd_grad_enabled")
set_fwd_grad_enabled = _private("torch._C:_set_fwd_grad_enabled")
# torch._VF looks its functions up anew, which takes longer than the calls
unpack_dual = _private("torch._C:_VariableFunctions._unpack_dual")
make_dual = _private("torch._C:_VariableFunctions._make_dual")
CGradInterpreterPtr = _private("torch._C._functorch:CGradInterpreterPtr")
CJvpInterpreterPtr = _private("torch._C._functorch:CJvpInterpreterPtr")
TransformType = _private("torch._C._functorch:TransformType")
get_interpreter_stack = _private("torch._C._functorch:get_interpreter_stack")
innermost = _private("torch._C._functorch:peek_interpreter_stack")  # transform around this call
is_functorch_wrapped_tensor = _private("torch._C._functorch:is_functorch_wrapped_tensor")
pop_dynamic_layer_stack = _private("torch._C._functorch:pop_dynamic_layer_stack")
push_dynamic_layer_stack = _private("torch._C._functorch:push_dynamic_layer_stack")
unwrap_for_grad = _private("torch._C._functorch:_unwrap_for_grad")
wrap_for_grad = _private("torch._C._functorch:_wrap_for_grad")
eager_transforms = _private("torch._functorch.eager_transforms")
current_interpreter = _private(
    "torch._functorch.pyfunctorch:retrieve_current_functorch_interpreter"
)
unwrap_dead_wrappers = _private("torch._functorch.utils:unwrap_dead_wrappers")
len_torch_dispatch_stack = _private("torch._C:_len_torch_dispatch_stack")
_private("torch.autograd.forward_ad:_current_level")
_private("torch._functorch.eager_transforms:JVP_NESTING")

# PyTorch's older vmap, which may go
is_legacy_batchedtensor: Callable[[Tensor], bool] = _private(
    "torch._C._functorch:is_legacy_batchedtensor", alone=True
) or (lambda _: False)
add_batch_dim = _private("torch:_add_batch_dim", alone=True)
remove_batch_dim = _private("torch:_remove_batch_dim", alone=True)
# without it recorded attention drops a tangent, as every operator does
make_autograd_impl = _private("torch._library.autograd:make_autograd_impl", alone=True)
DispatchKeySet = _private("torch._C:DispatchKeySet", alone=True)
_executes = _private("torch._C:_will_engine_execute_node", alone=True)

# cuDNN's attention, which takes this library's own O and LSE backward
cudnn_attention: Any = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)
cudnn_attention_backward: Any = getattr(
    torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", None
)


def destroy(library: Any) -> None:
    """Takes back what a `torch.library.Library` registered; else it goes with its last
    reference."""
    getattr(library, "_destroy", lambda: None)()


# inside of it tensors are what they are at the bottom of every transform
without_functorch: Callable = getattr(torch._C, "_DisableFuncTorch", nullcontext)


def only(*names: str) -> Any:
    """The set of these dispatch keys, to compare with what a kernel is given; None where it cannot
    be made."""
    try:
        one, *more = [DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
        for other in more:
            one = one | other
        return one
    except (AttributeError, TypeError):
        return None


def _without_memory(x: Tensor) -> bool:
    try:
        return x.numel() > 0 and not x.is_meta and x.data_ptr() == 0
    except RuntimeError:  # a wrapper
        return False


is_zerotensor: Callable[[Tensor], bool] = getattr(Tensor, "_is_zerotensor", _without_memory)


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
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    # a compiled graph that holds a jvp does not tell `forward_ad`
    if not SHORTCUTS or innermost() is None:
        return False
    return any(is_jvp(transform) for transform in get_interpreter_stack() or ())


def is_jvp(transform: Any) -> bool:
    return transform.key() == TransformType.Jvp


def is_grad(transform: Any) -> bool:
    return transform.key() == TransformType.Grad


def unpack(*inputs: Tensor | None) -> Pairs | None:
    """(primal, tangent) of each input at the current level of differentiation; None where they are
    to be taken as they are."""
    if not SHORTCUTS:
        return None
    transform = innermost()
    if transform is None:
        if forward_ad._current_level < 0:
            return None
    elif not is_jvp(transform):  # out of reach, below vmap's, grad's wrapper
        return None
    # a graph recorded from bare primals would forget the tangent of a gradient
    if torch.is_grad_enabled() and _require_grad(inputs):
        return None  # the Function's own jvp rule meets the duals
    pairs: Pairs = []
    for x in inputs:
        t = None
        if x is not None:
            # names the level: `forward_ad` knows none where a compiled graph that holds the jvp is
            # run
            x, t = unpack_dual(x, level=0)
        pairs.append((x, nonzero(t)))  # a symbolic zero costs no matrix products
    return pairs


def unpack_compiled(*inputs: Tensor | None, nested: str | None = None) -> Pairs | None:
    """The same while a graph is traced: what is not unpacked meets its transforms in the operator
    (`transforms`), or raises what `nested` says. Without a jvp nothing is: inference mode and vmap
    have no unpacking."""
    nesting = eager_transforms.JVP_NESTING
    if nesting != 1 or not is_jvp(current_interpreter()):
        if nesting > 0 and nested is not None:
            raise NotImplementedError(nested)
        return None
    if not torch.compiler.is_dynamo_compiling():  # torch.export would record an empty unpacking
        return [(x, None) if x is None else forward_ad.unpack_dual(x) for x in inputs]
    # names the level: `forward_ad` reads a global that the compiler takes for a constant, "no
    # level" for the whole graph when a plain call comes first
    return [(x, None) if x is None else unpack_dual(x, level=0) for x in inputs]


def primals(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """What a jvp rule finds saved, without the tangents that it is given apart: below
    `forward_ad.dual_level` saved tensors are duals, and what is saved of them in turn would be."""
    if not SHORTCUTS or innermost() is not None:
        return list(tensors)
    return [None if x is None else forward_ad.unpack_dual(x).primal for x in tensors]


def tangent(x: Tensor) -> Tensor | None:
    """The tangent of x at the current level of differentiation, in eager and in compiled code."""
    if SHORTCUTS and torch.compiler.is_compiling():  # as in `unpack_compiled`
        return unpack_dual(x, level=0)[1]
    return forward_ad.unpack_dual(x).tangent


def pack(out: Tensor, t_out: Tensor) -> Tensor:
    """The dual number of both."""
    return make_dual(out, t_out, level=0)


def below_duals(attend: Callable, *args) -> tuple[Tensor, ...]:
    """attend(*args), one level below that of the duals, which were unpacked; arguments are values
    of `call`, and others.

    That level has nothing to do any more, which PyTorch finds out by making a Function for every
    call and, in a jvp, by recording a graph even under `torch.no_grad()`. Only tensors with a
    gradient of their own, as made at that level by `nn.Parameter`, need it.
    """
    if not SHORTCUTS or torch.compiler.is_compiling():
        return attend(*args)
    transform = innermost()
    if transform is None:
        if forward_ad._current_level < 0:
            return attend(*args)
    elif not is_jvp(transform):
        return attend(*args)
    for x in args:
        if _is_of_tensors(x) and _require_grad(x):
            return attend(*args)
    if transform is not None:
        return below(transform, attend, *args)
    duals = is_fwd_grad_enabled()
    set_fwd_grad_enabled(False)
    try:
        return attend(*args)
    finally:
        set_fwd_grad_enabled(duals)


def below(transform: Any, attend: Callable, *args) -> tuple[Tensor, ...]:
    """attend(*args), one level below the innermost grad or jvp, which has nothing to do with it."""
    level = transform.level()

    def lower(x: Any) -> Any:
        if isinstance(x, Tensor):
            return unwrap_for_grad(x, level)
        if _is_of_tensors(x):
            return x._make([None if y is None else unwrap_for_grad(y, level) for y in x])
        return x

    inner = [lower(x) for x in args]
    duals = is_fwd_grad_enabled()
    if is_jvp(transform) and not CJvpInterpreterPtr(transform).prevFwdGradMode():
        set_fwd_grad_enabled(False)  # torch.inference_mode() lies around the jvp
    layer = pop_dynamic_layer_stack()
    try:
        outputs = attend(*inner)
    finally:
        push_dynamic_layer_stack(layer)
        set_fwd_grad_enabled(duals)
    return tuple([wrap_for_grad(x, level) for x in outputs])


def _is_of_tensors(x: Any) -> bool:
    """Whether an argument is a named tuple of tensors and None, as `call.Inputs`."""
    return isinstance(x, tuple) and (x[0] is None or isinstance(x[0], Tensor))


def _require_grad(tensors: Iterable[Tensor | None]) -> bool:
    for x in tensors:  # noqa: SIM110 (a generator takes twice as long)
        if x is not None and x.requires_grad:
            return True
    return False


def is_recorded(args: tuple) -> bool:
    """Whether autograd may differentiate what is done to the tensors among them outside of every
    transform."""
    return _has_duals() or (
        torch.is_grad_enabled() and any(x.requires_grad for x in args if isinstance(x, Tensor))
    )


def _has_duals() -> bool:
    """Whether tensors outside of every transform may have tangents. The level inside of
    torch.func.jvp is its own: only tensors that it wraps have them."""
    return (
        forward_ad._current_level >= 0
        and eager_transforms.JVP_NESTING == 0
        and is_fwd_grad_enabled()
    )


def stopped_level(transform: Any) -> int:
    """The highest level whose gradients `torch.no_grad()` stops, -1 where there is none;
    `transform` is the innermost."""
    if not torch.is_grad_enabled():
        return transform.level()
    stopped = (
        x.level() - 1
        for x in get_interpreter_stack() or ()
        if is_grad(x) and not CGradInterpreterPtr(x).prevGradMode()
    )
    return max(stopped, default=-1)


PLAIN = {Tensor, Parameter, type(None)}


def is_bare(*tensors: Tensor | None) -> bool:
    """Whether nothing but values is asked of a call with these tensors: no transform, dual level,
    graph or mode lies around it, and none is a wrapper or a subclass."""
    if not SHORTCUTS or innermost() is not None or len_torch_dispatch_stack() or _has_duals():
        return False
    recording = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if type(x) not in PLAIN or (recording and x.requires_grad):
            return False
        if is_functorch_wrapped_tensor(x) or is_legacy_batchedtensor(x):
            return False
    return True


def is_watched() -> bool:
    """Whether a dispatch mode sees the operators of this call, or that is not to be known."""
    return not SHORTCUTS or len_torch_dispatch_stack() > 0


def a_dual_among(args: Iterable[Any]) -> bool:
    """Whether one of the tensors among the arguments of an operator carries a tangent."""
    if getattr(forward_ad, "_current_level", 0) < 0 or (SHORTCUTS and not is_fwd_grad_enabled()):
        return False
    tensors = (x for x in args if isinstance(x, Tensor))
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def nonzero(x: Tensor | None) -> Tensor | None:
    """None for a symbolic zero, which has no memory: the gradient of an output that is not used."""
    return None if x is None or is_zerotensor(x) else x


def ragged_dim(x: Tensor) -> int:
    """Which dimension of a jagged nested tensor has lengths; 0 where that is not to be known."""
    return getattr(x, "_ragged_idx", 0)


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
