"""The ordinary forward and backward by cuDNN, where it serves the case and is faster.

Its backward takes this library's own O and LSE. It knows no second derivative and no tangent:
whoever differentiates further comes back to the kernels here.
"""

import torch
from torch import Tensor

from ..options import Options
from .launch import has_warpgroups

# From this many pairs of query and key on: a new shape costs cuDNN 0.05 to 1 s of planning, which a
# few hundred larger calls win back. What runs below an operator is compiled: it returns to the same
# shapes at every step, and smaller calls win it back too.
PAIRS, PAIRS_COMPILED = 2**28, 2**24


def serves(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: Options, *more: Tensor
) -> bool:
    """Whether cuDNN takes the call; `more` are the other tensors that it would read. It follows
    PyTorch's own switch, `torch.backends.cuda.enable_cudnn_sdp`."""
    B, H, L, D = q.shape
    Hk, S, DV = v.shape[1:]
    return (
        B * H * L * S >= (PAIRS_COMPILED if options.rows_first else PAIRS)
        and has_warpgroups(q)
        and q.element_size() == 2
        and bias is None
        and options.dropout_p == 0.0
        and Hk == H
        and D == DV <= 128
        and D % 8 == 0
        and (L == S or not options.causal)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
        and all(map(_is_readable, (q, k, v, *more)))
    )


def _is_readable(x: Tensor) -> bool:
    """Rows of D without gaps, each at an address that is a multiple of 16 bytes, as cuDNN asks; the
    views of one projection have them."""
    return (
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(step > 0 and step % 8 == 0 for step in x.stride()[:3])
    )


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(O, LSE)."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, options.causal, False, scale=options.scale
    )
    return out, lse.squeeze(-1)


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV)."""
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the dropout's seed and offset
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None,
        q.shape[2], k.shape[2], 0.0, options.causal, scale=options.scale,
    )  # fmt: skip
