"""Pictures of any size and mode as square tensors of bytes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.validation import one_of

MODES = {1: "L", 3: "RGB"}
RESIZES = ("crop", "pad")


def check_picture_options(image_size: int, channels: int, resize: str) -> None:
    one_of("data.resize", resize, RESIZES)
    if channels not in MODES:
        raise ValueError(f"data.channels must be 1 (grey) or 3 (colour); got {channels!r}")
    if image_size < 1:
        raise ValueError(f"data.image_size must be an integer >= 1; got {image_size!r}")


def to_bytes(
    picture: Image.Image, image_size: int, channels: int, resize: str = "crop"
) -> torch.Tensor:
    """(C, S, S) bytes. ``crop`` scales the shorter side to S and keeps the middle, by the steps of
    ADM and DiT (halve with a box filter, then bicubic); ``pad`` keeps the pixels and adds black.
    """
    picture = picture.convert(MODES[channels])
    if resize == "crop":
        while min(picture.size) >= 2 * image_size:
            half = (picture.width // 2, picture.height // 2)
            picture = picture.resize(half, Image.Resampling.BOX)
        if (shorter := min(picture.size)) != image_size:
            width, height = (round(side * image_size / shorter) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = ((side - image_size) // 2 for side in picture.size)
        picture = picture.crop((left, top, left + image_size, top + image_size))
    array = np.array(picture)
    pixels = torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1)
    return pad(pixels, image_size)


def pad(pixels: torch.Tensor, image_size: int) -> torch.Tensor:
    """(..., H, W) -> (..., S, S), black all around."""
    height, width = pixels.shape[-2:]
    if max(height, width) > image_size:
        raise ValueError(
            f"data.image_size must be at least {max(height, width)} for images of {height} x"
            f" {width} pixels, which are padded; got {image_size}"
        )
    top, left = (image_size - height) // 2, (image_size - width) // 2
    margins = (left, image_size - width - left, top, image_size - height - top)
    return torch.nn.functional.pad(pixels, margins)


def read_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.path: {path} is gone since the folder was read") from error
    except Exception as error:  # Pillow raises a dozen types for broken files
        raise ValueError(
            f"data.path: {path} is not a readable image ({error}); replace or remove it"
        ) from error
