"""Fréchet distance of two sets of features, each taken for a Gaussian.

Over the features of the Inception network that everybody uses it is called FID; over any other
network's it is not.
"""

import torch


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) for features (n, d) and (m, d), in float64."""
    for n, d in (a.shape, b.shape):
        if n <= d:
            raise ValueError(
                f"n must be at least {d + 1}, for a covariance of {d} features, and no fewer images"
                f" may be held out; got {n}"
            )
    a, b = a.double(), b.double()
    covariances = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of Σ_a Σ_b are real and >= 0: those of Σ_a^½ Σ_b Σ_a^½.
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * root)
