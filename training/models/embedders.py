"""Embeddings of times, labels and patches."""

import math

import torch
from einops import rearrange
from torch import nn

FREQUENCIES = 256  # dimension of the sinusoidal embedding, as in DiT


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of a time in [0, 1] (unscaled), then a two-layer perceptron.

    The sinusoids are float32 whatever the precision of the network: in bfloat16 the time derivative
    of the embedding would be off by tens of percent.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward = nn.Linear(FREQUENCIES, width)
        self.outward = nn.Linear(width, width)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = FREQUENCIES // 2
        index = torch.arange(
            half, device=t.device, dtype=torch.promote_types(t.dtype, torch.float32)
        )
        phase = t[:, None] * torch.exp(-math.log(10_000) / half * index)  # (B, 128)
        waves = torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)  # (B, 256)
        hidden = self.inward(waves.to(self.inward.weight.dtype))
        return self.outward(nn.functional.silu(hidden))  # (B, W)


class LabelEmbedder(nn.Module):
    """A table of ``num_classes + 1`` rows; the last one is the null class (no condition)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.table(y)  # (B,) -> (B, W)


class PatchEmbedder(nn.Module):
    """Patches of p x p pixels, each projected linearly to a token."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Linear(channels * patch * patch, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.patch
        return self.projection(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))


def sin_cos_positions(side: int, width: int) -> torch.Tensor:
    """Fixed positions on a side x side grid, half of the width for each axis. (1, side*side, W)"""
    if width % 4:
        raise ValueError(f"model.width must be a multiple of 4 for 2-D positions; got {width}")
    frequency = 10_000 ** (-torch.arange(width // 4) / (width // 4))
    phase = torch.arange(side)[:, None] * frequency  # (side, W/4)
    axis = torch.cat([phase.sin(), phase.cos()], dim=-1)  # (side, W/2)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width)
