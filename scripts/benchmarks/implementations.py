"""Who is measured: this library, PyTorch's attention by backend, and anything importable."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from jvp_flash_attention import attention, attention_jvp

from .problem import Problem

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Implementation:
    """How to call one. `jvp` is absent where there is no forward-mode derivative; `around` is
    entered once around all calls, so that it costs none of them time."""

    plain: Callable[[Problem, tuple], Tensor]  # q, k, v -> out
    jvp: Callable[[Problem, tuple, tuple], Pair] | None = None  # and t_q, t_k, t_v -> out, t_out
    around: Callable[[], AbstractContextManager] = nullcontext


def _ours(p: Problem, x: tuple) -> Tensor:
    return attention(*x, attn_mask=p.mask, is_causal=p.causal)


def _ours_jvp(p: Problem, x: tuple, t: tuple) -> Pair:
    return attention_jvp(*x, *t, attn_mask=p.mask, is_causal=p.causal)


def _sdpa(p: Problem, x: tuple) -> Tensor:
    return scaled_dot_product_attention(*x, attn_mask=p.mask, is_causal=p.causal)


def _sdpa_jvp(p: Problem, x: tuple, t: tuple) -> Pair:
    return torch.func.jvp(lambda *x: _sdpa(p, x), x, t)  # pyright: ignore[reportReturnType]


def _only(backend: SDPBackend) -> Callable[[], AbstractContextManager]:
    return lambda: sdpa_kernel(backend)


@contextmanager
def _math_in_16_bits() -> Iterator[None]:
    """MATH with products of the inputs' own 16 bits. PyTorch casts them to float32 by default."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


BUILT_IN = {
    "ours": Implementation(_ours, _ours_jvp),
    "sdpa-math": Implementation(_sdpa, _sdpa_jvp, _only(SDPBackend.MATH)),
    "sdpa-math-16bit": Implementation(_sdpa, _sdpa_jvp, _math_in_16_bits),
    "flash": Implementation(_sdpa, around=_only(SDPBackend.FLASH_ATTENTION)),
    "cudnn": Implementation(_sdpa, around=_only(SDPBackend.CUDNN_ATTENTION)),
}


def find(name: str) -> Implementation:
    """One of BUILT_IN, or `module:function` with the arguments (q, k, v), attn_mask= and is_causal=
    or causal=, differentiated in a `forward_ad.dual_level`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(
            f"an implementation is one of {', '.join(BUILT_IN)} or module:function, got {name!r}"
        )
    try:
        return _imported(attrgetter(attribute)(import_module(module)))
    except (ImportError, AttributeError) as reason:
        raise ValueError(f"implementation {name!r} cannot be imported: {reason}") from reason


def _imported(function: Callable) -> Implementation:
    try:
        causal = "causal" if "causal" in inspect.signature(function).parameters else "is_causal"
    except ValueError:  # a function of C++
        causal = "is_causal"

    def plain(p: Problem, x: tuple) -> Tensor:
        more = {} if p.mask is None else {"attn_mask": p.mask}
        return function(*x, **more, **({causal: True} if p.causal else {}))

    def jvp(p: Problem, x: tuple, t: tuple) -> Pair:
        with forward_ad.dual_level():
            duals = tuple(forward_ad.make_dual(x, t) for x, t in zip(x, t, strict=True))
            out, t_out = forward_ad.unpack_dual(plain(p, duals))
        if t_out is None:
            raise NotImplementedError("it returns no tangent")
        return out, t_out

    return Implementation(plain, jvp)


def prepare(
    implementation: Implementation, name: str, p: Problem
) -> Callable[[], tuple[Tensor, ...]]:
    """The function that is timed: pass `name`. A backward pass keeps its graph, so that it can be
    repeated; its forward pass is run here."""
    if name == "forward":
        return lambda: (implementation.plain(p, p.primals),)
    if name == "backward":
        leaves = _leaves(p.primals)
        out = implementation.plain(p, leaves)
        return lambda: torch.autograd.grad(out, leaves, p.d_out, retain_graph=True)
    jvp = implementation.jvp
    if jvp is None:
        raise NotImplementedError("it has no forward-mode derivative")
    if name == "jvp":
        return lambda: jvp(p, p.primals, p.tangents)
    x, t = _leaves(p.primals), _leaves(p.tangents)
    both = jvp(p, x, t)
    return lambda: torch.autograd.grad(both, (*x, *t), (p.d_out, p.d_t_out), retain_graph=True)


def _leaves(x: tuple) -> tuple:
    return tuple(y.detach().requires_grad_() for y in x)
