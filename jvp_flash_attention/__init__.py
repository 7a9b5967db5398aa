"""FlashAttention with forward-mode AD: value, tangent and gradients behind SDPA's own signature."""

from .api import attention, attention_jvp
from .override import sdpa_override

__version__ = "0.1.0"
__all__ = ["attention", "attention_jvp", "sdpa_override"]
