"""The static part of a call, as every implementation receives it."""

from typing import NamedTuple


class Options(NamedTuple):
    """Not differentiable, hashable, known before a kernel is chosen."""

    scale: float  # softmax scale s
    causal: bool = False  # query i sees keys j <= i (top-left aligned when L != S)
    dropout_p: float = 0.0  # probability with which an attention weight is dropped
    backend: str = "reference"  # "reference" or "triton"
