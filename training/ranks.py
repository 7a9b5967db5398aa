"""Numbers that all processes of a run agree on."""

import torch
from torch import distributed

OPERATIONS = {"mean": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}


def over_ranks(values: torch.Tensor, operation: str) -> torch.Tensor:
    """The elementwise ``mean`` or ``max`` over the processes; of one process, the values."""
    if not distributed.is_available() or not distributed.is_initialized():
        return values
    values = values.clone()
    distributed.all_reduce(values, OPERATIONS[operation])
    return values / distributed.get_world_size() if operation == "mean" else values
