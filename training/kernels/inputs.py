"""What the kernels of this folder take."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def takes(x: torch.Tensor) -> bool:
    """Tensors on a GPU, no wrappers of ``torch.func``: an operator would not see their tangent."""
    return (
        (x.is_cuda or INTERPRETED)
        and x.dtype != torch.float64
        and (torch.compiler.is_compiling() or torch.func.debug_unwrap(x) is x)
    )
