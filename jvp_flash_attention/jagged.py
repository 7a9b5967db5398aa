"""PyTorch's jagged nested tensors: packed sequences in, jagged out.

PyTorch gives nested tensors no forward mode and no rule for `torch.func`. So their tangent comes
from `attention_jvp`, and gradients from autograd.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentValueError
from .functorch import ragged_dim


def is_jagged(x: Any) -> bool:
    """Whether x is a nested tensor of the layout that has offsets."""
    return isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged


def attend(attention: Callable, tensors: dict[str, Any], **how: Any) -> Any:
    """`attention` or `attention_jvp` of jagged (B, H, L*, D): its results are jagged as query is.

    `tensors` are query, key, value and their tangents by name; a tangent may be None.
    """
    if how.get("cu_seqlens") is not None:
        raise ArgumentValueError(
            "cu_seqlens must be None beside nested tensors, which have their own offsets"
        )
    for name, x in tensors.items():
        if x is not None and not is_jagged(x):
            raise ArgumentValueError(
                f"{name} must be a jagged nested tensor as query is, got {type(x).__name__}"
            )
        if x is not None and (x.dim() != 4 or ragged_dim(x) != 2 or x.lengths() is not None):
            raise NotImplementedError(
                f"{name} must have shape (batch, heads, ragged length, head dim) and no holes; make"
                " it of (length, heads, head dim) and transpose(1, 2), or use"
                " jvp_flash_attention.flash_attn.flash_attn_varlen_func"
            )
    query, key = tensors["query"], tensors["key"]
    beside = {"value": key, "t_query": query, "t_key": key, "t_value": key}
    for name, primal in beside.items():
        x = tensors.get(name)
        if x is not None and x.offsets() is not primal.offsets():
            raise ArgumentValueError(
                f"{name} must have the offsets of {'query' if primal is query else 'key'}; make it"
                " by torch.nested.nested_tensor_from_jagged(values, offsets) with that tensor"
            )
    cu_q = query.offsets().int()
    cu_k = cu_q if key.offsets() is query.offsets() else key.offsets().int()
    packed = {name: None if x is None else x.values() for name, x in tensors.items()}
    results = attention(**packed, **how | {"cu_seqlens": (cu_q, cu_k)})

    def jagged(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1)  # (H, T, Dv) -> (T, H, Dv)
        return torch.nested.nested_tensor_from_jagged(rows, query.offsets()).transpose(1, 2)

    return tuple(map(jagged, results)) if isinstance(results, tuple) else jagged(results)
