"""Counter-based randomness: every draw is a function of (seed, step, rank, purpose) and of nothing
else.

Two runs with the same seed see the same times, noise and dropped labels whatever attention they
use, and a resumed run continues as if it had never stopped, because no generator has a state that
must be saved.
"""

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction

import torch


def key(seed: int, step: int, rank: int, purpose: str) -> int:
    """A 63-bit integer that depends on all four arguments."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(
    seed: int, step: int, rank: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one purpose (``"noise"``, ``"times"``, ...) at one step on one rank."""
    return torch.Generator(device).manual_seed(key(seed, step, rank, purpose))


@dataclass(frozen=True)
class Draws:
    """What an objective receives for one batch: purpose of a draw -> its generator, and how many
    of the batch's samples are of a kind that a share of all samples is.

    Args:
        number: of the batch since the start of the run; gradient accumulation counts each one.
        rank, world_size: of the process, which sees a batch of its own.
        alike: in one step all processes have the same counts. Processes that gather shards of
            weights from each other must call the network equally often.
    """

    seed: int
    number: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    alike: bool = False

    def __call__(self, purpose: str) -> torch.Generator:
        return generator(self.seed, self.number, self.rank, purpose, self.device)

    def count(self, share: float, n: int) -> int:
        """How many of this batch's n samples belong to a share of all samples.

        All batches of all processes are counted through, number by number and rank by rank: the
        k-th has ⌊(k + 1) share n⌋ - ⌊k share n⌋ of them. Any run of batches thus has the share to
        within one sample, over ranks and accumulation too, and at every batch size: 0.75 of
        batches of 1 is three batches of four. A batch has one of two neighbouring counts, and
        always the same one where share n is whole, so that a compiled step has one or two forms.
        With ``alike`` the batches of one process are counted through, and all have its count.
        """
        mean = Fraction(share).limit_denominator(1_000_000) * n
        k = self.number if self.alike else self.number * self.world_size + self.rank
        return math.floor((k + 1) * mean) - math.floor(k * mean)
