"""EDM's augmentation of images (arXiv 2206.00364, Appendix F.2), of which the network is told.

A part of the images is mirrored, scaled, stretched, moved, and (``turn``) turned and put upside
down; numbers that describe what was done, 0 where nothing was, become a condition of the network,
and samples are drawn with all of them 0: no trace of the augmentation is in them.

Images are warped at twice their resolution. The filter that goes there and back is a wavelet's
(sym6), for which the way there and back changes nothing: images that are not warped stay the same.
"""

import math

import torch
from torch.nn.functional import conv2d, grid_sample, pad

NUMBERS = {False: 6, True: 9}  # by ``turn``
# The low-pass filter of the wavelet sym6, of length 1.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)


def augment(
    x: torch.Tensor, p: float, turn: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, S, S), augmented, and the numbers (B, 6 or 9). Every kind but mirroring has
    probability p.
    """
    n, size = len(x), x.shape[-1]

    def uniform() -> torch.Tensor:
        return torch.rand(n, generator=generator)

    def some(values: torch.Tensor, share: float = p) -> torch.Tensor:
        """The values of a share of the images, 0 for the others."""
        return torch.where(uniform() < share, values, 0.0)

    def normal() -> torch.Tensor:
        return torch.randn(n, generator=generator)

    mirrored = (uniform() < 0.5).float()
    x = torch.where(mirrored.bool()[:, None, None, None], x.flip(-1), x)
    numbers = [mirrored]
    if turn:
        upside_down = some((uniform() < 0.5).float())
        x = torch.where(upside_down.bool()[:, None, None, None], x.flip(-2), x)
        numbers.append(upside_down)
    scale = some(normal())
    numbers.append(scale)
    inverse = _diagonal(2 ** (-0.2 * scale), 2 ** (-0.2 * scale))
    if turn:
        angle = some((2 * uniform() - 1) * math.pi)
        numbers += [angle.cos() - 1, angle.sin()]
        inverse = inverse @ _rotation(angle)
    stretch, along = some(normal()), some((2 * uniform() - 1) * math.pi, 0.5)
    numbers += [stretch * along.cos(), stretch * along.sin()]
    stretched = _diagonal(2 ** (-0.2 * stretch), 2 ** (0.2 * stretch))
    inverse = inverse @ _rotation(-along) @ stretched @ _rotation(along)
    moved = torch.stack([normal(), normal()])
    moved = torch.where(uniform() < p, moved, 0.0)
    numbers += [*moved]
    shift = torch.eye(3).repeat(n, 1, 1)
    shift[:, :2, 2] = -0.125 * size * moved.T
    return warp(x, inverse @ shift), torch.stack(numbers, dim=1)


def _diagonal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.diag_embed(torch.stack([a, b, torch.ones_like(a)], dim=-1))


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    matrix = torch.eye(3).repeat(len(angle), 1, 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 1, 0], matrix[:, 0, 1] = angle.sin(), -angle.sin()
    return matrix


def warp(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Every pixel from where ``inverse`` (B, 3, 3) puts it, in pixels from the image's centre; the
    image is reflected at its edges. (B, C, S, S)
    """
    n, channels, size, _ = x.shape
    margin = size - 1
    taps = torch.tensor(SYM6, dtype=x.dtype)
    length = len(taps)
    x = pad(x, [margin] * 4, mode="reflect")
    wide = x.new_zeros(n, channels, 2 * x.shape[-1] - 1, 2 * x.shape[-1] - 1)
    wide[..., ::2, ::2] = x
    wide = _filtered(pad(wide, [length // 2] * 4), taps.flip(0), 1)
    # Pixel q of the padded image is at 2 q + 1/2 here; of the result, pixel k at 2 k + 11/2.
    side = 2 * size + length - 2
    places = (torch.arange(side) - (length - 1) / 2) / 2 - (size - 1) / 2
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    points = torch.stack([columns, rows, torch.ones_like(rows)], -1).flatten(0, 1)
    points = points.to(inverse.dtype)  # (N, 3)
    source = points @ inverse.mT[..., :2]  # (B, N, 2)
    source = 2 * (source + (size - 1) / 2 + margin) + 0.5
    grid = 2 * source / (wide.shape[-1] - 1) - 1
    wide = grid_sample(wide, grid.unflatten(1, (side, side)).to(x.dtype), align_corners=True)
    return _filtered(wide, taps, 2)


def _filtered(x: torch.Tensor, taps: torch.Tensor, stride: int) -> torch.Tensor:
    """Along both axes. (B, C, H, W)"""
    kernel = taps.repeat(x.shape[1], 1, 1, 1)
    x = conv2d(x, kernel, stride=(1, stride), groups=x.shape[1])
    return conv2d(x, kernel.mT, stride=(stride, 1), groups=x.shape[1])
