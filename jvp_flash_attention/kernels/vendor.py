"""The ordinary forward and backward by cuDNN, where it serves the case and is faster.

Its backward takes this library's own O and LSE. It knows no second derivative and no tangent:
whoever differentiates further comes back to the kernels here.
"""

import torch
from torch import Tensor

from .launch import Problem

# from this many pairs of query and key on: a new shape costs cuDNN 0.05 to 1 s of planning, which a
# few hundred larger calls win back
PAIRS = 2**28


def serves(p: Problem, *operands: Tensor) -> bool:
    """Whether cuDNN takes the call. It follows PyTorch's own switch,
    `torch.backends.cuda.enable_cudnn_sdp`."""
    return (
        p.warpgroups
        and p.tma
        and not p.bias
        and p.options.dropout_p == 0.0
        and p.Hk == p.H
        and p.D == p.DV <= 128
        and (p.L == p.S or not p.options.causal)
        and p.B * p.H * p.L * p.S >= PAIRS
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
        and all(x.is_contiguous() for x in operands)
    )


def forward(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(O, LSE)."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, p.options.causal, False, scale=p.options.scale
    )
    return out, lse.squeeze(-1)


def backward(
    p: Problem, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV)."""
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the dropout's seed and offset
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None, p.L, p.S, 0.0,
        p.options.causal, scale=p.options.scale,
    )  # fmt: skip
