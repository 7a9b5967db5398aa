"""rCM's attention with tangents (github.com/NVlabs/rcm): value and tangent are separate tensors.

    from jvp_flash_attention.dropins.rcm import _attention  # rcm.utils.flash_attention_jvp_triton
    from jvp_flash_attention.dropins.rcm import torch_attention_op_withT    # rcm.utils.jvp_helper

The tangent is a target in rCM: its Function has no gradient for it. It comes back detached.
"""

from torch import Tensor

from ..api import attention_jvp

Pair = tuple[Tensor, Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    sm_scale: float | None = None,
) -> Pair:
    """Value and tangent of attention.

    Args:
        q, tq: (B, H, L, D).
        k, tk: (B, H, S, D).
        v, tv: (B, H, S, Dv). Any head dim and any strides; a tangent None is zero.
        sm_scale: by default 1/sqrt(D).

    Returns:
        (o, to), both (B, H, L, Dv); `to` is detached, o has gradients in q, k and v.

    Raises:
        TypeError, ValueError: those of `jvp_flash_attention.attention_jvp`.
    """
    return attention_jvp(q, k, v, tq, tk, tv, scale=sm_scale, tangent_grad=False)


class _attention:
    """The name of rCM's Function, for its `apply`."""

    apply = staticmethod(attention)


def torch_attention_op_withT(q_withT: Pair, k_withT: Pair, v_withT: Pair) -> Pair:
    """`attention` of the pairs (value, tangent), each (B, L, H, D); the result is such a pair."""
    (q, t_q), (k, t_k), (v, t_v) = (
        (x.transpose(1, 2), t_x.transpose(1, 2)) for x, t_x in (q_withT, k_withT, v_withT)
    )
    out, t_out = attention(q, k, v, t_q, t_k, t_v)
    return out.transpose(1, 2), t_out.transpose(1, 2)
