"""Image data sets of the Hugging Face hub by name, from its cache, or from a local directory."""

from pathlib import Path
from typing import Any

import torch

from training.data.module import DataModule, TensorSource, split
from training.data.pictures import check_picture_options, to_bytes
from training.randomness import Draws


class HuggingFace(DataModule):
    """A data set with a column of images and one of class labels.

    Args:
        name: on the hub, with ``subset`` where it has several; also offline, once it is cached.
        path: instead of the name, a local directory: what ``save_to_disk`` wrote, or Parquet files,
            or folders of images.
        train_split, val_split: names of the splits. Without a second one (None), the share
            ``val_fraction`` of the first is held out.
        image_column, label_column: their names; None for the labels means no classes. Labels are
            whole numbers, or words, whose classes are those of the first split by the alphabet.
        image_size, channels, resize: see ``pictures.to_bytes``.
        in_memory: decode all images at the start; for small data sets.
    """

    def __init__(
        self,
        seed: int,
        name: str | None = None,
        subset: str | None = None,
        path: str | None = None,
        train_split: str = "train",
        val_split: str | None = "test",
        val_fraction: float = 0.1,
        image_column: str = "image",
        label_column: str | None = "label",
        image_size: int = 32,
        channels: int = 3,
        resize: str = "crop",
        in_memory: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        flip: bool = False,
        augment: float = 0.0,
        augment_turn: bool = False,
    ) -> None:
        check_picture_options(image_size, channels, resize)
        if (name is None) == (path is None):
            raise ValueError(
                "data=hugging_face needs either data.name=NAME (of the hub) or data.path=DIRECTORY"
            )
        dataset = load_split(name, subset, train_split, path)
        check_columns(dataset, image_column, label_column)
        num_classes, words = classes_of(dataset, label_column)
        if val_split is None:
            rest, kept = split(len(dataset), val_fraction)
            datasets = {"train": dataset.select(rest), "val": dataset.select(kept)}
        else:
            other = load_split(name, subset, val_split, path, "val_split")
            check_columns(other, image_column, label_column)
            datasets = {"train": dataset, "val": other}
        columns = (image_column, label_column, image_size, channels, resize, words)
        sources: dict[str, Any] = {key: Examples(d, *columns) for key, d in datasets.items()}
        if in_memory:
            sources = {key: source.decoded() for key, source in sources.items()}
        sizes = {"shape": (channels, image_size, image_size), "num_classes": num_classes}
        options: dict[str, Any] = {**sizes, "num_workers": num_workers, "flip": flip}
        options |= {"augment": augment, "augment_turn": augment_turn}
        super().__init__(seed, batch_size, **sources, **options)


class Examples:
    """A source over a split of a ``datasets.Dataset``; images are decoded when they are read."""

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        label_column: str | None,
        image_size: int,
        channels: int,
        resize: str,
        words: dict[Any, int] | None = None,
    ) -> None:
        self.dataset, self.image_column, self.label_column = dataset, image_column, label_column
        self.words = words  # label -> its number, where it is none itself
        self.options = (image_size, channels, resize)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: list[int], draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            rows = self.dataset[indices]
        except Exception as error:  # whatever the decoder of the format raises
            raise ValueError(
                f"data: an image among rows {min(indices)} ... {max(indices)} of the data set"
                f" cannot be read ({error})"
            ) from error
        pairs = list(zip(indices, rows[self.image_column], strict=True))
        images = torch.stack([self._image(row, image) for row, image in pairs])
        if self.label_column is None:
            return images, torch.zeros(len(indices), dtype=torch.int64)
        labels = zip(indices, rows[self.label_column], strict=True)
        return images, torch.tensor([self._label(row, label) for row, label in labels])

    def _image(self, row: int, image: Any) -> torch.Tensor:
        if image is None:
            raise ValueError(
                f"data: row {row} of the data set has no picture in {self.image_column!r}; leave"
                " such rows out"
            )
        try:
            return to_bytes(image, *self.options)
        except ValueError as error:
            raise ValueError(f"data: row {row} of the data set: {error}") from error

    def _label(self, row: int, label: Any) -> int:
        if label is None or (self.words is not None and label not in self.words):
            known = "" if label is None else ", which the training split has not"
            raise ValueError(
                f"data: row {row} of the data set has the label {label!r}{known}; leave such rows"
                " out, or train without classes with data.label_column=null"
            )
        return int(label) if self.words is None else self.words[label]

    def decoded(self) -> TensorSource:
        return TensorSource(*self.read(list(range(len(self))), Draws(0)))


def load_split(
    name: str | None,
    subset: str | None,
    split: str,
    path: str | None = None,
    key: str = "train_split",
) -> Any:
    """One split as a ``datasets.Dataset``; ``key`` is the option that names it."""
    import datasets  # takes a second to import, and digits need none of it

    if path is not None and not Path(path).is_dir():
        raise FileNotFoundError(f"data.path: there is no directory {path}")
    saved = path is not None and any(
        (Path(path) / file).is_file() for file in ("dataset_dict.json", "state.json")
    )
    try:
        if not saved:
            return datasets.load_dataset(name or str(path), subset, split=split)
        whole = datasets.load_from_disk(str(path))
        return whole[split] if isinstance(whole, datasets.DatasetDict) else whole
    except Exception as error:  # of the network, the hub, the format: the reason is in the text
        what = f"data.path={path}" if name is None else f"data.name={name}"
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "without a network, give a local copy with data.path=DIRECTORY"
        if key == "val_split":  # the other one was loaded
            remedy = "where there is none, data.val_split=null keeps a share of the other one"
        raise ValueError(
            f"{what}: data.{key}: the split {split!r} cannot be loaded: {reason}; {remedy}"
        ) from error


def check_columns(dataset: Any, image_column: str, label_column: str | None) -> None:
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"data.{key} must be one of the columns {', '.join(dataset.column_names)}; got"
                f" {column!r}"
            )
    kind = type(dataset.features[image_column]).__name__
    if kind != "Image":
        raise ValueError(
            f"data.image_column must be a column of pictures; {image_column!r} is of the kind"
            f" {getattr(dataset.features[image_column], 'dtype', kind)}; cast it with"
            " datasets.Image(), or name another one"
        )


def classes_of(dataset: Any, label_column: str | None) -> tuple[int, dict[Any, int] | None]:
    """How many there are, and the number of each label that is none itself."""
    if label_column is None:
        return 1, None
    names = getattr(dataset.features[label_column], "names", None)
    if names:
        return len(names), None
    labels = list(dataset.with_format(None).select_columns([label_column])[label_column])
    words = [label for label in labels if isinstance(label, str)]
    if words and len(words) == len(labels):
        return len(set(words)), {label: i for i, label in enumerate(sorted(set(words)))}
    wrong = [label for label in labels if not isinstance(label, str) and not _whole(label)]
    if wrong or words or not labels:
        raise ValueError(
            f"data.label_column={label_column}: labels must be whole numbers >= 0, or all be words;"
            f" got {[*wrong, *words, None][0]!r}; data.label_column=null trains without classes"
        )
    return 1 + int(max(labels)), None


def _whole(label: Any) -> bool:
    return isinstance(label, int | float) and float(label).is_integer() and label >= 0
