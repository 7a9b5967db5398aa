"""Every `F.scaled_dot_product_attention` of a block of code through this attention."""

import warnings
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .api import attention
from .backends import BACKENDS
from .errors import ArgumentValueError
from .functorch import inside_a_jvp


class sdpa_override(TorchFunctionMode):
    """Context manager: each call of `torch.nn.functional.scaled_dot_product_attention` inside goes
    to `jvp_flash_attention.attention` with the same arguments, and so has a tangent.

        with sdpa_override():
            out, t_out = torch.func.jvp(model, (x,), (t,))      # timm, diffusers, transformers, ...

    Weights, modules and code stay as they are. The block may hold `torch.func` transforms, lie
    inside them, call a compiled function or be part of one; it nests and ends with an exception.
    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` are covered, and leave their inference
    kernels, which have no tangent, by themselves: they do so under any torch function mode.

    Like every torch function mode it acts on the calls of this thread while the block runs. Not
    seen, and without a tangent as ever, are `torch.jit.script`, `torch.export` graphs, the threads
    of `DataParallel` and what `torch.utils.checkpoint` recomputes after the block; put the `with`
    inside the checkpointed function.

    A jvp inside which no such call comes is warned about when the block ends: models that write
    their attention out, or leave SDPA out of a jvp, are not served by it. What came is counted.

    Args:
        backend, tangent_grad: as in `attention`, for every call.

    Attributes:
        calls: of SDPA and of multi-head attention that came here, without those of compiled code.
        jvp_calls: those among them inside a jvp (`torch.func.jvp`, `forward_ad.dual_level`).

    Raises:
        ValueError, TypeError, NotImplementedError: those of `attention`, from the call itself.
    """

    def __init__(self, *, backend: str | None = None, tangent_grad: bool = True) -> None:
        super().__init__()
        if backend is not None and backend not in BACKENDS:
            raise ArgumentValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
        self.backend, self.tangent_grad = backend, tangent_grad
        self.calls, self.jvp_calls, self._jvp = 0, 0, False

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            self._count(func)
        if func is F.scaled_dot_product_attention:
            how = {"backend": self.backend, "tangent_grad": self.tangent_grad}
            return attention(*args, **kwargs, **how)
        if func is F.multi_head_attention_forward:
            return _MULTI_HEAD[self.backend, self.tangent_grad](*args, **kwargs)
        if func is F.layer_norm and torch.compiler.is_compiling():
            return _layer_norm(*args, **kwargs)
        if func is Tensor.unflatten and torch.compiler.is_compiling():
            func = torch.unflatten  # the method is Python with a `super()` that cannot be traced
        return func(*args, **kwargs)

    def _count(self, func: Any) -> None:
        inside = inside_a_jvp()
        self._jvp |= inside
        if func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward:
            self.calls += 1
            self.jvp_calls += inside

    def __exit__(self, kind, *exception) -> None:
        super().__exit__(kind, *exception)
        if kind is None and self._jvp and self.jvp_calls == 0:
            warnings.warn(NOTHING_CAME.format(self.calls), stacklevel=2)


NOTHING_CAME = (
    "sdpa_override: a jvp ran inside the block and no scaled_dot_product_attention came from it"
    " ({} outside of the jvp), so its tangent is that of other code. Models of timm and of its"
    " descendants call SDPA where their `fused_attn` is True:"
    " jvp_flash_attention.integrations.timm.use_fused_attention(model) switches it on. Other models"
    " have a flag of their own, as diffusers' processors (AttnProcessor2_0) and transformers'"
    " attn_implementation='sdpa', or write attention out: call jvp_flash_attention.attention there"
)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm` taken apart: with weights it fails in PyTorch where a jvp is compiled."""
    out = F.layer_norm(input, normalized_shape, eps=eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _multi_head(backend: str | None, tangent_grad: bool) -> FunctionType:
    """`F.multi_head_attention_forward` with its global `scaled_dot_product_attention` replaced.

    It is a torch function itself and written in Python: the mode sees the outer call, and is off in
    its body, where the attention is. Only the globals that the body reads are given, without
    `__name__`, by which the compiler would look them up in PyTorch's module again.
    """
    original = F.multi_head_attention_forward
    reads = set(original.__code__.co_names) | {"__builtins__"}
    names = {name: value for name, value in vars(F).items() if name in reads}
    names["scaled_dot_product_attention"] = partial(
        attention, backend=backend, tangent_grad=tangent_grad
    )
    names["has_torch_function"] = lambda tensors: False  # asked before this mode got the call
    names["_check_key_padding_mask"] = _check_key_padding_mask
    return FunctionType(original.__code__, names, original.__name__, original.__defaults__)


def _check_key_padding_mask(mask: Tensor, src_len: int, bsz: int) -> None:
    """PyTorch's check, whose `torch._check` on a tensor the compiler cannot trace."""
    if tuple(mask.shape) != (bsz, src_len):
        raise ArgumentValueError(
            f"key_padding_mask must have shape (batch, S) = {(bsz, src_len)},"
            f" got {tuple(mask.shape)}"
        )


_MULTI_HEAD = {
    (backend, tangent_grad): _multi_head(backend, tangent_grad)
    for backend in (None, *BACKENDS)
    for tangent_grad in (True, False)
}
