"""Endless, resumable orders of batches: batch k is a function of (seed, k) alone."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from training.randomness import generator


class Batch(NamedTuple):
    number: int  # of the batch since the start of the run, the step of its draws
    indices: list[int]  # of its examples


class InfiniteSampler(Sampler[Batch]):
    """The batches of one rank, from batch number ``start`` on, forever.

    Epoch after epoch the n examples are shuffled by a generator keyed by (seed, epoch); the ranks
    share the shuffle and take turns. A last incomplete batch of an epoch is dropped.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.batches_per_epoch = n // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"data.batch_size must be at most {n // world_size}, the number of training images "
                f"for each of {world_size} process(es); got {batch_size}"
            )
        self.n, self.batch_size, self.seed, self.start = n, batch_size, seed, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        number = self.start
        while True:
            epoch, position = divmod(number, self.batches_per_epoch)
            order = torch.randperm(self.n, generator=generator(self.seed, epoch, 0, "shuffle"))
            for batch in range(position, self.batches_per_epoch):
                first = (batch * self.world_size + self.rank) * self.batch_size
                indices = order[first : first + self.batch_size].tolist()
                yield Batch(epoch * self.batches_per_epoch + batch, indices)
            number = (epoch + 1) * self.batches_per_epoch


class SyntheticSampler(Sampler[Batch]):
    """Batches of examples that are drawn, not read: their numbers mean nothing, no epoch ends."""

    def __init__(self, batch_size: int, start: int = 0) -> None:
        self.batch_size, self.start = batch_size, start

    def __iter__(self) -> Iterator[Batch]:
        number = self.start
        while True:
            yield Batch(number, list(range(self.batch_size)))
            number += 1
