"""scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, inside the package, nothing to
download.
"""

import torch
from lightning import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from training.data.stream import Stream
from training.randomness import generator
from training.validation import between, positive_integer


class Digits(LightningDataModule):
    """Images (B, 1, 8, 8) in [-1, 1] and labels (B,); every ``1 / held_out``-th image is kept from
    training.

    ``train`` and ``held_out`` are pairs (images, labels) of tensors.
    """

    shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, seed: int, batch_size: int = 64, held_out: float = 0.2) -> None:
        super().__init__()
        positive_integer("data.batch_size", batch_size)
        between("data.held_out", held_out, 0.01, 0.99)
        self.seed, self.batch_size = seed, batch_size
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, *self.shape) / 8 - 1
        # The split does not depend on the seed: accuracies of different seeds are comparable.
        order = torch.randperm(len(images), generator=generator(0, 0, 0, "held out"))
        kept, rest = order.tensor_split([round(held_out * len(images))])
        y = torch.tensor(labels, dtype=torch.int64)
        self.train, self.held_out = (images[rest], y[rest]), (images[kept], y[kept])

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        start, rank, world_size = 0, 0, 1
        if trainer is not None:  # on resuming, global_step is restored before this is called
            start = trainer.global_step * trainer.accumulate_grad_batches
            rank, world_size = trainer.global_rank, trainer.world_size
        n = len(self.train[0])
        order = Stream(n, self.batch_size, self.seed, start, rank, world_size)
        # Tensors are indexed by a whole batch at once: no collation of single images.
        return DataLoader(TensorDataset(*self.train), batch_size=None, sampler=order)
