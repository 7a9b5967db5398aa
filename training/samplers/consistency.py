"""Sampling with a consistency function on the TrigFlow path (sCM, arXiv 2410.11081)."""

import math

import torch

from training.objectives.objective import Net
from training.objectives.paths import expand, trig_path
from training.validation import between, positive_integer


class ConsistencySampler:
    """x̂ = f(x_t, t) = cos t x_t - sin t σ F(x_t / σ, t), from noise at ``start``; each further
    evaluation adds new noise to x̂ and denoises it again.

    Args:
        sigma_data: σ, as trained.
        nfe: evaluations of the network.
        start: time of the first evaluation, just under π/2: arctan(80 / 0.5).
        again: time of the second; more than two go from there down to 0 in equal steps.
    """

    def __init__(
        self,
        sigma_data: float,
        nfe: int = 2,
        start: float = math.atan(160),
        again: float = 1.1,
    ) -> None:
        positive_integer("sampler.nfe", nfe)
        between("sampler.sigma_data", sigma_data, 0, open_low=True)
        between("sampler.start", start, 0, math.pi / 2, open_low=True)
        between("sampler.again", again, 0, start, open_low=True)
        self.nfe, self.sigma_data = nfe, sigma_data
        self.start, self.again = start, again

    @property
    def noises(self) -> int:
        """How many draws of noise a sample needs after the first."""
        return self.nfe - 1

    def __call__(
        self, net: Net, noise: torch.Tensor, y: torch.Tensor, *more: torch.Tensor
    ) -> torch.Tensor:
        """noise, and each of ``more``: (B, C, H, W), y: (B,) -> images (B, C, H, W)."""
        times = [self.start, *(self.again * (1 - k / self.noises) for k in range(self.noises))]
        x = torch.zeros_like(noise)
        for t, e in zip(times, [noise, *more], strict=True):
            t = noise.new_full((len(noise),), t)
            x_t = self.sigma_data * e if e is noise else trig_path(x, e, t, self.sigma_data)[0]
            F = net(x_t / self.sigma_data, t, t, y)
            x = expand(t.cos(), x) * x_t - expand(t.sin(), x) * self.sigma_data * F
        return x
