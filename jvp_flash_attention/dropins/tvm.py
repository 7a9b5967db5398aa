"""Terminal velocity matching's attention (github.com/lumalabs/tvm).

    from jvp_flash_attention.dropins.tvm import sdpa_jvp                # jvp_utils.functional

The loss of TVM differentiates through the tangent, and so may every caller here.
"""

from torch import Tensor

from ..api import attention


def sdpa_jvp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with a tangent under `torch.func.jvp`, differentiable in all inputs and tangents.

    Unlike the original it is right without a jvp too, in every dtype, and compiles.

    Args:
        q: (B, H, L, D).
        k, v: (B, H, S, D).

    Returns:
        (B, H, L, D).

    Raises:
        TypeError, ValueError: those of `jvp_flash_attention.attention`.
    """
    return attention(q, k, v)
