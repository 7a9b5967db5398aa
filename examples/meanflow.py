"""MeanFlow (arXiv 2505.13447) on scikit-learn's digits: python examples/meanflow.py [STEPS]"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import jvp
from torch.nn.functional import gelu, layer_norm

from jvp_flash_attention import attention


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.modulation = heads, nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, c):  # (B, N, W), (B, W)
        s1, b1, g1, s2, b2, g2 = self.modulation(c)[:, None].chunk(6, -1)
        h = layer_norm(x, x.shape[-1:]) * (1 + s1) + b1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + g1 * self.out(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + g2 * self.down(gelu(self.up(layer_norm(x, x.shape[-1:]) * (1 + s2) + b2)))


class Net(nn.Module):
    """u(z, t, r, y): the average velocity between the times r and t. Patches of 2 x 2 pixels."""

    def __init__(self, width=96, depth=4, heads=4):
        super().__init__()
        self.patch, self.position = nn.Linear(4, width), nn.Parameter(torch.randn(16, width))
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.label, self.pixels = nn.Embedding(10, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, z, t, r, y):  # (B, 8, 8), (B,), (B,), (B,)
        angles = torch.stack([t, t - r], -1)[..., None] * torch.logspace(0, 1.5, 8)
        c = self.time(torch.cat([angles.sin(), angles.cos()], -1).flatten(1)) + self.label(y)
        x = z.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.patch(x) + self.position
        for block in self.blocks:
            x = block(x, c)
        return self.pixels(x).reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 8, 8)


def error_of(net, x, y):
    """(B,): the squared distance to the target that the MeanFlow identity gives."""
    t, r = torch.sigmoid(torch.randn(2, len(x)) - 0.4).sort(0, descending=True).values
    r = torch.where(torch.rand(len(x)) < 0.5, r, t)  # half of them learn the velocity itself
    e = torch.randn_like(x)
    z, v = x + t[:, None, None] * (e - x), e - x
    u, du = jvp(lambda z, t: net(z, t, r, y), (z, t), (v, torch.ones_like(t)))
    return (u - (v - (t - r)[:, None, None] * du).detach()).square().sum((1, 2))


def main(steps=4000):
    torch.manual_seed(0)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    images, net = images.float().reshape(-1, 8, 8) / 8 - 1, Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (128,))
        error = error_of(net, images[batch], labels[batch])
        (error / (error.detach() + 1e-2)).mean().backward()  # adaptive weight: the loss is about 1
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            print(f"{step}/{steps}  error {error.mean():.3f}", flush=True)
    noise, one = torch.randn(80, 8, 8), torch.ones(80)
    x = noise - net(noise, one, 0 * one, torch.arange(80) % 10).detach()  # one step: t = 1 to r = 0
    plt.imsave("meanflow.png", x.view(8, 10, 8, 8).transpose(1, 2).reshape(64, 80), cmap="gray")
    print("80 samples in one step each, a class a column: meanflow.png")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
