"""A folder of images, one subfolder a class."""

from pathlib import Path
from typing import Any

import torch

from training.data.module import DataModule, split
from training.data.pictures import check_picture_options, is_picture, read_picture, to_bytes
from training.randomness import Draws


class ImageFolder(DataModule):
    """Images under ``path/CLASS/``, classes in alphabetical order; images directly in ``path`` (and
    in no subfolder) are a data set without classes. Hidden files and folders are left out.

    Args:
        val_fraction: share kept from training.
        image_size, channels, resize: see ``pictures.to_bytes``.
    """

    def __init__(
        self,
        seed: int,
        path: str,
        val_fraction: float = 0.1,
        image_size: int = 32,
        channels: int = 3,
        resize: str = "crop",
        batch_size: int = 128,
        num_workers: int = 0,
        flip: bool = False,
    ) -> None:
        check_picture_options(image_size, channels, resize)
        files, labels, num_classes = find_images(Path(path))
        if len(files) < 2:
            raise ValueError(f"data.path: {path} needs at least 2 images; there is {len(files)}")
        sources: dict[str, Any] = {
            key: Files([files[i] for i in part], labels[part], image_size, channels, resize)
            for key, part in zip(("train", "val"), split(len(files), val_fraction), strict=True)
        }
        sizes = {"shape": (channels, image_size, image_size), "num_classes": num_classes}
        options: dict[str, Any] = {**sizes, "num_workers": num_workers, "flip": flip}
        super().__init__(seed, batch_size, **sources, **options)


class Files:
    """A source over image files, decoded when they are read."""

    def __init__(
        self, files: list[Path], labels: torch.Tensor, image_size: int, channels: int, resize: str
    ) -> None:
        self.files, self.labels, self.options = files, labels, (image_size, channels, resize)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: list[int], draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        images = [to_bytes(read_picture(self.files[i]), *self.options) for i in indices]
        return torch.stack(images), self.labels[indices]


def find_images(folder: Path) -> tuple[list[Path], torch.Tensor, int]:
    """Files, their labels (n,) and the number of classes."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path: there is no directory {folder}")
    loose = [path for path in sorted(folder.iterdir()) if path.is_file() and is_picture(path)]
    found = {d: _pictures(d) for d in sorted(folder.iterdir()) if d.is_dir() and not _hidden(d)}
    if loose and (classes := [d for d, pictures in found.items() if pictures]):
        raise ValueError(
            f"data.path: {folder} has {len(loose)} pictures (as {loose[0].name}) beside the folder"
            f" {classes[0].name} of a class; move them into a class's folder, or away"
        )
    if loose or not found:
        found = {folder: loose}
    for directory, pictures in found.items():
        if not pictures:
            raise ValueError(f"data.path: there is no image in {directory}")
    files = [path for pictures in found.values() for path in pictures]
    labels = [i for i, pictures in enumerate(found.values()) for _ in pictures]
    return files, torch.tensor(labels), len(found)


def _pictures(folder: Path) -> list[Path]:
    inside = (p for p in folder.rglob("*") if not any(map(_hidden, p.relative_to(folder).parents)))
    return sorted(p for p in inside if is_picture(p))


def _hidden(folder: Path) -> bool:
    """What tools and systems leave behind: .ipynb_checkpoints, .git, __MACOSX, __pycache__."""
    return folder.name.startswith((".", "__"))
