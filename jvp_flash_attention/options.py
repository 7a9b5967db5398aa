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
    sharded: bool = False  # keys are a part of each row's; O, tO, LSE and μ handed in are of all


def tf32_allowed() -> bool:
    """Whether float32 products may lose digits: PyTorch's switch, by its old or its new name, one
    of which raises where the other was used."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def layout(x: Tensor | None) -> tuple | None:
    """What launches depend on, of a tensor: `recall` and `kernels.plans` keep them by it. Its
    device too: a kept launch takes an address without asking whose it is."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.get_device()
