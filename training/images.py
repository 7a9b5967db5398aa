"""PNG files of image grids, with nothing but the standard library."""

import math
import os
import struct
import zlib
from pathlib import Path

import torch


def grid(images: torch.Tensor, columns: int | None = None, side: int = 512) -> torch.Tensor:
    """Images (n, C, H, W) in [-1, 1] as one picture (H', W', C) of bytes, about ``side`` pixels
    wide.

    One or three channels are shown as they are; of any other number, the first one.
    """
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    if channels not in (1, 3):
        images, channels = images[:, :1], 1
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    zoom = max(1, side // (columns * (width + 1)))
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    gap = max(1, zoom // 2)
    height, width = height * zoom + gap, width * zoom + gap
    canvas = torch.full(
        (rows * height + gap, columns * width + gap, channels), 64, dtype=torch.uint8
    )
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * height, gap + i % columns * width
        canvas[top : top + height - gap, left : left + width - gap] = image.permute(1, 2, 0)
    return canvas


def picture_of(x: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """What can be seen of samples (n, C, H, W): a grid, or the density of points of the plane."""
    return density(x) if x.shape[1:] == (2, 1, 1) else grid(x, columns)


def density(points: torch.Tensor, side: int = 128, reach: float = 2.0) -> torch.Tensor:
    """Points of the plane (n, 2, 1, 1) as a picture of their density over [-reach, reach]², the
    densest place white. (side, side, 1) of bytes
    """
    x, y = points.flatten(1).double().T
    edges = torch.linspace(-reach, reach, side + 1, dtype=torch.float64)
    counts = torch.histogramdd(torch.stack([-y, x], 1), [edges, edges]).hist
    return (255 * counts / counts.max().clamp(min=1)).round().to(torch.uint8)[..., None]


def write_png(path: str | os.PathLike, picture: torch.Tensor) -> Path:
    """Write bytes (H, W, C), C = 1 or 3, as a PNG file; returns its path."""
    height, width, channels = picture.shape
    colour_type = {1: 0, 3: 2}[channels]
    # Each row is preceded by a filter byte, 0 for none.
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), picture.reshape(height, -1)], 1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.numpy().tobytes()))
        + chunk(b"IEND", b"")
    )
    return path
