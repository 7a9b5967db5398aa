"""Sharding rules of attention for `DTensor`: by batch and by heads nothing is exchanged.

Any other sharding (of lengths or of head dims) is gathered first, as PyTorch does for operators
that cannot use it; `context_parallel_attention` is what keeps sequences sharded. The rules are
registered when attention meets a DTensor, or by importing this module (before compiling).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .. import ops

Sharding = tuple[list[Placement | None], list[Placement | None]]  # of results, of arguments

# (B, H, ...) beside q's rows; (B, Hk, ...) beside the keys; a mask has 1 where it broadcasts
ROWS = ("q", "t_q", "d_out", "d_t_out", "out", "lse", "t_out", "mu")
KEYS = ("k", "v", "t_k", "t_v")
MASKS = ("mask", "t_mask")
GRADS = ("q", "k", "v", "mask")


def _rule(overload: Any) -> Callable[..., list[Sharding]]:
    names = [argument.name for argument in overload._schema.arguments]
    results = len(overload._schema.returns)
    backward = "backward" in overload.name()

    def shardings(*args: Any) -> list[Sharding]:
        given = dict(zip(names, args, strict=True))
        if given["seed"] is not None:
            raise NotImplementedError(
                "attention of DTensors has no dropout: each process would draw a mask of its own;"
                " drop in other layers"
            )
        if given["cu_q"] is not None or given["kv_blocks"] is not None:
            raise NotImplementedError(
                "attention of DTensors takes no cu_seqlens and no block_mask; give it the local"
                " tensors, which heads may be sharded in"
            )
        tensors = {name: hasattr(x, "placements") for name, x in given.items()}
        whole: list[Placement | None] = [Replicate() if tensors[name] else None for name in names]
        found: list[Sharding] = [([Replicate()] * results, whole)]
        for dim in (0, 1):
            if (of := _placements(given, dim)) is None:
                continue
            inputs = [of.get(name) if tensors[name] else None for name in names]
            outputs: list[Placement | None] = [Shard(dim)] * results
            if backward:
                grads = [_gradient(of[name]) for name in GRADS]
                grads[3] = grads[3] if given["mask_grad"] else Replicate()
                outputs[:] = [*grads, *grads][:results]
            found.append((outputs, inputs))
        return found

    return shardings


def _placements(given: dict[str, Any], dim: int) -> dict[str, Placement] | None:
    """By name, where the rows' dimension `dim` is sharded; None where it cannot be."""
    q, k, mask = given["q"], given["k"], given["mask"]
    found: dict[str, Placement] = dict.fromkeys((*ROWS, *KEYS, *MASKS), Shard(dim))
    if k.shape[dim] != q.shape[dim]:  # grouped heads: a process has whole groups
        if k.shape[dim] == 1:
            found |= dict.fromkeys(KEYS, Replicate())
        elif k.shape[dim] % max(_shards(q, dim), _shards(k, dim)):
            return None
    if mask is None or mask.shape[dim] == 1:
        found |= dict.fromkeys(MASKS, Replicate())
    return found


def _shards(x: Any, dim: int) -> int:
    """Among how many processes the dimension `dim` lies; all, if it lies whole."""
    sizes = [x.mesh.size(i) for i, of in enumerate(x.placements) if of.is_shard(dim)]
    return math.prod(sizes) if sizes else x.mesh.size()


def _gradient(of: Placement) -> Placement:
    """Of what every process has whole and uses a part of, a sum."""
    return Partial() if isinstance(of, Replicate) else of


for _name in ("forward", "forward_jvp", "backward", "backward_jvp"):
    _overload = getattr(getattr(torch.ops, ops.NAMESPACE), f"flash_attn_{_name}").default
    register_sharding(_overload)(_rule(_overload))
