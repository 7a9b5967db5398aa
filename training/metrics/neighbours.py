"""Improved precision and recall (arXiv 1904.06991): the share of samples that are where
data is, and of data that are where samples are.
"""

import torch

CHUNK = 2048


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fake features within the real manifold, and of real ones within the fake manifold.

    real: (n, d), fake: (m, d). A manifold is the union of balls around its points, each as large as
    the distance to the k-th nearest other point.
    """
    for n in (len(real), len(fake)):
        if n <= k:
            raise ValueError(f"k must be smaller than the number of samples, {n}; got {k}")
    return _covered(real, fake, k), _covered(fake, real, k)


def _covered(centres: torch.Tensor, points: torch.Tensor, k: int) -> float:
    # The nearest of all is the point itself, at distance 0.
    radii = torch.cat(
        [
            torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist")
            .kthvalue(k + 1)
            .values
            for part in centres.split(CHUNK)
        ]
    )
    inside = [
        (torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist") <= radii).any(1)
        for part in points.split(CHUNK)
    ]
    return float(torch.cat(inside).double().mean())
