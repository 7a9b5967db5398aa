"""FlashAttention with forward-mode AD: value, tangent and gradients behind SDPA's own signature."""

__version__ = "0.1.0"
__distribution__ = "flash-jvp"
__all__ = ["attention", "attention_jvp", "sdpa_override"]

from . import shadowed
from .api import attention, attention_jvp
from .override import sdpa_override

shadowed.warn_of_the_other()
