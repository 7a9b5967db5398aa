"""The attention of FastGen's U-Net (github.com/NVlabs/FastGen, `fastgen.networks.EDM.network`), and
of every U-Net that comes from EDM.

    w = AttentionOp.apply(q, k)                                 # there: weights, then values
    a = torch.einsum("nqk,nck->ncq", w, v)
    a = unet_attention(q, k, v)                                 # here: both lines, O(L) memory
"""

import torch
from torch import Tensor

from ..api import attention


def unet_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of feature maps: channels come before positions, heads lie in the batch.

    Args:
        q: (B·H, D, L).
        k: (B·H, D, S).
        v: (B·H, Dv, S).

    Returns:
        (B·H, Dv, L).

    Raises:
        TypeError, ValueError: those of `jvp_flash_attention.attention`.
    """
    return attention(q.mT[:, None], k.mT[:, None], v.mT[:, None]).squeeze(1).mT


class AttentionOp:
    """The name of FastGen's Function, for code that keeps the weights: (B·H, L, S) in memory."""

    @staticmethod
    def apply(q: Tensor, k: Tensor) -> Tensor:
        """softmax(Qᵀ K / sqrt(D)), computed in float32 or wider, in q's dtype. PyTorch's own
        operations: all derivatives, and nothing is gained over them.

        Args:
            q: (B·H, D, L).
            k: (B·H, D, S).

        Returns:
            (B·H, L, S).
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = q.to(wide).mT @ k.to(wide) * q.shape[1] ** -0.5
        return scores.softmax(-1).to(q.dtype)
