"""Images of given labels from a network and a sampler."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.compiler import set_stance

from training.context_parallel import whole_sequences
from training.randomness import generator


def generate(
    net: nn.Module,
    sampler: Callable[..., torch.Tensor],
    y: torch.Tensor,
    shape: tuple[int, int, int],
    seed: int,
    chunk: int = 256,
) -> torch.Tensor:
    """One image of ``shape`` (C, H, W) for each label of y (n,), on the CPU. (n, C, H, W)"""
    return torch.cat([images for images, _ in stream(net, sampler, y, shape, seed, chunk)])


def stream(
    net: nn.Module,
    sampler: Callable[..., torch.Tensor],
    y: torch.Tensor,
    shape: tuple[int, int, int],
    seed: int,
    chunk: int = 256,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same in parts of images and labels, drawn when they are asked for.

    Noise is drawn on the CPU, so that every device starts from the same; a sampler that adds noise
    again says in ``noises`` how often. PyTorch draws normal numbers in blocks of 16: parts are
    multiples of that, and what is drawn does not depend on them.
    """
    weight = next(net.parameters())
    count = 1 + getattr(sampler, "noises", 0)
    generators = [generator(seed, i, 0, "samples") for i in range(count)]
    for labels in y.split(chunk + -chunk % 16):
        noises = [torch.randn(len(labels), *shape, generator=g) for g in generators]
        was_training = net.training
        net.eval()
        # Samples have another batch size than the steps that the network was compiled for.
        with torch.no_grad(), whole_sequences(net), set_stance("force_eager"):
            first, *more = (noise.to(weight.device, weight.dtype) for noise in noises)
            images = sampler(net, first, labels.to(weight.device), *more).float().cpu()
        net.train(was_training)
        yield images, labels


def balanced_labels(n: int, num_classes: int) -> torch.Tensor:
    """0, 1, ..., num_classes - 1, 0, 1, ...: as many of each class as can be. (n,)"""
    return torch.arange(n) % num_classes
