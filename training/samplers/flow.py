"""Solvers of the probability-flow ODE dz/dt = v(z, t | y) from t = 1 to 0, with classifier-free
guidance.
"""

from itertools import pairwise

import torch

from training.objectives.objective import Net
from training.validation import between, one_of, positive_integer


class FlowSampler:
    """Euler (one evaluation a step) or Heun (two, second order) on equal steps.

    ``nfe`` counts evaluations of the guided velocity. ``guidance`` is w in v_∅ + w (v_y - v_∅); w
    != 1 costs two passes of the network an evaluation and needs a network trained with label
    dropout.
    """

    def __init__(self, method: str = "euler", nfe: int = 50, guidance: float = 1.0) -> None:
        one_of("sampler.method", method, ("euler", "heun"))
        positive_integer("sampler.nfe", nfe)
        between("sampler.guidance", guidance, 0)
        if method == "heun" and nfe % 2:
            raise ValueError(f"sampler.nfe must be even for method heun (two a step); got {nfe}")
        self.method, self.nfe, self.guidance = method, nfe, guidance

    def __call__(self, net: Net, noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """noise: (B, C, H, W), y: (B,) -> images (B, C, H, W)."""
        steps = self.nfe if self.method == "euler" else self.nfe // 2
        times = torch.linspace(1, 0, steps + 1, device=noise.device)
        z = noise
        for t, r in pairwise(times):
            v = self._velocity(net, z, t, y)
            if self.method == "heun":
                v = (v + self._velocity(net, z - (t - r) * v, r, y)) / 2
            z = z - (t - r) * v
        return z

    def _velocity(
        self, net: Net, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        t = t.expand(len(z))
        v = net(z, t, t, y)
        if self.guidance == 1:
            return v
        null = torch.full_like(y, net.null_label)  # type: ignore[attr-defined]
        v_null = net(z, t, t, null)
        return v_null + self.guidance * (v - v_null)
