"""The names of the earlier package of this name, so that its users' imports keep working.

    from jvp_flash_attention.jvp_attention import JVPAttn, attention, MASK_CONST

All of them are `jvp_flash_attention.attention`, which needs no second entry point for dual tensors.
What the tuning switches used to choose is chosen by the library now; they are accepted and do
nothing. Two results differ from the earlier package because they were wrong there: an additive mask
is added after scaling, and second-order gradients are whole. Lengths need not be multiples of 32,
nor head dims powers of two.
"""

from torch import Tensor

from . import api

MASK_CONST = (
    -1.0e2
)  # what additive masks of the earlier package hold where they mask; −inf is exact and preferable


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    sm_scale: float | None = None,
    warp_specialize: bool = True,
    USE_TMA: bool = True,
    verify_attn_mask: bool = True,
) -> Tensor:
    """`jvp_flash_attention.attention(q, k, v, attn_mask, dropout_p, causal, sm_scale)` by its
    earlier names.

    Args:
        q: (B, H, L, D), float16, bfloat16, float32 or float64.
        k: (B, H, S, D), of q's dtype and on its device, as v.
        v: (B, H, S, Dv).
        attn_mask: broadcastable to (B, H, L, S). Bool: True attends. Floating: added after scaling.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        causal: query i attends keys j <= i.
        sm_scale: softmax scale, by default 1/sqrt(D).
        warp_specialize, USE_TMA, verify_attn_mask: ignored.

    Returns:
        (B, H, L, Dv) in q's dtype, a dual tensor where an input is one.

    Raises:
        TypeError, ValueError, NotImplementedError: as `jvp_flash_attention.attention` does.
    """
    return api.attention(q, k, v, attn_mask, dropout_p, causal, sm_scale)


class JVPAttn:
    """The earlier package's entry points; both take plain and dual tensors."""

    fwd = staticmethod(attention)
    fwd_dual = staticmethod(attention)
