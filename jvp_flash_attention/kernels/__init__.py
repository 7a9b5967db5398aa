"""The Triton implementation: `forward` and `backward` as in `reference`, `launches`, which says
what they would launch, and `room_for_sums`, which `backward` can fill too."""

from .dispatch import backward, forward, launches, room_for_sums

__all__ = ["backward", "forward", "launches", "room_for_sums"]
