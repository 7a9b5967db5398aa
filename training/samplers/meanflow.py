"""Sampling with an average velocity: z_r = z_t - (t - r) u(z_t, t, r) (arXiv 2505.13447)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from training.validation import between, positive_integer, switch


class MeanFlowSampler:
    """``nfe`` jumps from t = 1 to 0; one jump suffices.

    Args:
        nfe: evaluations of the network.
        times: the nfe - 1 times between 1 and 0, falling; null is equal intervals.
        guidance: told to a network that has it as a condition (iMF); null tells nothing.
        guidance_start, guidance_end: the interval that goes with it.
        extrapolate: guidance may be stronger than any that the network was told in training, as
            iMF's published samples have it (10.5, trained up to 8);
            ``config_checks.check_guidance`` refuses it otherwise.
    """

    def __init__(
        self,
        nfe: int = 1,
        times: Sequence[float] | None = None,
        guidance: float | None = None,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        extrapolate: bool = False,
    ) -> None:
        positive_integer("sampler.nfe", nfe)
        switch("sampler.extrapolate", extrapolate)
        if times is not None:
            whole = [1.0, *times, 0.0]
            if len(times) != nfe - 1 or any(t <= r for t, r in pairwise(whole)):
                raise ValueError(
                    f"sampler.times must be sampler.nfe - 1 = {nfe - 1} falling numbers between 1"
                    f" and 0; got {list(times)}"
                )
        if guidance is not None:
            between("sampler.guidance", guidance, 1)
        between("sampler.guidance_start", guidance_start, 0, 1)
        between("sampler.guidance_end", guidance_end, guidance_start, 1)
        self.nfe, self.times = nfe, times
        self.guidance = None if guidance is None else (guidance, guidance_start, guidance_end)

    def __call__(self, net: Any, noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """noise: (B, C, H, W), y: (B,) -> images (B, C, H, W)."""
        times = torch.linspace(1, 0, self.nfe + 1, device=noise.device)
        if self.times is not None:
            times[1:-1] = torch.tensor(self.times)
        told = ()
        if self.guidance is not None:
            told = (noise.new_tensor(self.guidance).expand(len(noise), 3),)
        z = noise
        for t, r in pairwise(times):
            z = z - (t - r) * net(z, t.expand(len(z)), r.expand(len(z)), y, *told)
        return z


class ShortcutSampler(MeanFlowSampler):
    """Equal jumps, a power of two of them: a shortcut model knows no others (arXiv 2410.12557)."""

    def __init__(self, nfe: int = 1) -> None:
        super().__init__(nfe)
        if nfe & (nfe - 1):
            raise ValueError(f"sampler.nfe must be a power of two for a shortcut model; got {nfe}")
