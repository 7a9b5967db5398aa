"""The static part of a call, as every implementation receives it; what else a kernel depends on."""

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """Not differentiable, hashable, known before a kernel is chosen."""

    scale: float  # softmax scale s
    causal: bool = False  # query i sees keys j <= i (top-left aligned when L != S)
    dropout_p: float = 0.0  # probability with which an attention weight is dropped
    backend: str = "reference"  # a name that `backends.implementation` knows
    rows_first: bool = False  # results lie in memory as (B, L, H, D), whatever the inputs do
    sharded: bool = False  # keys are a part of each row's; O, tO, LSE and μ handed in are of all


def tf32_allowed() -> bool:
    """Whether float32 products may lose digits: PyTorch's switch, by its old or its new name, one
    of which raises where the other was used."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def row_strides(x: Tensor, width: int, options: Options) -> tuple[int, int, int, int]:
    """Strides of a result (B, H, L, width) beside x: dense, and in memory (B, L, H, width) where x
    is a view of such a tensor or `rows_first` asks for it."""
    _, H, L, _ = x.shape
    if options.rows_first or (H > 1 and L > 1 and 0 < x.stride(1) < x.stride(2)):
        return L * H * width, width, H * width, 1
    return H * L * width, L * width, width, 1


def empty_rows(x: Tensor, width: int, options: Options, dtype: torch.dtype | None = None) -> Tensor:
    """New (B, H, L, width) with `row_strides`. Every implementation, and the operators' fakes,
    allocate O, tO and the gradients of q, k and v by it."""
    strides = row_strides(x, width, options)
    return x.new_empty_strided((*x.shape[:3], width), strides, dtype=dtype or x.dtype)


def layout(x: Tensor | None) -> tuple | None:
    """What launches depend on, of a tensor: `recall` and `kernels.plans` keep them by it. Its
    device too: a kept launch takes an address without asking whose it is."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.get_device()
