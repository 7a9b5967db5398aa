"""The pictures of scripts/fashion_mnist.py."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from training.comparison.plots import figure, logarithmic
from training.images import grid

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat")
CLASSES += ("sandal", "shirt", "sneaker", "bag", "ankle boot")
TITLES = {"flow_matching": "flow matching", "meanflow": "MeanFlow", "scm": "sCM", "scd": "sCD"}
SMOOTHING = 7  # points of a curve on each side of the one whose median is drawn


class Strip(NamedTuple):
    """A row of the grid of samples."""

    title: str
    images: torch.Tensor  # (10, 1, S, S), one of each class


def sample_grid(strips: Sequence[Strip]) -> Figure:
    """A class a column, every row from the same noise."""
    canvas = grid(torch.cat([strip.images for strip in strips]), len(CLASSES), side=1024)[..., 0]
    height, width = canvas.shape
    whole = figure(8.0, 6.6 * height / width + 0.4)  # the rest of the width is the titles'
    axes = whole.subplots()
    options = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": "nearest"}
    axes.imshow(canvas.numpy(), aspect="auto", **options)
    axes.set_xticks((np.arange(len(CLASSES)) + 0.5) * width / len(CLASSES), CLASSES, fontsize=8)
    titles = [strip.title for strip in strips]
    axes.set_yticks((np.arange(len(strips)) + 0.5) * height / len(strips), titles, fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return whole


def curves(rows: Sequence[dict]) -> Figure:
    """The unweighted error of each run in a panel of its own: they are different quantities."""
    whole = figure(3.4 * len(rows), 3.2)
    for axes, row in zip(whole.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        steps, errors = (np.array(row["curve"][key]) for key in ("step", "error"))
        axes.plot(steps, errors, color="#0b6e99", lw=0.8, alpha=0.35)
        axes.plot(steps, running_median(errors), color="#0b6e99", lw=1.6)
        logarithmic(axes)
        axes.set_title(TITLES.get(row["objective"], row["objective"]), fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    whole.axes[0].set_ylabel("unweighted error")
    return whole


def running_median(values: np.ndarray) -> np.ndarray:
    """Median of the neighbours of each value: no spike moves it.

    At the start as many before as after, which a steep curve does not delay; at the end, where
    curves are flat, there are fewer after.
    """
    sides = [min(SMOOTHING, i) for i in range(len(values))]
    return np.array([np.median(values[i - n : i + n + 1]) for i, n in enumerate(sides)])
