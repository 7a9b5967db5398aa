"""How much memory a training step takes on each GPU, before there is one.

Weights, gradients, optimizer and averages are counted from the network on the meta device.
Activations are what PyTorch keeps for the backward pass: the loss is computed on fake tensors, the
blocks traced and cut into forward and backward as the compiler does it, and every tensor that is
saved is counted once, attention's included; a fused kernel of a GPU may save another one. The
backward pass frees them as it makes gradients, so that the larger of both counts, except where
gradients are there all the time.

Not counted: what the library of communication and the allocator keep for themselves, and
fragmentation; ``OVERHEAD`` stands for them. What a block's backward pass needs while it runs is
taken as ``WORKING`` times what the block saves, as measured (docs/training/multi_gpu.md).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from training.activation_checkpointing import CHOICES as CHECKPOINTING
from training.activation_checkpointing import checkpoint_blocks
from training.models.layers import Block
from training.private import cut_and_not_compiled, fake_tensors, identity
from training.randomness import Draws
from training.sharding import units, weights_of
from training.step import compile_blocks, teachers

SHARDINGS = ("none", "ddp", "hybrid", "fsdp")
OVERHEAD = 1.5 * 2**30  # bytes: the CUDA context, cuBLAS, NCCL
WORKING = 3
FULL = 4  # bytes of a weight, of its gradient and of each of AdamW's two moments


class Plan(NamedTuple):
    """Bytes of each GPU."""

    sharding: str
    checkpointing: str
    parameters: float
    gradients: float
    optimizer: float
    averages: float  # of the callback, and teachers
    gathered: float  # whole weights and gradients of the blocks in work
    activations: float
    working: float  # of the block whose backward pass runs
    total: float


class Saved(NamedTuple):
    """Bytes that are kept for the backward pass."""

    by: dict[str, float]  # each choice of checkpointing
    block: float  # of one block without any


class Counted(NamedTuple):
    """Numbers of weights."""

    all: int
    unit: int  # of the blocks that travel together
    teachers: int


def count(net: nn.Module, objective: nn.Module) -> Counted:
    unit = max((sum(map(weights_of, blocks)) for blocks in units(net)), default=0)
    return Counted(weights_of(net), unit, sum(map(weights_of, teachers(objective))))  # type: ignore[arg-type]


def plans(
    counted: Counted,
    saved: Saved,
    processes: int,
    nodes: int = 1,
    averages: int = 1,
    half: bool = True,
    accumulate: int = 1,
    graphs: bool = True,
) -> list[Plan]:
    """Every sharding that so many processes can have, with every choice of checkpointing.

    Args:
        saved: see ``saved_bytes``.
        averages: how many averages of the weights there are.
        half: weights travel in half precision.
        accumulate: of so many batches the gradients are averaged.
        graphs: the step is a CUDA graph, with gradients of its own.
    """
    found = []
    kept = averages * counted.all + counted.teachers
    for sharding in SHARDINGS:
        parts = {"none": 1, "ddp": 1, "hybrid": processes // nodes, "fsdp": processes}[sharding]
        if (processes == 1) != (sharding == "none") or (sharding == "hybrid" and nodes == 1):
            continue
        # A unit in work and the next one, whole: weights as they travel, and gradients likewise.
        gathered = 2 * counted.unit * 2 * (FULL / 2 if half else FULL) if parts > 1 else 0.0
        share = FULL * counted.all / parts
        working = WORKING * saved.block
        for checkpointing, activations in saved.by.items():
            row = (share, share, 2 * share, FULL * kept / parts, gathered, activations, working)
            both = max(share, activations)
            if accumulate > 1:  # the sum, and what is added to it
                both = share + (both if graphs else activations)
            elif sharding == "ddp" and not graphs:  # views of what is exchanged, there all the time
                both = share + activations
            total = sum(row) - share - activations + both + OVERHEAD
            found.append(Plan(sharding, checkpointing, *row, total))
    return found


def saved_bytes(
    build: Callable[[], tuple[nn.Module, Any]],
    batch: int,
    shape: tuple[int, ...],
    half: bool = True,
    compile: bool = True,
) -> Saved:
    """What is kept for the backward pass, for each choice of checkpointing. Nothing is computed.

    Args:
        build: network and objective, its teachers attached.
        batch, shape: of the images, (C, H, W).
        half: under autocast to bfloat16.
        compile: blocks as the compiler cuts them; else all that an eager step saves.

    The block that is computed again in the backward pass is counted as without checkpointing.
    """
    none, blocks = _saved(build, batch, shape, "none", half, compile)
    found = {"none": (none, blocks)}
    for keep in CHECKPOINTING[1:] if blocks else ():
        found[keep] = _saved(build, batch, shape, keep, half, compile)
    part = 1 / blocks if blocks else 0.0
    by = {keep: saved + (none - saved) * part for keep, (saved, _) in found.items()}
    return Saved(by, none * part)


def _saved(
    build: Callable[[], tuple[nn.Module, Any]],
    batch: int,
    shape: tuple[int, ...],
    keep: str,
    half: bool,
    compile: bool,
) -> tuple[int, int]:
    """Bytes, and how many blocks there are."""
    torch.compiler.reset()
    mode = fake_tensors(allow_non_fake_inputs=True)
    with mode:
        net, objective = build()
    checkpoint_blocks(net, keep)
    if compile:
        for part in (net, *teachers(objective)):
            compile_blocks(part, backend=cut_and_not_compiled())
    draws = Draws(0)
    x, y = torch.zeros(batch, *shape), torch.zeros(batch, dtype=torch.int64)
    sample = objective.sample(x, y, net.null_label, draws)
    own = {identity(p.untyped_storage()) for p in (*net.parameters(), *net.buffers())}
    held: dict[int, Any] = {}  # kept alive, so that no other one has the same key

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if identity(storage) not in own:
            held[identity(storage)] = storage
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with mode, hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        empty = lambda a: torch.empty(a.shape, dtype=a.dtype)  # noqa: E731
        sample = tree_map_only(torch.Tensor, empty, sample)
        objective.loss(net, sample)
    blocks = sum(isinstance(module, Block) for module in net.modules())
    return sum(storage.nbytes() for storage in held.values()), blocks
