"""Pictures of any size and mode as square tensors of bytes.

A picture counts as it is shown: turned as its EXIF data say, black to white whatever its bits are,
without its alpha channel. What cannot be shown with certainty is refused, never black or white.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from training.validation import one_of

MODES = {1: "L", 3: "RGB"}
RESIZES = ("crop", "pad")
SAMPLE_FORMAT = 339  # the tag of a TIFF file: 1 unsigned, 2 signed, 3 floats
# Formats that Pillow names and does not decode by itself, or that are no pictures of pixels.
NO_PICTURES = ("BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "PDF", "WMF")


def check_picture_options(image_size: int, channels: int, resize: str) -> None:
    one_of("data.resize", resize, RESIZES)
    if channels not in MODES:
        raise ValueError(f"data.channels must be 1 (grey) or 3 (colour); got {channels!r}")
    if image_size < 1:
        raise ValueError(f"data.image_size must be an integer >= 1; got {image_size!r}")


def is_picture(path: Path) -> bool:
    """Whether the name says so, and it is not hidden."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    readable = kind in Image.OPEN and kind not in NO_PICTURES
    return readable and not path.name.startswith(".")


def as_shown(picture: Image.Image) -> Image.Image:
    """Upright, and of 8 bits a channel.

    Integers of 16 and 32 bits are black at 0 and white at the largest value of their type, floats
    at 0 and 1. Raises ``ValueError`` where that leaves nothing to see, or a value beyond them.
    """
    mode, white = picture.mode, 2.0**16 - 1
    if mode == "F":
        white = 1.0
    elif mode == "I" and picture.format not in ("PNG", "PPM"):  # those have 16 bits at most
        signed = getattr(picture, "tag_v2", {}).get(SAMPLE_FORMAT, (1,))[0] == 2
        white = 2.0**31 - 1 if signed else 2.0**32 - 1
    with suppress(Exception):  # broken EXIF data turn nothing
        picture = ImageOps.exif_transpose(picture)
    if mode not in ("I", "F") and not mode.startswith("I;"):
        return picture
    values = np.asarray(picture).astype(np.float64)
    if white == 2.0**32 - 1:
        values = values % 2**32  # Pillow keeps them in signed numbers
    low, high = float(values.min()), float(values.max())
    shown = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    if not (low >= 0 and high <= white) or (high > 0 and not shown.any()):
        raise ValueError(
            f"its values are {low:g} to {high:g}, where black is 0 and white {white:g}; save it"
            " with 8 or 16 bits"
        )
    return Image.fromarray(shown)


def to_bytes(
    picture: Image.Image, image_size: int, channels: int, resize: str = "crop"
) -> torch.Tensor:
    """(C, S, S) bytes. ``crop`` scales the shorter side to S and keeps the middle, by the steps of
    ADM and DiT (halve with a box filter, then bicubic); ``pad`` keeps the pixels and adds black.
    """
    picture = as_shown(picture)
    try:
        picture = picture.convert(MODES[channels])
    except ValueError:  # PA, RGBa and their like go by way of another mode
        picture = picture.convert("RGBA").convert(MODES[channels])
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
            return as_shown(picture)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data.path: {path} is gone since the folder was read") from error
    except Exception as error:  # Pillow raises a dozen types for broken files
        raise ValueError(
            f"data.path: {path} is not a readable image ({error}); replace or remove it"
        ) from error
