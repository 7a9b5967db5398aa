"""Checkpoints that are written beside the training: the step waits for a copy to the host alone.

    io = BackgroundCheckpointIO()
    io.save_checkpoint(checkpoint, path)    returns once the copies are under way
    io.check()                              raises what went wrong with a write that has ended
    io.finish()                             until the file is whole

Weights, moments and averages of DiT-B/2 are 2.1 GB. Their checksum and the disk kept a run
standing for 3 s, every 500 steps of 46 ms (H100). Memory on the host is kept for the next
checkpoint, page-locked in blocks of PyTorch's allocator: up to twice the file. The file before
stays whole until this one is.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from training.checkpoints import AtomicCheckpointIO


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """One write at a time, in a thread of its own."""

    def __init__(self) -> None:
        self.host: list[torch.Tensor] = []  # bytes of storages, in the order of the last checkpoint
        self.pending: Future[None] | None = None
        self.threads: ThreadPoolExecutor | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        self.finish()  # the memory on the host is free again
        copies = Copies(self.host)
        copied = copies(checkpoint)
        self.host = copies.used
        ready = torch.cuda.current_stream().record_event() if copies.under_way else None

        def write() -> None:
            if ready is not None:
                ready.synchronize()
            AtomicCheckpointIO.save_checkpoint(self, copied, path, storage_options)

        if self.threads is None:
            self.threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending = self.threads.submit(write)

    def check(self) -> None:
        """Raises what went wrong, where the write has ended."""
        if self.pending is not None and self.pending.done():
            self.finish()

    def finish(self) -> None:
        """Until the file that was saved last is whole; raises what went wrong with it."""
        if self.pending is None:
            return
        try:
            self.pending.result()
        finally:
            if self.pending.done():  # or an interrupt ended the wait
                self.pending = None

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            if self.threads is not None:
                self.threads.shutdown()
            self.threads = None
            self.host = []


class Copies:
    """Of a checkpoint, on the host. Storages are copied whole, each once, as ``torch.save`` writes
    them: tensors that share one still do, with their strides. Copies run in the order of the
    training's kernels, so what these write next is not in them.
    """

    def __init__(self, host: list[torch.Tensor]) -> None:
        self.host, self.used = iter(host), []
        self.found: dict[int, torch.Tensor] = {}
        self.under_way = False

    def __call__(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            storage = self._bytes(x).untyped_storage()
            copy = torch.empty(0, dtype=x.dtype)
            return copy.set_(storage, x.storage_offset(), x.shape, x.stride())
        if isinstance(x, dict):
            copy = type(x)()
            copy.update((key, self(value)) for key, value in x.items())
            vars_of = getattr(x, "__dict__", None)  # a state_dict's _metadata
            if vars_of:
                copy.__dict__.update(self(vars_of))
            return copy
        if type(x) in (list, tuple):
            return type(x)(map(self, x))
        return x

    def _bytes(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.detach().untyped_storage()
        if (copy := self.found.get(storage.data_ptr())) is None or not storage.nbytes():
            source = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
            room = next(self.host, None)
            if room is None or room.shape != source.shape:
                room = _room(len(source), x.is_cuda)
            copy = room.copy_(source, non_blocking=x.is_cuda)
            self.under_way |= x.is_cuda
            self.found[storage.data_ptr()] = copy
            self.used.append(copy)
        return copy


def _room(size: int, pinned: bool) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:  # so much memory cannot be page-locked; the copy is slower
        if not pinned:
            raise
        return torch.empty(size, dtype=torch.uint8)
