"""scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, inside the package, nothing to
download.
"""

import torch
from sklearn.datasets import load_digits

from training.data.module import DataModule, TensorSource, split


class Digits(DataModule):
    """Images (B, 1, 8, 8) in [-1, 1] and labels (B,); the share ``val_fraction`` of the images is
    kept from training.

    ``train`` and ``val`` are pairs (images, labels) of tensors.
    """

    def __init__(self, seed: int, batch_size: int = 64, val_fraction: float = 0.2) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        y = torch.tensor(labels, dtype=torch.int64)
        rest, kept = split(len(y), val_fraction)
        self.train, self.val = (images[rest], y[rest]), (images[kept], y[kept])
        super().__init__(
            seed, batch_size, TensorSource(*self.train), TensorSource(*self.val), (1, 8, 8), 10
        )
