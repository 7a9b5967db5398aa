"""Distributions of training times, alone and in ordered pairs t >= r."""

import math
from dataclasses import dataclass

import torch

from training.validation import between, one_of


@dataclass(frozen=True)
class Times:
    """On [0, 1]: ``uniform``, or ``logit_normal``, the sigmoid of a normal variable with this mean
    and std.
    """

    sampler: str = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        one_of("objective.time_sampler", self.sampler, ("uniform", "logit_normal"))
        between("objective.time_mean", self.mean, -math.inf)
        between("objective.time_std", self.std, 0, open_low=True)

    def draw(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        if self.sampler == "uniform":
            return torch.rand(shape, generator=generator, device=generator.device)
        normal = torch.randn(shape, generator=generator, device=generator.device)
        return torch.sigmoid(self.mean + self.std * normal)

    def draw_below(self, limit: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Times from the same distribution, given that each is below its limit. (n,) -> (n,)"""
        share = torch.rand(limit.shape, generator=generator, device=generator.device)
        if self.sampler == "uniform":
            return share * limit
        # Inverse of the distribution function, in float64: its tail needs it.
        below = torch.special.ndtr((torch.logit(limit.double()) - self.mean) / self.std)
        normal = torch.special.ndtri((share * below).clamp_min(1e-300))
        return torch.sigmoid(self.mean + self.std * normal).to(limit.dtype)

    def draw_pairs(
        self, n: int, equal: int, generator: torch.Generator, other: "Times | None" = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """t >= r, each (n,), from two independent draws, the second from ``other`` if there is one;
        r := t for the first ``equal`` of them.
        """
        if other is None:
            pair = self.draw(2, n, generator=generator)
        else:
            pair = torch.stack([times.draw(n, generator=generator) for times in (self, other)])
        t, r = pair.amax(0), pair.amin(0)
        r[:equal] = t[:equal]
        return t, r

    def draw_gaps(
        self, n: int, gap: "Times", generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """t > r, each (n,): their distance from ``gap``, r from this distribution below 1 - gap
        (arXiv 2511.19797, sampling of times).
        """
        distance = gap.draw(n, generator=generator)
        r = self.draw_below(1 - distance, generator)
        return (r + distance).clamp_max(1), r


def draw_angles(
    n: int, mean: float, std: float, sigma: float, generator: torch.Generator
) -> torch.Tensor:
    """t = arctan(e^τ / σ) in (0, π/2), τ normal (sCM, arXiv 2410.11081). (n,)"""
    normal = torch.randn(n, generator=generator, device=generator.device)
    return torch.atan(torch.exp(mean + std * normal) / sigma)
