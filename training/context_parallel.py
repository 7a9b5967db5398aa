"""One sequence over several processes: each of a group computes a share of the tokens.

The processes of a group see the same images and the same draws. From the tokens to the patches that
leave the network each one holds its own rows, and attention reads the keys of the others
(``jvp_flash_attention.distributed``). The patches are gathered: every process of the group has the
whole output, and the same loss.

    z -> tokens -> shard -> blocks -> final layer -> gather -> loss
                   N / n tokens in each process

Gradients are averaged over all processes, as without it. A process's own tokens give it a part of a
weight's gradient, and the parts of a group add up to it. So ``gather`` hands back n times the
cotangent of the own rows: the mean over n parts is then their sum. What lies before ``shard`` or
after ``gather`` is computed by every process alike and needs no such care: before it gradients are
parts as well, after it whole ones, of which the mean is right as it is.

Sampling does not use it: every process draws whole images (``whole_sequences``).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jvp_flash_attention.distributed import context_parallel_attention, shard, unshard
from training.attentions import ours
from training.models.dit import DiT
from training.models.jvp_layers import Tensor, linear_map
from training.models.layers import SelfAttention
from training.validation import one_of, positive_integer

KINDS = ("ring", "ulysses", "2d")


class ContextParallel:
    """What ``context_parallel`` and ``context_size`` ask for.

    Args:
        kind: "ring" (keys travel), "ulysses" (heads are dealt out) or "2d" (both).
        size: processes that share a sequence; None is all of the run. For "2d" it is two numbers,
            (ring, ulysses).
    """

    def __init__(self, kind: str, size: int | Sequence[int] | None = None) -> None:
        one_of("context_parallel", kind, KINDS)
        if kind == "2d":
            if isinstance(size, int) or size is None or len(size) != 2:
                raise ValueError(
                    "context_size must be two numbers [ring, ulysses] with context_parallel=2d; got"
                    f" {size}"
                )
        elif not (size is None or isinstance(size, int)):
            raise TypeError(f"context_size must be an integer or null; got {size}")
        for number in () if size is None else (size,) if isinstance(size, int) else size:
            positive_integer("context_size", number)
        self.kind, self.shape = kind, size
        self.sequence: TokenShards | None = None

    def size(self, processes: int) -> int:
        """Of a group."""
        if self.shape is None:
            return processes
        size = self.shape if isinstance(self.shape, int) else math.prod(self.shape)
        if processes % size:
            raise ValueError(
                f"context_size must divide the number of processes {processes}; got {self.shape}"
            )
        return size

    def start(self, nets: Iterable[nn.Module], device: str) -> None:
        """From here on the networks hold shards of their tokens; all processes call it."""
        given = [(_dit(net), _backend(net)) for net in nets]
        processes = distributed.get_world_size() if distributed.is_initialized() else 1
        size = self.size(processes)
        if size == 1:
            raise ValueError(
                f"context_parallel={self.kind} needs two processes or more in a group; got 1; use"
                " trainer=ddp or trainer=fsdp with trainer.devices, or context_parallel=null"
            )
        inner = (size,) if self.kind != "2d" else tuple(self.shape)  # type: ignore[arg-type]
        names = ("ring", "ulysses") if self.kind == "2d" else ("sequence",)
        shape = (processes // size, *inner)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("data", *names))
        mesh = mesh[names] if len(names) > 1 else mesh[names[0]]
        for net, backend in given:
            join(net, TokenShards(mesh, self.kind, net.tokens, backend))


class TokenShards:
    """The rows of a sequence that this process holds, and the attention among all of them."""

    def __init__(self, mesh: DeviceMesh, kind: str, tokens: int, backend: str | None) -> None:
        self.mesh, self.tokens = mesh, tokens
        lengths = (tokens, tokens)
        self.attention = context_parallel_attention(mesh, kind, lengths=lengths, backend=backend)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenShards":
        return self  # processes cannot be copied

    def shard(self, x: Tensor) -> Tensor:
        """This process's tokens of (B, N, W)."""
        return linear_map(lambda x: shard(x, self.mesh, dim=-2), x)

    def gather(self, x: Tensor) -> Tensor:
        """All tokens of all processes of the group."""
        return linear_map(lambda x: _Gather.apply(x, self.mesh, self.tokens), x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh, tokens: int) -> torch.Tensor:
        ctx.mesh = mesh
        return unshard(x.detach(), mesh, dim=-2, length=tokens)

    @staticmethod
    def backward(ctx: Any, d_x: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        """The processes of a group have the same cotangent: their sum is n times one's."""
        return shard(d_x, ctx.mesh, dim=-2) * ctx.mesh.size(), None, None


def join(net: nn.Module, sequence: TokenShards | None) -> None:
    """Set what shards the tokens of a network, or None: it then computes whole sequences."""
    for module in net.modules():
        if isinstance(module, DiT | SelfAttention):
            module.sequence = sequence


@contextmanager
def whole_sequences(net: nn.Module) -> Iterator[None]:
    """The network inside computes whole sequences, in this process alone."""
    joined = getattr(net, "sequence", None)
    join(net, None)
    try:
        yield
    finally:
        join(net, joined)


def data_place(trainer: Any) -> tuple[int, int]:
    """(rank, number) of the processes that see batches of their own: groups count as one."""
    context = getattr(trainer.lightning_module, "context", None)
    size = 1 if context is None else context.size(trainer.world_size)
    return trainer.global_rank // size, trainer.world_size // size


def _dit(net: nn.Module) -> DiT:
    if not isinstance(net, DiT):
        raise NotImplementedError(
            "context_parallel shards the tokens of a DiT (model=dit_*, imf_*); got"
            f" {type(net).__name__}"
        )
    return net


def _backend(net: nn.Module) -> str | None:
    attention = next(m.attention for m in net.modules() if isinstance(m, SelfAttention))
    given = ours(attention)
    if given is None:
        raise NotImplementedError(
            "context_parallel needs this project's attention; use attention=jvp or"
            " attention=reference"
        )
    if other := sorted(given.keywords.keys() - {"backend"}):
        raise NotImplementedError(
            f"context_parallel takes attention.backend alone; got attention.{other[0]} too, which"
            " it would leave out"
        )
    return given.keywords.get("backend")
