"""The pictures of scripts/openclipart.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from scripts.fashion_mnist_plots import Strip, running_median
from training.comparison.plots import colour, figure, logarithmic

GAP = 2  # pixels between pictures
LEFT, TOP = 62, 18  # the margins of the titles
BETWEEN = 8  # pixels between strips


def sample_sheet(strips: Sequence[Strip], classes: Sequence[str]) -> Image.Image:
    """A class a column; every pixel of a sample is one of the picture, so that nothing is blurred.

    A strip has several rows of ``len(classes)`` images (n, 3, S, S).
    """
    columns, side = len(classes), strips[0].images.shape[-1]
    step = max(side, 40) + GAP  # small ones need room for the name of their class
    font = ImageFont.load_default(11)
    rows = [len(strip.images) // columns for strip in strips]
    height = TOP + sum(rows) * step + (len(strips) - 1) * BETWEEN
    page = Image.new("RGB", (LEFT + columns * step, height), "white")
    draw = ImageDraw.Draw(page)
    for column, name in enumerate(classes):
        middle = LEFT + column * step + side // 2
        draw.text((middle, 1), name, "black", fitting(name, step), anchor="ma")
    top = TOP
    for strip, count in zip(strips, rows, strict=True):
        pixels = ((strip.images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        draw.multiline_text((2, top + 4), strip.title, "black", font)
        for i, image in enumerate(pixels):
            left = LEFT + i % columns * step
            page.paste(Image.fromarray(image.numpy()), (left, top + i // columns * step))
        top += count * step + BETWEEN
    return page


def fitting(name: str, width: int) -> Any:
    """The largest font in which the name has room, if it is not too small to be read."""
    for size in range(11, 7, -1):
        font = ImageFont.load_default(size)
        if font.getlength(name) < width - 2:
            break
    return font


def curves(result: dict[str, Any]) -> Figure:
    """Over the minutes of training: the Fréchet distance of one-step samples, and the error."""
    whole = figure(7.6, 3.2)
    left, right = whole.subplots(1, 2)
    arms = [row["arm"] for row in result["rows"]]
    for row in result["rows"]:
        shade = colour(row["arm"], arms)
        minutes = [point["seconds"] / 60 for point in row["over_time"]]
        distances = [point["frechet_distance"] for point in row["over_time"]]
        left.plot(minutes, distances, "o-", color=shade, lw=1.4, ms=3, label=row["arm"])
        seconds, errors = (np.array(row["curve"][key]) for key in ("seconds", "error"))
        right.plot(seconds / 60, errors, color=shade, lw=0.8, alpha=0.3)
        right.plot(seconds / 60, running_median(errors), color=shade, lw=1.6, label=row["arm"])
    left.axhline(result["real"]["halves"], color="black", lw=0.8, ls="--", label="real drawings")
    left.set_title("Fréchet distance (classifier), 1 NFE", fontsize=9)
    right.set_title("unweighted error", fontsize=9)
    for axes in (left, right):
        logarithmic(axes)
        axes.set_xlabel("minutes of training", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return whole
