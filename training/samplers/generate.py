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

    The noise is drawn on the CPU, so that every device starts from the same.
    """
    device = next(net.parameters()).device
    noise = torch.randn(len(y), *shape, generator=generator(seed, 0, 0, "samples"))
    was_training = net.training
    net.eval()
    images = [
        sampler(net, e.to(device), labels.to(device)).float().cpu()
        for e, labels in zip(noise.split(chunk), y.split(chunk), strict=True)
    ]
    net.train(was_training)
    return torch.cat(images)


def balanced_labels(n: int, num_classes: int) -> torch.Tensor:
    """0, 1, ..., num_classes - 1, 0, 1, ...: as many of each class as can be. (n,)"""
    return torch.arange(n) % num_classes
