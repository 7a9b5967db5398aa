"""Fréchet distance of two sets of features, each taken for a Gaussian.

Over the features of the Inception network that everybody uses it is called FID
(``metrics.inception``); over any other network's it is not.
"""

from typing import NamedTuple

import torch


class Gaussian(NamedTuple):
    mean: torch.Tensor  # (d,), float64
    covariance: torch.Tensor  # (d, d), float64


class Moments:
    """Mean and covariance of a stream of features, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.sum = self.products = self.origin = torch.zeros(())

    def add(self, features: torch.Tensor) -> None:
        """(m, d)"""
        features = features.double()
        if not self.n:  # sums of what is left of the first mean do not cancel
            self.origin = features.mean(0)
        features = features - self.origin
        self.n += len(features)
        self.sum = self.sum + features.sum(0)
        self.products = self.products + features.T @ features

    def gaussian(self) -> Gaussian:
        mean = self.sum / self.n
        if self.n <= len(mean):
            raise ValueError(
                f"n must be at least {len(mean) + 1}, for a covariance of {len(mean)} features, and"
                f" no fewer images may be held out; got {self.n}"
            )
        covariance = (self.products - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return Gaussian(self.origin + mean, covariance)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of features (n, d) and (m, d)."""
    gaussians = []
    for features in (a, b):
        moments = Moments()
        moments.add(features)
        gaussians.append(moments.gaussian())
    return gaussian_distance(*gaussians)


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), in float64."""
    # The eigenvalues of Σ_a Σ_b are those of Σ_a^½ Σ_b Σ_a^½, which is symmetric and >= 0.
    values, vectors = torch.linalg.eigh(a.covariance)
    half = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    root = torch.linalg.eigvalsh(half @ b.covariance @ half).clamp(min=0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * root)
