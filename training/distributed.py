"""Numbers that all processes of a run agree on."""

from typing import Any

import torch
from torch import distributed, nn

OPERATIONS = {"mean": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}


def over_ranks(values: torch.Tensor, operation: str) -> torch.Tensor:
    """The elementwise ``mean`` or ``max`` over the processes; of one process, the values."""
    if not distributed.is_available() or not distributed.is_initialized():
        return values
    values = values.clone()
    distributed.all_reduce(values, OPERATIONS[operation])
    return values / distributed.get_world_size() if operation == "mean" else values


class SummedGradients:
    """Gradients as sums over the processes, each one's exchange begun as soon as the backward pass
    has it, under what is left of the pass. A loss divided by ``size`` then has the mean's.

    What ``DistributedDataParallel`` does in buckets, without its state between steps: everything
    lies between the first and the last operation of a backward pass, and a CUDA graph can hold it.
    """

    def __init__(self, net: nn.Module) -> None:
        self.size = distributed.get_world_size()
        self.begun: list[Any] = []
        for parameter in net.parameters():
            distributed.broadcast(parameter.detach(), 0)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._begin)

    def _begin(self, parameter: torch.Tensor) -> None:
        self.begun.append(distributed.all_reduce(parameter.grad, async_op=True))

    def wait(self) -> None:
        """After the backward pass, before a gradient is read."""
        for exchange in self.begun:
            exchange.wait()
        self.begun.clear()


class Later:
    """Numbers of a step, read when the device has them and without keeping it waiting.

    On a GPU what is handed in at one step is read at the next one, which is queued by then: the
    host runs at most one step ahead. On a CPU it is read at once.
    """

    def __init__(self) -> None:
        self.kept: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def __call__(self, values: torch.Tensor) -> list[list[float]]:
        """The values that are known by now, oldest first; none, or one step's."""
        if not values.is_cuda:
            return [values.tolist()]
        known = self.flush()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.kept = host, event
        return known

    def flush(self) -> list[list[float]]:
        """Those that are not read yet."""
        if self.kept is None:
            return []
        (host, event), self.kept = self.kept, None
        event.synchronize()
        return [host.tolist()]
