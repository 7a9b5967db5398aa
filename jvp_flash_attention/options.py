"""The static part of a call, as every implementation receives it."""

from typing import NamedTuple

import torch


class Options(NamedTuple):
    """Not differentiable, hashable, known before a kernel is chosen."""

    scale: float  # softmax scale s
    causal: bool = False  # query i sees keys j <= i (top-left aligned when L != S)
    dropout_p: float = 0.0  # probability with which an attention weight is dropped
    backend: str = "reference"  # "reference" or "triton"


def tf32_allowed() -> bool:
    """Whether float32 products may lose digits: PyTorch's switch, by its old or its new name, one
    of which raises where the other was used."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
