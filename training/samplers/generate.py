"""Images of given labels from a network and a sampler."""

from collections.abc import Callable

import torch
from torch import nn

from training.randomness import generator


@torch.no_grad()
def generate(
    net: nn.Module,
    sampler: Callable[..., torch.Tensor],
    y: torch.Tensor,
    shape: tuple[int, int, int],
    seed: int,
    chunk: int = 256,
) -> torch.Tensor:
    """One image of ``shape`` (C, H, W) for each label of y (n,), on the CPU. (n, C, H, W)

    Noise is drawn on the CPU, so that every device starts from the same; a sampler that adds noise
    again says in ``noises`` how often.
    """
    weight = next(net.parameters())
    noises = [
        torch.randn(len(y), *shape, generator=generator(seed, i, 0, "samples"))
        for i in range(1 + getattr(sampler, "noises", 0))
    ]
    was_training = net.training
    net.eval()
    images = []
    for labels, *e in zip(y.split(chunk), *(noise.split(chunk) for noise in noises), strict=True):
        first, *more = (part.to(weight) for part in e)
        images.append(sampler(net, first, labels.to(weight.device), *more).float().cpu())
    net.train(was_training)
    return torch.cat(images)


def balanced_labels(n: int, num_classes: int) -> torch.Tensor:
    """0, 1, ..., num_classes - 1, 0, 1, ...: as many of each class as can be. (n,)"""
    return torch.arange(n) % num_classes
