"""Distributions to draw from instead of data to read: every batch is new, nothing is stored.

gaussian         x ~ N(mean, std²), independent elements: u and v are known exactly
eight_gaussians  points on a circle, the toy on which one-step methods are seen to differ
blobs            smooth coloured spots, image-like, of any number of tokens: for speed and scale
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from training.data.infinite_sampler import Batch, SyntheticSampler
from training.data.module import DataModule
from training.randomness import Draws, generator
from training.validation import between, positive_integer

KEYS = {"train": "train", "val": "held_out"}  # of the draws of a split


class Synthetic(DataModule):
    """Examples drawn by ``draw``; a subclass sets what it needs before it calls this.

    ``examples`` draws too: its n is not limited, None means 2000.
    """

    images, drawn = False, True

    def __init__(
        self, seed: int, batch_size: int, shape: tuple[int, int, int], num_classes: int = 1
    ) -> None:
        sources: dict[str, Any] = {name: _Drawn(self) for name in ("train", "val")}
        super().__init__(seed, batch_size, **sources, shape=shape, num_classes=num_classes)

    def draw(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, C, H, W), (n,)"""
        raise NotImplementedError

    def order(self, start: int, rank: int, world_size: int) -> Sampler[Batch]:
        return SyntheticSampler(self.batch_size, start)

    def examples(self, split: str, n: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.draw(n or 2000, generator(0, 0, 0, KEYS[split]))

    def parts(
        self, split: str, n: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield self.examples(split, n)


class _Drawn:
    def __init__(self, data: Synthetic) -> None:
        self.data = data

    def __len__(self) -> int:
        raise TypeError("a synthetic data set has no length")

    def read(self, indices: list[int], draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data.draw(len(indices), draws("data"))


class Gaussian(Synthetic):
    """x ~ N(mean, std²) of (channels, image_size, image_size) independent elements."""

    def __init__(
        self,
        seed: int,
        batch_size: int = 256,
        channels: int = 1,
        image_size: int = 8,
        mean: float = 0.5,
        std: float = 0.5,
    ) -> None:
        positive_integer("data.channels", channels)
        positive_integer("data.image_size", image_size)
        between("data.mean", mean, -math.inf)
        between("data.std", std, 0, open_low=True)
        self.mean, self.std = mean, std
        super().__init__(seed, batch_size, (channels, image_size, image_size))

    def draw(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.mean + self.std * torch.randn(n, *self.shape, generator=generator)
        return x, torch.zeros(n, dtype=torch.int64)


class EightGaussians(Synthetic):
    """Points of the plane as images of two channels and one pixel, (B, 2, 1, 1)."""

    def __init__(
        self, seed: int, batch_size: int = 256, radius: float = 1.38, std: float = 0.1
    ) -> None:
        between("data.radius", radius, 0)
        between("data.std", std, 0)
        self.radius, self.std = radius, std
        super().__init__(seed, batch_size, (2, 1, 1))

    def draw(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        angle = torch.randint(8, (n,), generator=generator) * math.pi / 4
        centre = self.radius * torch.stack([angle.cos(), angle.sin()], 1)
        x = centre + self.std * torch.randn(n, 2, generator=generator)
        return x[:, :, None, None], torch.zeros(n, dtype=torch.int64)


class Blobs(Synthetic):
    """Three Gaussian spots at random places on a dark ground; the class sets their colour and size.

    Args:
        tokens, patch: the images have patch * sqrt(tokens) pixels a side: a model of this patch
            size sees this many tokens (a square number, 64 ... 4096 and beyond).
    """

    images = True
    spots = 3

    def __init__(
        self,
        seed: int,
        batch_size: int = 64,
        tokens: int = 256,
        patch: int = 2,
        channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        for key, value in (
            ("tokens", tokens),
            ("patch", patch),
            ("channels", channels),
            ("num_classes", num_classes),
        ):
            positive_integer(f"data.{key}", value)
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"data.tokens must be a square number (64, 256, ...); got {tokens}")
        side = patch * math.isqrt(tokens)
        super().__init__(seed, batch_size, (channels, side, side), num_classes)

    def draw(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        channels, side, _ = self.shape
        y = torch.randint(self.num_classes, (n,), generator=generator)
        centres = torch.rand(n, self.spots, 2, generator=generator)
        grid = (torch.arange(side) + 0.5) / side
        width = 0.06 + 0.12 * (y / self.num_classes)[:, None, None]
        rows, columns = (  # (n, spots, side)
            torch.exp(-(((grid - centres[..., i : i + 1]) / width) ** 2) / 2) for i in (0, 1)
        )
        light = torch.einsum("nsh,nsw->nhw", rows, columns).clamp(max=1)
        phase = 2 * math.pi * (y[:, None] / self.num_classes + torch.arange(channels) / channels)
        colour = 0.5 + 0.5 * torch.cos(phase)  # (n, C)
        return 2 * colour[:, :, None, None] * light[:, None] - 1, y
