"""Counter-based randomness: every draw is a function of (seed, step, rank, purpose) and of nothing
else.

Two runs with the same seed see the same times, noise and dropped labels whatever attention they
use, and a resumed run continues as if it had never stopped, because no generator has a state that
must be saved.
"""

import hashlib
from collections.abc import Callable

import torch

# What an objective receives: the purpose of a draw -> the generator of this step for that purpose.
Draws = Callable[[str], torch.Generator]


def key(seed: int, step: int, rank: int, purpose: str) -> int:
    """A 63-bit integer that depends on all four arguments."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(
    seed: int, step: int, rank: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one purpose (``"noise"``, ``"times"``, ...) at one step on one rank."""
    return torch.Generator(device).manual_seed(key(seed, step, rank, purpose))
