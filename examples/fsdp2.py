"""MeanFlow with the weights in shards over several processes (FSDP2), a jvp in every block.

    torchrun --nproc-per-node 2 examples/fsdp2.py [STEPS]

Two processes on the CPU here, connected by gloo; on GPUs the same lines with nccl.

FSDP2 gathers the weights of a module when its forward begins, and its hooks know ordinary tensors
only: a dual tensor that meets them loses its tangent. So no jvp may reach across the border of a
sharded module. Each block takes value and tangent as two tensors and calls `torch.func.jvp` inside.
"""

import os
import sys

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import jvp

from jvp_flash_attention.modules import Attention


class Block(nn.Module):
    """Value and tangent (B, L, W) of the tokens and of the condition (B, W) -> those of tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend, self.condition = Attention(width, heads), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, t_x: Tensor, c: Tensor, t_c: Tensor) -> tuple[Tensor, Tensor]:
        x, t_x = jvp(self.value, (x, c), (t_x, t_c))
        return x.clone(), t_x.clone()  # jvp returns views, of which FSDP2 warns

    def value(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attend(x + self.condition(c)[:, None])
        return x + self.mlp(x)


class Net(nn.Module):
    """u and du/dt, both (B, L, P): tokens of P pixels."""

    def __init__(self, pixels: int, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.pixels = nn.Linear(pixels, width), nn.Linear(width, pixels)
        self.times = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, z: Tensor, t: Tensor, r: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Along (v, 1) in (z, t)."""
        x, t_x = jvp(self.tokens, (z,), (v,))
        c, t_c = jvp(lambda t: self.times(torch.stack([t, t - r], -1)), (t,), (torch.ones_like(t),))
        for block in self.blocks:
            x, t_x = block(x, t_x, c, t_c)
        u, du = jvp(self.pixels, (x,), (t_x,))
        return u.clone(), du.clone()


def error_of(net: nn.Module, x: Tensor) -> Tensor:
    """()"""
    t, r = torch.rand(2, len(x)).sort(0, descending=True).values
    e = torch.randn_like(x)
    z, v = x + t[:, None, None] * (e - x), e - x
    u, du = net(z, t, r, v)
    return (u - (v - (t - r)[:, None, None] * du).detach()).square().mean()


def main(steps: int = 50) -> None:
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)  # the same initial weights everywhere, of which each process keeps a part
    net = Net(pixels=4)
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)  # other data everywhere
    for step in range(1, steps + 1):
        error = error_of(net, torch.randn(32, 1, 4).expand(32, 16, 4))
        error.backward()  # averages the gradients
        optimizer.step()
        optimizer.zero_grad()
        mean = error.detach() / world
        distributed.all_reduce(mean)
        if rank == 0 and step % max(1, steps // 5) == 0:
            print(f"{step}/{steps}  error {mean.item():.3f}", flush=True)
    mine = sum(p.to_local().numel() for p in net.parameters())
    print(f"process {rank} holds {mine} of {sum(p.numel() for p in net.parameters())} weights")
    distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*map(int, sys.argv[1:]))
