"""FlashAttention with forward-mode AD: value, tangent and gradients behind SDPA's own signature."""

from .api import attention, attention_jvp

__all__ = ["attention", "attention_jvp"]
