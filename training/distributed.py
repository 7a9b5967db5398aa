"""Numbers that all processes of a run agree on."""

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
    """Gradients as sums over the processes, exchanged in a few parts: each part's exchange begins
    as soon as the backward pass has it, under what is left of the pass. A loss divided by ``size``
    then has the mean's.

    What ``DistributedDataParallel`` does in buckets, without its state between steps: everything
    lies between the first and the last operation of a backward pass, and a CUDA graph can hold it.

    Few parts, because products run in whole rounds of all multiprocessors: where an exchange takes
    only some of them, a product takes another round, however few they are. A long exchange at a low
    rate therefore costs more than a short one at the full rate.

    Args:
        parts: of about equal numbers of elements.
    """

    def __init__(self, net: nn.Module, parts: int = 6) -> None:
        self.size = distributed.get_world_size()
        self.begun: list[distributed.Work] = []
        self.ready: list[torch.Tensor] = []  # gradients that wait for the rest of their part
        trained = 0
        for parameter in net.parameters():
            distributed.broadcast(parameter.detach(), 0)
            if parameter.requires_grad:
                trained += parameter.numel()
                parameter.register_post_accumulate_grad_hook(self._add)
        self.part = trained / parts

    def _add(self, parameter: torch.Tensor) -> None:
        if self.ready and self.ready[0].dtype != parameter.dtype:  # a part has one
            self._begin()
        self.ready.append(parameter.grad)  # type: ignore[arg-type]
        if sum(gradient.numel() for gradient in self.ready) >= self.part:
            self._begin()

    def _begin(self) -> None:
        everyone = distributed.group.WORLD
        self.begun.append(everyone.allreduce_coalesced(self.ready))  # type: ignore[union-attr]
        self.ready = []

    def wait(self) -> None:
        """After the backward pass, before a gradient is read."""
        if self.ready:
            self._begin()
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
