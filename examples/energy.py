"""An energy model by denoising score matching: attention is differentiated twice in reverse.

    python examples/energy.py [STEPS]

A network E(x) says how likely a set of points is. Its score is the gradient -dE/dx, and the loss
compares that gradient with the noise that was added (Vincent, 2011). Training differentiates the
gradient once more, in the weights: double backward. PyTorch's fused attention has none.

The data: eight points of the plane each, equally spaced on a circle of random angle and radius 1.
"""

import math
import sys

import torch
from torch import Tensor, nn

from jvp_flash_attention.modules import Attention

POINTS, SIGMA = 8, 0.15


class Energy(nn.Module):
    """(B, 8, 2) -> (B,). No positions: the order of the points does not matter."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.points = nn.Linear(2, width)
        self.attentions = nn.ModuleList(Attention(width, 4) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.energy = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.points(x)
        for attend, mlp in zip(self.attentions, self.mlps, strict=True):
            h = h + attend(h)
            h = h + mlp(h)
        return self.energy(h).sum((1, 2))


def score(net: nn.Module, x: Tensor, create_graph: bool = False) -> Tensor:
    """-dE/dx (B, 8, 2); with create_graph it can be differentiated in the weights."""
    x = x.detach().requires_grad_()
    return -torch.autograd.grad(net(x).sum(), x, create_graph=create_graph)[0]


def circles(n: int) -> Tensor:
    """(n, 8, 2)"""
    angles = 2 * math.pi * (torch.rand(n, 1) + torch.arange(POINTS) / POINTS)
    return torch.stack([angles.cos(), angles.sin()], -1)


def main(steps: int = 600) -> None:
    torch.manual_seed(0)
    net = Energy()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        e = torch.randn(256, POINTS, 2)
        predicted = score(net, circles(256) + SIGMA * e, create_graph=True)
        # the score of the noisy data is -e / SIGMA on average; 1 is a network that says nothing
        loss = (SIGMA * predicted + e).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 6) == 0:
            print(f"{step}/{steps}  loss {loss.item():.3f}", flush=True)
    x = circles(1000) + SIGMA * torch.randn(1000, POINTS, 2)
    denoised = x + SIGMA**2 * score(net, x)  # Tweedie's formula
    for name, points in (("noisy", x), ("denoised", denoised)):
        off = (points.norm(dim=-1) - 1).square().mean().sqrt()
        print(f"{name:9} distance of a point from the circle {off:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
