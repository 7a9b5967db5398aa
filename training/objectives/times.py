"""Distributions of training times on [0, 1], alone and in ordered pairs t >= r."""

import math
from dataclasses import dataclass

import torch

from training.validation import between, one_of


@dataclass(frozen=True)
class Times:
    """``uniform``, or ``logit_normal``: the sigmoid of a normal variable with this mean and std."""

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

    def draw_pairs(
        self, n: int, equal: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """t >= r, each (n,), from two independent draws; r := t for the first ``equal`` of them."""
        pair = self.draw(2, n, generator=generator)
        t, r = pair.amax(0), pair.amin(0)
        r[:equal] = t[:equal]
        return t, r
