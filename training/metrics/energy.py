"""Energy distance, for data of few dimensions: no network's features are needed."""

import torch


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| over samples (n, ...) and (m, ...): 0 where the
    distributions are equal, in expectation; the estimate is unbiased (no pair of one with itself).
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()

    def within(x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))
