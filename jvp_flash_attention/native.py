"""PyTorch's own `F.scaled_dot_product_attention` as this attention, in the whole process.

    from jvp_flash_attention import native

    native.activate()       # or, from PyTorch 2.11: torch.nn.attention's
                            # activate_flash_attention_impl("flash-jvp")
    out, t_out = torch.func.jvp(model, (x,), (t,))
    native.deactivate()     # or restore_flash_attention_impl()

The operator itself is overridden in PyTorch's dispatcher, below every torch function: calls from
C++, other threads (`nn.DataParallel`), TorchScript and recomputed checkpoints come here too, and
no call but those of attention costs anything. `sdpa_override` is the same for a block of code and
one thread.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .api import attention
from .backends import BACKENDS
from .errors import ArgumentValueError
from .functorch import destroy, inside_a_jvp
from .validation import DTYPES

NAME = "flash-jvp"
OPERATOR = torch.ops.aten.scaled_dot_product_attention.default
DEVICES = ("CPU", "CUDA")
# what PyTorch's registry of attentions is called, where there is one
REGISTRY = ("register", "activate", "restore", "current")

_how: dict[str, Any] = {"backend": None, "tangent_grad": True}
_plain: "Override | None" = None
_lock = Lock()


def activate(*, backend: str | None = None, tangent_grad: bool = True) -> None:
    """From now on each call of `F.scaled_dot_product_attention`, on every thread, is
    `jvp_flash_attention.attention` with the same arguments. A second call changes how.

    Tensors of a kind that this attention does not know (other devices, complex numbers, nested
    tensors) and calls in `torch.inference_mode()`, which has no tangents, stay PyTorch's. So do
    calls outside of a jvp where `sdpa_kernel(SDPBackend.MATH)` asks for PyTorch's MATH alone.

    Args:
        backend, tangent_grad: as in `attention`, for every call.

    Raises:
        ValueError: `backend` is unknown. Calls raise what `attention` raises.
    """
    global _plain
    if backend is not None and backend not in BACKENDS:
        raise ArgumentValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    with _lock:
        _how.update(backend=backend, tangent_grad=tangent_grad)
        if is_active():
            return
        if _registry is not None:
            _registry["activate"](NAME)
        else:
            _plain = Override()


def deactivate() -> None:
    """`F.scaled_dot_product_attention` is PyTorch's own again. Without effect where it is."""
    global _plain
    with _lock:
        if not is_active():
            return
        if _registry is not None:
            _registry["restore"]()
        else:
            _plain = _plain and _plain.remove()


def is_active() -> bool:
    """Whether `F.scaled_dot_product_attention` is this attention."""
    if _registry is not None:
        return _registry["current"]() == NAME
    return _plain is not None


class Override:
    """The kernels in the dispatcher, until they are removed."""

    def __init__(self) -> None:
        self.library = Library("aten", "IMPL")
        for key in (*(f"Autograd{device}" for device in DEVICES), "FuncTorchDynamicLayerFrontMode"):
            self.library.impl("scaled_dot_product_attention", _attend, key)

    def remove(self) -> None:
        """Takes them back."""
        destroy(self.library)
        del self.library


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    if not _is_known(query, key, value) or (_math_is_chosen() and not inside_a_jvp()):
        return OPERATOR.decompose(*args, scale=scale, enable_gqa=enable_gqa)
    return attention(*args, scale, enable_gqa, **_how)


def _is_known(*tensors: Tensor) -> bool:
    return all(
        x.dtype in DTYPES
        and x.layout == torch.strided
        and not x.is_nested
        and x.device.type.upper() in DEVICES
        for x in tensors
    )


def _math_is_chosen() -> bool:
    """Whether `sdpa_kernel(SDPBackend.MATH)` lies around: no fused kernel may serve."""
    flags = torch.backends.cuda
    fused = flags.flash_sdp_enabled() or flags.mem_efficient_sdp_enabled()
    return not (fused or flags.cudnn_sdp_enabled())


def _found_registry() -> dict[str, Callable] | None:
    try:
        from torch.nn import attention as place

        return {name: getattr(place, f"{name}_flash_attention_impl") for name in REGISTRY}
    except AttributeError:  # PyTorch has none before 2.11
        return None


_registry = _found_registry()
if _registry is not None:
    _registry["register"](NAME, register_fn=Override)
