"""Probability paths between data x and noise e ~ N(0, I).

    linear     z_t = (1 - t) x + t e          v = e - x                        t in [0, 1]
    TrigFlow   x_t = cos t x + sin t σ e      dx/dt = cos t σ e - sin t x      t in [0, π/2]

σ is the standard deviation of the data (TrigFlow, arXiv 2410.11081). The two are one path up to
scale: x_t / (cos t + σ sin t) = z_s at s = σ sin t / (cos t + σ sin t).
"""

from collections.abc import Callable

import torch


def expand(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1), so that t broadcasts over ``like``."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def linear_path(
    x: torch.Tensor, e: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_t and its velocity v. x, e: (B, ...); t: (B,)."""
    t = expand(t, x)
    return (1 - t) * x + t * e, e - x


def trig_path(
    x: torch.Tensor, e: torch.Tensor, t: torch.Tensor, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and its velocity dx/dt. x, e: (B, ...); t: (B,)."""
    cos, sin = expand(t.cos(), x), expand(t.sin(), x)
    return cos * x + sin * sigma * e, cos * sigma * e - sin * x


def trig_velocity(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x_t: torch.Tensor,
    t: torch.Tensor,
    sigma: float,
) -> torch.Tensor:
    """dx/dt at (x_t, t) on the TrigFlow path from v = velocity(z, s) on the linear one.

    z_s and v determine the expected data x = z - s v and noise e = z + (1 - s) v.
    """
    scale = t.cos() + sigma * t.sin()
    s = sigma * t.sin() / scale
    z = x_t / expand(scale, x_t)
    v = velocity(z, s)
    s = expand(s, v)
    return trig_path(z - s * v, z + (1 - s) * v, t, sigma)[1]
