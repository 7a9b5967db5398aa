"""Checkpoints that are written beside the training: the step waits for a copy to the host alone.

    io = BackgroundCheckpointIO()
    io.reserve(checkpoint)                  memory for such a one, before the first is saved
    io.save_checkpoint(checkpoint, path)    returns once the copies are under way
    io.check()                              raises what went wrong with a write that has ended
    io.finish()                             until the file is whole

Weights, moments and averages of DiT-B/2 are 2.1 GB. Their checksum and the disk kept a run
standing for 3 s, every 500 steps of 46 ms (H100). Page-locked memory for all of it takes 2.4 s to
make, but for one storage less time than a step. It is kept for the next checkpoint, in blocks of
PyTorch's allocator: up to twice the file. The file before stays whole until this one is.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from training.checkpoints import AtomicCheckpointIO
from training.sharded_checkpoints import mapped


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """One task at a time, in a thread of its own."""

    def __init__(self) -> None:
        self.host: list[torch.Tensor] = []  # bytes of storages
        self.pending: Future[None] | None = None
        self.threads: ThreadPoolExecutor | None = None

    def reserve(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for a checkpoint of tensors on a GPU, if there is none yet. What it finds no
        memory for is asked for again when the checkpoint is saved.
        """
        kinds = [(x.nbytes, x.is_cuda) for x in storages(checkpoint)]
        if self.host or self.pending or not any(on_gpu for _, on_gpu in kinds):
            return

        def make() -> None:
            with suppress(RuntimeError):
                for kind in kinds:
                    self.host.append(_room(*kind))

        self._begin(make)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        self.finish()  # the memory on the host is free again
        free: dict[int, list[torch.Tensor]] = {}
        for room in self.host:
            free.setdefault(room.nbytes, []).append(room)
        found = storages(checkpoint)
        self.host = [
            free[x.nbytes].pop(0) if free.get(x.nbytes) else _room(x.nbytes, x.is_cuda)
            for x in found
        ]
        copies = {
            (x.data_ptr(), x.nbytes): room.copy_(x, non_blocking=x.is_cuda)
            for x, room in zip(found, self.host, strict=True)
        }
        copied = with_storages(checkpoint, copies)
        on_gpu = any(x.is_cuda for x in found)
        ready = torch.cuda.current_stream().record_event() if on_gpu else None

        def write() -> None:
            if ready is not None:
                ready.synchronize()
            AtomicCheckpointIO.save_checkpoint(self, copied, path, storage_options)

        self._begin(write)

    def _begin(self, task: Callable[[], None]) -> None:
        if self.threads is None:
            self.threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending = self.threads.submit(task)

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


def storages(checkpoint: Any) -> list[torch.Tensor]:
    """The bytes of every storage under the tensors of a checkpoint, each once, on its device."""
    found: dict[tuple[int, int], torch.Tensor] = {}

    def find(_: Any, x: Any) -> None:
        if isinstance(x, torch.Tensor) and (key := _key(x))[1] and key not in found:
            empty = torch.empty(0, dtype=torch.uint8, device=x.device)
            found[key] = empty.set_(x.detach().untyped_storage())

    mapped(find, checkpoint)
    return list(found.values())


def with_storages(checkpoint: Any, copies: dict[tuple[int, int], torch.Tensor]) -> Any:
    """A checkpoint whose tensors lie in copies of their storages, which are whole, as
    ``torch.save`` writes them: tensors that share one still do, with their strides.
    """

    def moved(_: Any, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if (room := copies.get(_key(x))) is None:  # an empty one
            return torch.empty_like(x, device="cpu")
        at = (room.untyped_storage(), x.storage_offset(), x.shape, x.stride())
        return torch.empty(0, dtype=x.dtype).set_(*at)

    return mapped(moved, checkpoint)


def _key(x: torch.Tensor) -> tuple[int, int]:
    """Of a storage: two may begin at one address, as parts of an array do."""
    storage = x.detach().untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _room(size: int, pinned: bool) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:  # so much memory cannot be page-locked; the copy is slower
        if not pinned:
            raise
        return torch.empty(size, dtype=torch.uint8)
