"""What every data set is for the trainer: a source of examples for training, another held out.

A source reads examples by their numbers; the data module orders them, mirrors them, and hands them
to Lightning. Every random draw is keyed by the number of the batch, as everywhere.
"""

import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from training.context_parallel import data_place
from training.data.augment import augment
from training.data.infinite_sampler import Batch, InfiniteSampler
from training.randomness import Draws, generator
from training.validation import between, positive_integer, switch


class Source(Protocol):
    """Examples that are read when they are needed."""

    def __len__(self) -> int: ...

    def read(self, indices: list[int], draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n, C, H, W), bytes or floats in [-1, 1], and labels (n,)."""
        ...


class TensorSource:
    """A source in memory: images (n, C, H, W), bytes or floats, and labels (n,)."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: list[int], draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[indices], self.labels[indices]


class DataModule(LightningDataModule):
    """Batches of images (B, C, H, W), as floats in [-1, 1], and of labels (B,).

    Args:
        seed: of the order and of every draw.
        batch_size: of one process.
        train, val: the sources.
        shape: (C, H, W), H = W.
        num_classes: labels are 0 ... num_classes - 1; 1 is a data set without classes.
        num_workers: processes that read, at most as many as there are cores; 0 reads in the
            training process.
        flip: mirror every image with probability one half.
        augment: probability of each kind of EDM's augmentation (``data.augment``), 0 is none. What
            was done then comes with the labels, (B, 1 + n), for a network that is told.
        augment_turn: images are turned and put upside down too.
    """

    images = True  # of pixels: they can be looked at, and recognised by a classifier
    drawn = False  # from a distribution, without end
    chunk = 256

    def __init__(
        self,
        seed: int,
        batch_size: int,
        train: Source,
        val: Source,
        shape: tuple[int, int, int],
        num_classes: int,
        num_workers: int = 0,
        flip: bool = False,
        augment: float = 0.0,
        augment_turn: bool = False,
    ) -> None:
        super().__init__()
        between("data.augment", augment, 0, 1)
        switch("data.augment_turn", augment_turn)
        if augment and flip:
            raise ValueError(
                "data.flip must be false with data.augment, which mirrors images itself; got true"
            )
        positive_integer("data.batch_size", batch_size)
        if num_workers:
            positive_integer("data.num_workers", num_workers)
        switch("data.flip", flip)
        self.seed, self.batch_size, self.num_workers, self.flip = (
            seed,
            batch_size,
            num_workers,
            flip,
        )
        self.augment, self.augment_turn = augment, augment_turn
        self.sources = {"train": train, "val": val}
        self.shape, self.num_classes = shape, num_classes

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        start, rank, world_size = 0, 0, 1
        if trainer is not None:  # on resuming, global_step is restored before this is called
            start = trainer.global_step * trainer.accumulate_grad_batches
            rank, world_size = data_place(trainer)
        ours = getattr(os, "sched_getaffinity", None)  # not everywhere
        workers = min(self.num_workers, len(ours(0)) if ours else os.cpu_count() or 1)
        # A whole batch is read at once: no collation of single images.
        return DataLoader(
            _Reader(self, "train", self.seed, rank, self.flip, self.augment),
            batch_size=None,
            sampler=self.order(start, rank, world_size),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def order(self, start: int, rank: int, world_size: int) -> Sampler[Batch]:
        n = len(self.sources["train"])
        return InfiniteSampler(n, self.batch_size, self.seed, start, rank, world_size)

    def examples(self, split: str, n: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """n images and labels of ``train`` or ``val`` (all of them at most, if None), always
        the same. (n, C, H, W), (n,)
        """
        images, labels = zip(*self.parts(split, n), strict=True)
        return torch.cat(images), torch.cat(labels)

    def parts(
        self, split: str, n: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``examples`` in parts, read when they are asked for."""
        length = len(self.sources[split])
        order = torch.randperm(length, generator=generator(0, 0, 0, "examples"))[:n]
        for i, part in enumerate(order.split(self.chunk)):
            yield self.read(split, Batch(i, part.tolist()))

    def read(self, split: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The examples of these numbers, never mirrored. (n, C, H, W), (n,)"""
        return _Reader(self, split, seed=0, rank=0, flip=False)[batch]

    @property
    def description(self) -> dict[str, Any]:
        """What a trained network must know of the data set in order to be sampled from."""
        return {"shape": tuple(self.shape), "num_classes": self.num_classes, "latents": None}

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """What the network draws -> images in [-1, 1]; the identity but for latents."""
        return x


class _Reader(Dataset):
    """A source as PyTorch's loader sees it: one item is a whole batch."""

    def __init__(
        self, data: DataModule, split: str, seed: int, rank: int, flip: bool, augment: float = 0.0
    ) -> None:
        self.source, self.shape, self.num_classes = (
            data.sources[split],
            data.shape,
            data.num_classes,
        )
        self.seed, self.rank, self.flip = seed, rank, flip
        self.augment, self.turn = augment, data.augment_turn

    def __getitem__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        draws = Draws(self.seed, batch.number, self.rank)
        x, y = self.source.read(batch.indices, draws)
        if x.shape[1:] != self.shape:
            raise ValueError(f"data: images must be {self.shape}; got {tuple(x.shape[1:])}")
        if y.min() < 0 or y.max() >= self.num_classes:
            raise ValueError(
                f"data: labels must be 0 ... {self.num_classes - 1}; got {y.min()} ... {y.max()}"
            )
        if x.dtype == torch.uint8:
            x = x.float() / 127.5 - 1
        if self.flip:
            mirrored = torch.rand(len(x), generator=draws("flip")) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if self.augment:
            x, numbers = augment(x, self.augment, self.turn, draws("augment"))
            y = torch.cat([y[:, None].to(numbers), numbers], dim=1)
        return x, y


def split(n: int, val_fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the examples (train, val). It does not depend on the seed: the scores of
    different seeds are comparable.
    """
    between("data.val_fraction", val_fraction, 0, 0.99, open_low=True)
    order = torch.randperm(n, generator=generator(0, 0, 0, "held out"))
    kept, rest = order.tensor_split([max(1, round(val_fraction * n))])
    return rest, kept
