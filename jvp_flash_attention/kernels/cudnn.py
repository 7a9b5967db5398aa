"""The ordinary forward and backward by cuDNN, where it supports the case and is faster.

Its backward takes this library's own O and LSE. It knows no second derivative and no tangent:
whoever differentiates further comes back to the kernels here.
"""

import torch
from torch import Tensor

from ..call import Inputs, Saved, Spec, Tangents, is_default, laid_out
from ..functorch import cudnn_attention, cudnn_attention_backward
from .problem import DETAILS, architecture, tma_can_read

# From this many pairs of query and key on: a new shape costs cuDNN 0.05 to 1 s of planning, which a
# few hundred larger calls win back. Compiled code returns to the same shapes at every step, and
# smaller calls win it back too.
PAIRS, PAIRS_COMPILED = 2**28, 2**24
# Up to so many pairs in a head `sm90/bwd.py` and `bwd_head.py` compute the gradients faster, up to
# head dim 80 up to twice as many. They support what cuDNN does but for causal masks, few keys and
# small head dims.
PAIRS_OF_A_HEAD = 2**21


def pays(x: Inputs, spec: Spec) -> bool:
    """Whether the call is so large that cuDNN may be the faster one."""
    B, H, L, _ = x.q.shape
    least = PAIRS_COMPILED if spec.compiled else PAIRS
    return B * H * L * x.k.shape[2] >= least


def pays_forward(x: Inputs, spec: Spec) -> bool:
    """The same of a forward without a tangent, but for what `sm90/forward_plain.py` does, without
    planning. That is the slower one (4 %) at some 1,024 tokens of 64 columns alone."""
    few = x.q.shape[3] <= 32 or x.k.shape[2] <= 64
    return pays(x, spec) and (spec.causal or few)


def pays_backward(x: Inputs, spec: Spec) -> bool:
    """The same of the gradients of O."""
    _, _, L, D = x.q.shape
    S = x.k.shape[2]
    many = (2 if D <= 80 else 1) * PAIRS_OF_A_HEAD < L * S
    return pays(x, spec) and (many or spec.causal or S <= 64 or D <= 32)


def supports(x: Inputs, spec: Spec, *more: Tensor) -> bool:
    """Whether cuDNN takes the call; `more` are the other tensors that it would read. It follows
    PyTorch's own switch, `torch.backends.cuda.enable_cudnn_sdp`."""
    _, H, L, D = x.q.shape
    Hk, S, DV = x.v.shape[1:]
    return (
        pays(x, spec)
        and architecture(x.q.device) == "sm90"
        and x.q.element_size() == 2
        and x.mask is None
        and x.cu_q is None
        and is_default(spec, but=(*DETAILS, "causal"))
        and Hk == H
        and D == DV <= 128
        and D % 8 == 0
        and (L == S or not spec.causal)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
        and None not in (cudnn_attention, cudnn_attention_backward)
        and all(map(_is_readable, (*x[:3], *more)))
    )


def _is_readable(x: Tensor) -> bool:
    """Rows of D without gaps that TMA can read; the views of one projection have them."""
    return x.stride(3) == 1 and tma_can_read(x)


def forward(x: Inputs, spec: Spec) -> Saved:
    """O and LSE."""
    out, lse, *_ = cudnn_attention(*x[:3], None, True, 0.0, spec.causal, False, scale=spec.scale)
    return Saved(laid_out(out, x.q, spec), lse.squeeze(-1))


def backward(d_out: Tensor, x: Inputs, saved: Saved, spec: Spec) -> Tangents:
    """(dQ, dK, dV)."""
    q, k, v, *_ = x
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # the dropout's seed and offset
    grads = cudnn_attention_backward(
        d_out, q, k, v, saved.out, saved.lse.unsqueeze(-1), unused, unused, None, None, None,
        q.shape[2], k.shape[2], 0.0, spec.causal, scale=spec.scale,
    )  # fmt: skip
    return Tangents(*map(laid_out, grads, (q, k, v), (spec,) * 3))
