"""Small pictures in one file, which ``scripts/pack_pictures.py`` wrote; all of them in memory.

An .npz of ``images`` (n, C, S, S) and ``held_out`` (n,) of bytes and booleans, ``labels`` (n,) of
int64, ``classes`` (k,) of names, and ``about``, a JSON text that says what was packed and how.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.module import DataModule, TensorSource

KINDS = {"images": "u", "labels": "i", "held_out": "b", "classes": "U", "about": "U"}


class Packed(DataModule):
    """Pictures (B, C, S, S) of the file ``path``, which also says which of them are held out.

    ``classes`` are the names of the labels, ``about`` is what the file says of itself.
    """

    def __init__(
        self,
        seed: int,
        path: str,
        batch_size: int = 64,
        num_workers: int = 0,
        flip: bool = False,
    ) -> None:
        arrays = read_pack(Path(path))
        images, labels, held_out = (
            torch.from_numpy(arrays[key]) for key in ("images", "labels", "held_out")
        )
        self.classes: list[str] = arrays["classes"].tolist()
        self.about: dict[str, Any] = json.loads(str(arrays["about"]))
        sources: dict[str, Any] = {
            "train": TensorSource(images[~held_out], labels[~held_out]),
            "val": TensorSource(images[held_out], labels[held_out]),
        }
        shape: Any = tuple(images.shape[1:])
        sizes = {"shape": shape, "num_classes": len(self.classes)}
        options: dict[str, Any] = {**sizes, "num_workers": num_workers, "flip": flip}
        super().__init__(seed, batch_size, **sources, **options)


def write_pack(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    classes: list[str],
    about: dict[str, Any],
) -> None:
    """The same arrays always give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # a file: numpy would add .npz to a path without it
        np.savez_compressed(
            file,
            images=images.astype(np.uint8),
            labels=labels.astype(np.int64),
            held_out=held_out.astype(bool),
            classes=np.array(classes),
            about=np.array(json.dumps(about)),
        )


def read_pack(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, checked against each other; nothing in it is executed."""
    if not path.is_file():
        raise FileNotFoundError(
            f"data.path: there is no file {path}; scripts/pack_pictures.py writes one"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in KINDS}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"data.path: {path} is no pack of pictures ({error}); write it with"
            " scripts/pack_pictures.py"
        ) from error
    for key, kind in KINDS.items():
        if arrays[key].dtype.kind != kind:
            raise ValueError(
                f"data.path: {key} in {path} must be of kind {kind!r}; it is {arrays[key].dtype}"
            )
    images, labels, held_out = (arrays[key] for key in ("images", "labels", "held_out"))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"data.path: images in {path} must be bytes (n, C, S, S); they are {images.dtype}"
            f" {images.shape}"
        )
    if not labels.shape == held_out.shape == images.shape[:1]:
        raise ValueError(
            f"data.path: {path} has {len(images)} images, {labels.shape} labels and"
            f" {held_out.shape} marks of held-out ones; they must be as many"
        )
    if held_out.all() or not held_out.any():
        raise ValueError(f"data.path: {path} must hold out some images, and not all of them")
    return arrays | {"labels": labels.astype(np.int64)}
