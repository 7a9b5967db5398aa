"""A network in shards: each process keeps a part of every weight (PyTorch's FSDP2).

A block's weights are gathered when it is reached and let go after it, forward and backward, those
of several small blocks together (``units``): few large exchanges keep GPU and Python for a shorter
time. Value and tangent travel between blocks as ordinary tensors (``models.jvp_layers``), so that
the hooks of FSDP2 see nothing but tensors, whatever the objective differentiates.

A mesh of one dimension shards over all its processes; of two dimensions (replicate, shard) it
shards over the second one and keeps equal copies along the first one.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate

from training.models.layers import Block

METHODS = ("heads", "log_variance")  # of a network, that use its weights beside ``forward``
OURS = ("forward", *METHODS)  # what is set on an instance when it is sharded or compiled
UNIT = 2**25  # weights that travel together at least, 64 MiB in half precision


def shard(
    net: nn.Module, mesh: DeviceMesh, half: torch.dtype | None = None, least: int = UNIT
) -> None:
    """Shard a network in place, block by block and what is left as a whole.

    Its weights and buffers are those of the first process, in the others they may be on the meta
    device; no device ever holds more than its shard and one whole weight.

    Args:
        mesh: of one dimension or (replicate, shard).
        half: what autocast rounds the weights of linear layers to. They travel between processes
            in it then. Times, sinusoids and all that is outside of the blocks stay as they are,
            and so do the inputs of a block.
        least: see ``units``.
    """
    first = distributed.get_rank() == 0
    weights = net.state_dict() if first else {}
    buffers = {name: x for name, x in net.named_buffers() if first}
    net.to("meta")
    for blocks in units(net, least):
        dtype = half if all(map(_linear_alone, blocks)) else None
        # Gradients are summed in the precision of the weights.
        policy = MixedPrecisionPolicy(dtype, _dtype(blocks[0]), cast_forward_inputs=False)
        unit: Any = blocks if len(blocks) > 1 else blocks[0]
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    # Not the default of a root, which keeps its weights after a forward without a backward: they
    # would be old after the next step of the optimizer.
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
    for name in METHODS:
        if hasattr(net, name):
            register_fsdp_forward_method(net, name)
    net.to_empty(device=mesh.device_type)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, weights, options=options)
    for name, buffer in net.named_buffers():
        if first:
            buffer.copy_(buffers[name])
        distributed.broadcast(buffer, 0)


def units(net: nn.Module, least: int = UNIT) -> list[list[nn.Module]]:
    """Blocks whose weights travel together: each alone, or consecutive ones of at least so many
    weights. A unit is entered at its first block and left at its last one alone.
    """
    found: list[list[nn.Module]] = []
    second = len(getattr(net, "second_blocks", None) or ())
    for parent in net.modules():
        blocks = [child for child in parent.children() if isinstance(child, Block)]
        for place, block in enumerate(blocks):
            begins = place in (0, len(blocks) - second)  # where a second head may leave the trunk
            if begins or sum(map(weights_of, found[-1])) >= least:
                found.append([])
            found[-1].append(block)
    return found


def weights_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _linear_alone(module: nn.Module) -> bool:
    """Whether every weight is one of a linear layer, which autocast would round anyway."""
    return all(isinstance(m, nn.Linear) for m in module.modules() if list(m.parameters(False)))


def is_sharded(net: nn.Module) -> bool:
    return isinstance(net, FSDPModule)


def local(x: torch.Tensor) -> torch.Tensor:
    """What this process has of x; the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of x, in every process; all must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def beside(x: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """x, equal in all processes, as an operand of operations on this parameter."""
    if not isinstance(parameter, DTensor):
        return x
    mesh = parameter.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


@contextmanager
def exchanged(net: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[nn.Module]:
    """The network with other weights, sharded alike, and afterwards with its own again: no second
    network is needed.
    """
    own = dict(net.named_parameters())
    pairs = [(local(own[name]), local(other)) for name, other in weights.items()]
    _exchange(pairs)
    try:
        yield net
    finally:
        _exchange(pairs)


@torch.no_grad()
def _exchange(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for a, b in pairs:
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def copy_whole(thing: nn.Module, modules: Iterable[nn.Module], memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(thing, memo)``, also of sharded ones among its modules, which refuse to be
    copied. In the copy they are as they were before; ``memo`` says what becomes of their weights.
    """
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        original = type(module).__mro__[2]  # fully_shard puts a class and FSDPModule before it
        memo[id(module)] = object.__new__(original)
    for module in sharded:
        fresh = vars(nn.Module())
        kept = {
            name: value
            for name, value in vars(module).items()
            if name not in OURS and not any(part in name for part in ("hooks", "__", "fsdp"))
        }
        memo[id(module)].__dict__ = fresh | copy.deepcopy(kept, memo)
    return copy.deepcopy(thing, memo)
