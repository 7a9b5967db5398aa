"""The trace of a network's Jacobian by Hutchinson's estimator: a jvp a probe, all under one vmap.

    python examples/trace.py [PROBES]

    tr(df/dx) = E[e . (df/dx) e],   e = ±1 at random (Hutchinson, 1989)

It is the divergence in the likelihood of a continuous flow, d log p / dt = -tr(df/dx), and what a
regulariser of the Jacobian needs. A jvp costs about two evaluations whatever the length of x; the
exact trace costs one jvp for each element of x.
"""

import sys
import time

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jvp, vmap

from jvp_flash_attention.modules import Attention


class Block(nn.Module):
    """(B, L, W) -> (B, L, W)"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.mlp(x)


def estimates(f: nn.Module, x: Tensor, probes: int) -> Tensor:
    """(probes,), each with the trace as its mean."""

    def one(e: Tensor) -> Tensor:
        return (e * jvp(f, (x,), (e,))[1]).sum()

    signs = torch.randint(0, 2, (probes, *x.shape), dtype=x.dtype) * 2 - 1
    return vmap(one, chunk_size=64)(signs)


def exact(f: nn.Module, x: Tensor) -> Tensor:
    """()"""
    return jacfwd(f)(x).reshape(x.numel(), x.numel()).trace()


@torch.no_grad()
def main(probes: int = 1024) -> None:
    torch.manual_seed(0)
    f, x = nn.Sequential(Block(16, 2), Block(16, 2)).double(), torch.randn(1, 24, 16).double()
    start = time.perf_counter()
    trace = exact(f, x)
    print(f"exact: {trace:.3f} ({x.numel()} jvps, {time.perf_counter() - start:.2f} s)")
    for n in sorted({max(2, probes // 64), max(2, probes // 8), probes}):
        start = time.perf_counter()
        found = estimates(f, x, n)
        error = found.std() / n**0.5
        seconds = time.perf_counter() - start
        print(f"{n:5} probes: {found.mean():.3f} ± {error:.3f} ({seconds:.2f} s)")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
