"""Layers of the diffusion transformer; the attention function is an argument."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import nn

Attention = Callable[..., torch.Tensor]  # (query, key, value), each (B, H, N, D) -> (B, H, N, D)


def norm(x: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights, of primitives: F.layer_norm can fail under compile(func.jvp)."""
    x = x - x.mean(dim=-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]  # (B, N, W) with (B, W)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.projection(rearrange(self.attention(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.activation = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.contract(self.dropout(self.activation(self.expand(x))))


class Block(nn.Module):
    """adaLN-zero block (DiT, arXiv 2212.09748): the condition shifts, scales and gates both
    branches.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, dropout: float, attention: Attention
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, attention)
        self.mlp = Mlp(width, int(mlp_ratio * width), dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, -1)
        x = x + gate_a[:, None] * self.attention(modulate(norm(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(norm(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens to pixels; its zero weights make the network exactly 0 at initialisation."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.patch = patch
        self.modulation = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, channels * patch * patch)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, rows: int) -> torch.Tensor:
        shift, scale = self.modulation(condition).chunk(2, -1)
        x = self.projection(modulate(norm(x), shift, scale))
        p = self.patch
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)
