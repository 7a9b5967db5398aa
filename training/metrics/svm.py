"""Class accuracy of generated digits under a support vector machine trained on real ones."""

import torch
from sklearn.svm import SVC


class SVM:
    """RBF support vector machine on real images (n, C, H, W) in [-1, 1] and labels (n,)."""

    def __init__(self, images: torch.Tensor, y: torch.Tensor) -> None:
        self.machine = SVC(gamma="scale", C=10.0).fit(images.flatten(1).numpy(), y.numpy())

    def accuracy(self, images: torch.Tensor, y: torch.Tensor) -> float:
        """Share of images (clipped to [-1, 1]) recognised as their label."""
        return float(self.machine.score(images.clamp(-1, 1).flatten(1).numpy(), y.numpy()))
