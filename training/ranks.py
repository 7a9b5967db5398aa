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
