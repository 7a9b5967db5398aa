"""Decoupled MeanFlow's attention (github.com/kyungmnlee/dmf).

    from jvp_flash_attention.dropins.dmf import flash_attn_func     # models.flash_attention_2_jvp
    from jvp_flash_attention.dropins.dmf import flash_attn_func     # models.flash_attention_3_jvp

The tangent is a target in DMF: its Function has no gradient for it. It comes back detached.
"""

from torch import Tensor

from ..api import attention


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> Tensor:
    """Attention with a tangent under `torch.func.jvp`. Any length; no CUDA package is needed.

    Args:
        q: (B, L, H, D).
        k, v: (B, S, H, D).
        softmax_scale: by default 1/sqrt(D).

    Returns:
        (B, L, H, D), a dual tensor where an input is one.

    Raises:
        TypeError, ValueError: those of `jvp_flash_attention.attention`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, scale=softmax_scale, tangent_grad=False).transpose(1, 2)
