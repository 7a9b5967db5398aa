"""MNIST and what is shaped like it, from the four IDX files as they are distributed, or by name.

An IDX file: two zero bytes, the type (8: bytes), the number of dimensions, each of them as a big
endian 32-bit integer, then the values.
"""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch

from training.data.hugging_face import Examples, load_split
from training.data.module import DataModule, TensorSource
from training.data.pictures import pad
from training.randomness import Draws

NAMES = {"train": "train", "val": "t10k"}


class Idx(DataModule):
    """10 classes of grey images, 28 x 28 padded with black to ``image_size``. (B, 1, 32, 32)

    Args:
        path: folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of
            ``t10k``, each also with ``.gz``. None: by ``name`` from the Hugging Face hub or its
            local cache.
        name: of the data set on the hub.
    """

    def __init__(
        self,
        seed: int,
        name: str,
        path: str | None = None,
        batch_size: int = 128,
        image_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        sources = {}
        for split, prefix in NAMES.items():
            if path is not None:
                images, labels = read_pair(Path(path), prefix)
            else:
                hub_split = "train" if split == "train" else "test"
                dataset = load_split(name, None, hub_split)
                examples = Examples(dataset, "image", "label", 28, 1, "pad")
                images, labels = examples.read(list(range(len(examples))), Draws(0))
                images = images[:, 0]
            sources[split] = TensorSource(pad(images, image_size)[:, None], labels)
        shape = (1, image_size, image_size)
        super().__init__(
            seed, batch_size, **sources, shape=shape, num_classes=10, num_workers=num_workers
        )


def read_pair(folder: Path, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, H, W) and labels (n,) of one split."""
    images = read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1).long()
    if len(images) != len(labels):
        raise ValueError(
            f"data.path: {folder} has {len(images)} {prefix} images and {len(labels)} labels;"
            " the files do not belong together"
        )
    return images, labels


def read_idx(folder: Path, name: str, dimensions: int) -> torch.Tensor:
    """The bytes of an IDX file, gzipped or not, in its shape."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"data.path: there is no {name} and no {name}.gz in {folder}; give the folder of the"
            " four IDX files"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        head = 4 + 4 * dimensions
        zeros, kind, found = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4:head])
        if (zeros, kind, found) != (0, 8, dimensions):
            raise ValueError(f"its head is {content[:4].hex()}")
        values = np.frombuffer(content, np.uint8, offset=head).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise ValueError(
            f"data.path: {path} is not a whole IDX file of {dimensions} dimensions ({error})"
        ) from error
    return torch.from_numpy(values.copy())
