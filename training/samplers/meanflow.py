"""Sampling with an average velocity: z_r = z_t - (t - r) u(z_t, t, r) (arXiv 2505.13447)."""

from itertools import pairwise

import torch

from training.objectives.objective import Net
from training.validation import positive_integer


class MeanFlowSampler:
    """``nfe`` jumps over equal intervals from t = 1 to 0; one jump suffices."""

    def __init__(self, nfe: int = 1) -> None:
        positive_integer("sampler.nfe", nfe)
        self.nfe = nfe

    def __call__(self, net: Net, noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """noise: (B, C, H, W), y: (B,) -> images (B, C, H, W)."""
        times = torch.linspace(1, 0, self.nfe + 1, device=noise.device)
        z = noise
        for t, r in pairwise(times):
            z = z - (t - r) * net(z, t.expand(len(z)), r.expand(len(z)), y)
        return z
