"""What processes send each other: several tensors as one buffer, around a ring or all to all.

Transfers are posted and waited for by their handles. On a GPU that makes the stream wait and not
the host, so what is launched between the two runs while they are under way.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import P2POp, ProcessGroup, Work

from ..functorch import without_functorch

ALIGNMENT = 16  # bytes; what TMA reads begins at a multiple

Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor

_agreed: set[tuple] = set()


class Packed:
    """Tensors side by side in one buffer of bytes; None stands for an absent one."""

    def __init__(self, kinds: Sequence[Kind | None], device: torch.device):
        self.kinds = kinds
        size = max(sum(map(_bytes, kinds)), ALIGNMENT)
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.tensors = _views(self.buffer, kinds)

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None) -> "Packed":
        """A copy of the tensors, in one `dtype` or each in its own."""
        kinds = [None if x is None else (tuple(x.shape), dtype or x.dtype) for x in tensors]
        packed = cls(kinds, next(x.device for x in tensors if x is not None))
        for there, x in zip(packed.tensors, tensors, strict=True):
            if there is not None and x is not None:
                there.copy_(x)
        return packed

    def like(self, rows: int) -> "Packed":
        """An empty one for the same tensors with `rows` rows, dimension 2."""
        kinds = [
            None if kind is None else ((*kind[0][:2], rows, *kind[0][3:]), kind[1])
            for kind in self.kinds
        ]
        return Packed(kinds, self.buffer.device)


class Transfer(NamedTuple):
    """One on its way. Both buffers stay alive until it has been waited for."""

    works: list[Work]
    sent: Packed
    received: Packed

    def wait(self) -> Packed:
        for work in self.works:
            work.wait()
        return self.received


def pass_on(group: ProcessGroup, packed: Packed, received: Packed) -> Transfer:
    """Starts to send to the next process of the ring and to receive from the one before."""
    rank, size = group.rank(), group.size()
    after, before = (
        distributed.get_global_rank(group, (rank + step) % size) for step in (1, size - 1)
    )
    works = distributed.batch_isend_irecv(
        [
            P2POp(distributed.isend, packed.buffer, after, group),
            P2POp(distributed.irecv, received.buffer, before, group),
        ]
    )
    return Transfer(works, packed, received)


def rotate(
    group: ProcessGroup, tensors: Sequence[Tensor | None], lengths: Sequence[int]
) -> Iterator[tuple[int, list[Tensor | None]]]:
    """Every process's tensors in turn, its own first, as (process, tensors). The next ones are on
    their way while the caller works with these. Rows are dimension 2, `lengths[i]` in process i."""
    rank, size = group.rank(), group.size()
    if size == 1:
        yield rank, list(tensors)
        return
    present = Packed.of(tensors)
    for step in range(size):
        transfer = None
        if step < size - 1:
            following = present.like(lengths[(rank - step - 1) % size])
            transfer = pass_on(group, present, following)
        yield (rank - step) % size, present.tensors
        if transfer is not None:
            present = transfer.wait()


def all_to_all(
    group: ProcessGroup, tensors: Sequence[Sequence[Tensor]], kinds: Sequence[Sequence[Kind]]
) -> list[list[Tensor]]:
    """`tensors[i]` go to process i, and the result's [i], of `kinds[i]`, come from it, in one
    collective."""
    device = tensors[0][0].device
    outgoing = [[(tuple(x.shape), x.dtype) for x in some] for some in tensors]
    counts = [[sum(map(_bytes, some)) for some in side] for side in (outgoing, kinds)]
    sent, received = (torch.empty(sum(n), dtype=torch.uint8, device=device) for n in counts)
    for part, some, there in zip(sent.split(counts[0]), tensors, outgoing, strict=True):
        for view, x in zip(_views(part, there), some, strict=True):
            view.copy_(x)
    distributed.all_to_all_single(received, sent, counts[1], counts[0], group=group)
    return [_views(part, some) for part, some in zip(received.split(counts[1]), kinds, strict=True)]


def agree(group: ProcessGroup, name: str, call: tuple, fault: str | None) -> None:
    """Raises on every process where the processes do not make the same call: `call` must be the
    same everywhere, `fault` is what this process found wrong with its own tensors.

    Asks the others the first time that it sees a `call`, which on a GPU makes the host wait; after
    that a fault raises on its own process alone.
    """
    key = (name, group.group_name, call)
    if key not in _agreed:
        everyone: list = [None] * group.size()
        with without_functorch():  # inside a torch.func.jvp its bytes would come wrapped
            distributed.all_gather_object(everyone, (call, fault), group=group)
        for rank, (other, found) in enumerate(everyone):
            if found is not None:
                raise ValueError(f"{name}: process {rank} of {group.size()}: {found}")
            if other != everyone[0][0]:
                raise ValueError(
                    f"{name} must be called alike on all processes, got {everyone[0][0]} on process"
                    f" 0 and {other} on process {rank}"
                )
        _agreed.add(key)
    if fault is not None:
        raise ValueError(f"{name}: {fault}")


def _bytes(kind: Kind | None) -> int:
    """What a tensor takes, so that the next one begins aligned."""
    if kind is None:
        return 0
    return -(-prod(kind[0]) * kind[1].itemsize // ALIGNMENT) * ALIGNMENT


def _views(buffer: Tensor, kinds: Sequence[Kind | None]) -> list[Any]:
    """The tensors that lie in a buffer of bytes."""
    views, start = [], 0
    for kind in kinds:
        view = None
        if kind is not None:
            shape, dtype = kind
            view = buffer[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
        views.append(view)
        start += _bytes(kind)
    return views
