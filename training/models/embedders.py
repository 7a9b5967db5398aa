"""Embeddings of times, labels, guidance, patches and positions."""

import math

import torch
from einops import rearrange
from torch import nn

from training.models.jvp_layers import Dual, Linear, Tensor, add, last, linear_map, primal, silu

FREQUENCIES = 256  # dimension of the sinusoidal embedding, as in DiT


def frequencies(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """128 of them, from 1 down to 1e-4."""
    half = FREQUENCIES // 2
    return torch.exp(-math.log(10_000) / half * torch.arange(half, device=device, dtype=dtype))


def sinusoids(t: Tensor) -> Tensor:
    """Cosines and sines of t at 128 frequencies. (B,) -> (B, 256)"""
    time = primal(t)
    frequency = frequencies(time.device, torch.promote_types(time.dtype, torch.float32))
    phase = time[:, None] * frequency  # (B, 128)
    cos, sin = phase.cos(), phase.sin()
    waves = torch.cat([cos, sin], dim=-1)
    if not isinstance(t, Dual):
        return waves
    with t.rule():
        t_phase = t.tangent[:, None] * frequency
        parts = [-last(sin, t_phase) * t_phase, last(cos, t_phase) * t_phase]
        return t.follow(waves, torch.cat(parts, dim=-1))


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of a time (unscaled: in [0, 1], or [0, π/2] on the TrigFlow path), then
    a two-layer perceptron.

    The sinusoids are float32 whatever the precision of the network: in bfloat16 the time derivative
    of the embedding would be off by tens of percent.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward = Linear(FREQUENCIES, width)
        self.outward = Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.inward.weight.dtype
        hidden = self.inward(linear_map(lambda x: x.to(dtype), sinusoids(t)))
        return self.outward(silu(hidden))  # (B, W)


class LabelEmbedder(nn.Module):
    """A table of ``num_classes + 1`` rows; the last one is the null class (no condition)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.table(y)  # (B,) -> (B, W)


class LabelContext(nn.Module):
    """The label as ``tokens`` learned tokens to attend to, as one would attend to a text."""

    def __init__(self, num_classes: int, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, tokens * width)
        self.tokens = tokens

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.table(y).unflatten(-1, (self.tokens, -1))  # (B,) -> (B, M, W)


class GuidanceEmbedder(nn.Module):
    """Guidance as a condition (arXiv 2512.02012): its scale w, as 1 - 1/w, and its interval."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = TimeEmbedder(width)
        self.start = TimeEmbedder(width)
        self.end = TimeEmbedder(width)

    def forward(self, guidance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, 3) of w, t_min, t_max -> three embeddings (B, W)."""
        w, start, end = guidance.unbind(-1)
        return self.scale(1 - 1 / w), self.start(start), self.end(end)


class InverseGuidance(nn.Module):
    """The guidance scale w as 1/w, in (0, 1] (TVM, arXiv 2511.19797); what the network then gives
    is multiplied by w.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inverse = TimeEmbedder(width)

    def forward(self, guidance: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, 3) of w, t_min, t_max, of which w counts -> one embedding (B, W)."""
        return (self.inverse(1 / guidance[:, 0]),)


class PrefixTokens(nn.Module):
    """A condition as ``n`` tokens: n learned vectors, each plus the embedding."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(n, width) / math.sqrt(width))

    def forward(self, embedding: Tensor) -> Tensor:
        return add(linear_map(lambda x: x[:, None], embedding), self.vectors)  # (B, W) -> (B, n, W)


class LogVariance(nn.Module):
    """The learned logarithm of the error's variance, 0 at initialisation: at a time (sCM, arXiv
    2410.11081), or at two (DMF, arXiv 2510.24474), each then with half of the frequencies.
    """

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        if times not in (1, 2):
            raise ValueError(f"model.log_variance_times must be 1 or 2; got {times!r}")
        self.linear, self.times = Linear(FREQUENCIES, 1), times

    def forward(self, t: torch.Tensor, r: torch.Tensor | None = None) -> torch.Tensor:
        """(B,), of two times r too; not given it is t -> (B,)"""
        waves = primal(sinusoids(t))
        if self.times == 2:
            other = waves if r is None else primal(sinusoids(r))
            waves = torch.cat([waves[:, ::2], other[:, ::2]], dim=1)
        elif r is not None:
            raise ValueError(
                "the objective learns a log-variance of two times; set model.log_variance_times=2"
            )
        return self.linear(waves.to(self.linear.weight.dtype))[:, 0]


class LearnsVariance(nn.Module):
    """A network that has a ``LogVariance`` as its ``variance``, or None."""

    variance: LogVariance | None

    def log_variance(self, t: torch.Tensor, r: torch.Tensor | None = None) -> torch.Tensor:
        """(B,) -> (B,)"""
        if self.variance is None:
            raise ValueError("the objective learns a log-variance; set model.log_variance=true")
        return self.variance(t, r)


class PatchEmbedder(nn.Module):
    """Patches of p x p pixels, each projected linearly to a token."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = Linear(channels * patch * patch, width)

    def forward(self, x: Tensor) -> Tensor:
        pattern, p = "b c (h p) (w q) -> b (h w) (c p q)", self.patch
        return self.projection(linear_map(lambda x: rearrange(x, pattern, p=p, q=p), x))


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


def rotary_angles(side: int, head_dim: int) -> torch.Tensor:
    """Angles of rotary positions on a side x side grid, half of them for each axis.
    (side*side, head_dim / 2)
    """
    if head_dim % 4:
        raise ValueError(
            f"model.width / model.heads must be a multiple of 4 for model.positions=rope; got"
            f" {head_dim}"
        )
    frequency = 10_000 ** (-torch.arange(head_dim // 4) / (head_dim // 4))
    phase = torch.arange(side)[:, None] * frequency  # (side, D/4)
    rows = phase[:, None].expand(side, side, -1)
    columns = phase[None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, -1)


def sequence_angles(n: int, head_dim: int) -> torch.Tensor:
    """Angles of rotary positions 0 ... n - 1. (n, head_dim / 2)"""
    if head_dim % 2:
        raise ValueError(
            f"model.width / model.heads must be even for model.positions=rope_1d; got {head_dim}"
        )
    frequency = 10_000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return torch.arange(n)[:, None] * frequency
