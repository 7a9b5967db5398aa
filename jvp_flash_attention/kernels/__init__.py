"""The Triton implementation: `forward` and `backward` as in `reference`, and `launches`, which says
what they would launch."""

from .dispatch import backward, forward, launches

__all__ = ["backward", "forward", "launches"]
