"""Probability paths between data x (t = 0) and noise e (t = 1)."""

import torch


def expand(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1), so that t broadcasts over ``like``."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def linear_path(
    x: torch.Tensor, e: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_t = (1 - t) x + t e and its velocity v = e - x. x, e: (B, ...); t: (B,)."""
    t = expand(t, x)
    return (1 - t) * x + t * e, e - x
