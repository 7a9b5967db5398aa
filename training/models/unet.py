"""The DDPM++ U-Net (arXiv 2011.13456, as EDM, arXiv 2206.00364, has it) as a network of two times:
the network of CIFAR-10 recipes.

    x -> conv -> levels of residual blocks, each level at half the resolution of the one before
      -> middle -> the same levels upwards, every block sees the output of its twin -> conv

Attention is an argument, as in ``models.dit``: one head over the pixels of some levels. Norms are
written from primitives, so that ``torch.func.jvp`` and a compiler both take their derivative.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, silu

from training.models.embedders import LearnsVariance, LogVariance
from training.validation import between, integer, one_of, positive_integer, switch

CONDITIONINGS = ("t_h", "t_r", "t")
HALF = (torch.float16, torch.bfloat16)
SKIP = math.sqrt(0.5)  # of a sum of two branches, so that its variance is that of one


class GroupNorm(nn.Module):
    """Groups of at least four channels, 32 at most."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        most = min(32, max(channels // 4, 1))
        self.groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouped = x.unflatten(1, (self.groups, -1))
        grouped = grouped.float() if x.dtype in HALF else grouped
        centred = grouped - grouped.mean((2, 3, 4), keepdim=True)
        scale = torch.rsqrt(centred.square().mean((2, 3, 4), keepdim=True) + 1e-6)
        return (centred * scale).flatten(1, 2).to(x.dtype) * self.weight + self.bias


class PixelAttention(nn.Module):
    """One head of self-attention over the pixels."""

    def __init__(self, channels: int, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.norm, self.attention = GroupNorm(channels), attention
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1)  # (B, 1, N, 3 C)
        q, k, v = (part.contiguous() for part in heads.chunk(3, -1))
        out = self.attention(q, k, v).squeeze(1).mT.unflatten(2, x.shape[2:])
        return SKIP * (x + self.projection(out))


class ResidualBlock(nn.Module):
    """Two convolutions; ``scale`` 2 or 1/2 changes the resolution before the first one."""

    def __init__(
        self,
        inward: int,
        outward: int,
        embedding: int,
        dropout: float,
        attention: Callable[..., torch.Tensor] | None = None,
        scale: float = 1,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm, self.first = GroupNorm(inward), nn.Conv2d(inward, outward, 3, padding=1)
        self.condition = nn.Linear(embedding, outward)
        self.second_norm = GroupNorm(outward)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Conv2d(outward, outward, 3, padding=1)
        self.skip = nn.Conv2d(inward, outward, 1) if inward != outward or scale != 1 else None
        self.attention = PixelAttention(outward, attention) if attention is not None else None

    def _resized(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale == 1:
            return x
        return interpolate(x, scale_factor=2.0) if self.scale > 1 else avg_pool2d(x, 2)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        y = self.first(self._resized(silu(self.norm(x))))
        y = silu(self.second_norm(y + self.condition(condition)[:, :, None, None]))
        y = self.second(self.dropout(y))
        x = SKIP * (y + (x if self.skip is None else self.skip(self._resized(x))))
        return x if self.attention is None else self.attention(x)


class UNet(LearnsVariance):
    """A DDPM++ of the given width.

    Args:
        attention: a function with SDPA's signature and layout (B, H, N, D).
        image_size, channels: of the square images, (B, channels, size, size).
        num_classes: labels are 0 ... num_classes - 1; ``null_label`` = num_classes.
        width: channels of the first level before ``multipliers``, of which there is one a level.
        blocks: of a level, on the way down; one more on the way up.
        attention_sizes: resolutions whose blocks attend; the middle always does.
        conditioning: the times that are embedded, as of ``models.dit``: ``t_h``, ``t_r`` or ``t``.
        labels: whether the label is a condition.
        augmentation: numbers that describe how an image was augmented (``data.augment``), 0 is
            none. They come with the label, y (B, 1 + n); without them, all 0.
        dropout: inside the residual blocks.
        log_variance: has ``log_variance(t)``, or of (t, r) where ``log_variance_times`` is 2.
    """

    def __init__(
        self,
        attention: Callable[..., torch.Tensor],
        image_size: int,
        channels: int,
        num_classes: int,
        width: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention_sizes: Sequence[int] = (16,),
        conditioning: str = "t_h",
        labels: bool = False,
        augmentation: int = 0,
        dropout: float = 0.2,
        log_variance: bool = False,
        log_variance_times: int = 1,
    ) -> None:
        super().__init__()
        one_of("model.conditioning", conditioning, CONDITIONINGS)
        positive_integer("model.width", width)
        positive_integer("model.blocks", blocks)
        for multiplier in multipliers:
            positive_integer("model.multipliers", multiplier)
        integer("model.augmentation", augmentation)
        between("model.augmentation", augmentation, 0)
        between("model.dropout", dropout, 0, 1, open_high=True)
        switch("model.labels", labels)
        halvings = len(multipliers) - 1
        if width % 4 or image_size % 2**halvings:
            raise ValueError(
                f"model.width must be a multiple of 4, and the image size one of {2**halvings} for"
                f" {len(multipliers)} model.multipliers; got {width} and {image_size}"
            )
        self.conditioning, self.null_label, self.width = conditioning, num_classes, width
        times = 1 if conditioning == "t" else 2
        embedding = 4 * width
        self.augment = nn.Linear(augmentation, times * width, bias=False) if augmentation else None
        self.inward = nn.Linear(times * width, embedding)
        self.outward = nn.Linear(embedding, embedding)
        self.label = nn.Embedding(num_classes + 1, times * width) if labels else None
        self.variance = LogVariance(log_variance_times) if log_variance else None

        def block(inward: int, outward: int, attends: bool = False, scale: float = 1) -> nn.Module:
            chosen = attention if attends else None
            return ResidualBlock(inward, outward, embedding, dropout, chosen, scale)

        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        count, kept = width, [width]
        for level, multiplier in enumerate(multipliers):
            attends = image_size >> level in attention_sizes
            if level:
                self.down.append(block(count, count, scale=0.5))
                kept.append(count)
            for _ in range(blocks):
                self.down.append(block(count, multiplier * width, attends))
                count = multiplier * width
                kept.append(count)
        self.middle = nn.ModuleList([block(count, count, True), block(count, count)])
        self.twins: list[bool] = []  # of each block upwards: whether it sees one of downwards
        for level, multiplier in reversed(list(enumerate(multipliers))):
            attends = image_size >> level in attention_sizes
            if level < halvings:
                self.up.append(block(count, count, scale=2))
                self.twins.append(False)
            for i in range(blocks + 1):
                last = attends and i == blocks
                self.up.append(block(count + kept.pop(), multiplier * width, last))
                self.twins.append(True)
                count = multiplier * width
        self.norm = GroupNorm(count)
        self.last = nn.Conv2d(count, channels, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier everywhere, scaled down where a branch ends."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, ResidualBlock):
                    module.second.weight.mul_(1e-5)
                elif isinstance(module, PixelAttention):
                    module.qkv.weight.mul_(math.sqrt(0.2))
                    module.projection.weight.mul_(1e-5)
                elif isinstance(module, LogVariance):
                    module.linear.weight.zero_()
            self.last.weight.mul_(1e-5)
            if self.label is not None:
                nn.init.normal_(self.label.weight, std=0.02)

    def forward(
        self,
        z: torch.Tensor,  # (B, C, S, S)
        t: torch.Tensor,  # (B,)
        r: torch.Tensor,  # (B,)
        y: torch.Tensor,  # (B,) labels, or (B, 1 + n) labels and augmentations
    ) -> torch.Tensor:  # (B, C, S, S), of z's dtype
        """The average velocity u(z, t, r)."""
        condition = self._condition(t, r, y)
        x = self.first(z.to(self.first.weight.dtype))
        kept = [x]
        for block in self.down:
            x = block(x, condition)
            kept.append(x)
        for block in self.middle:
            x = block(x, condition)
        for block, twin in zip(self.up, self.twins, strict=True):
            x = block(torch.cat([x, kept.pop()], dim=1) if twin else x, condition)
        return self.last(silu(self.norm(x))).to(z.dtype)

    def _condition(self, t: torch.Tensor, r: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        times = {"t_h": (t, t - r), "t_r": (t, r), "t": (t,)}[self.conditioning]
        dtype = self.inward.weight.dtype
        embedded = torch.cat([self._sinusoids(time) for time in times], dim=1).to(dtype)
        if y.ndim == 2:
            y, numbers = y[:, 0].long(), y[:, 1:]
            if self.augment is None or numbers.shape[1] != self.augment.in_features:
                raise ValueError(
                    f"model.augmentation must be {numbers.shape[1]}, the numbers that data.augment"
                    f" gives; got {0 if self.augment is None else self.augment.in_features}"
                )
            embedded = embedded + self.augment(numbers.to(dtype))
        if self.label is not None:
            embedded = embedded + self.label(y)
        return silu(self.outward(silu(self.inward(embedded))))

    def _sinusoids(self, t: torch.Tensor) -> torch.Tensor:
        """Frequencies from 1 down to 1e-4, both included, in float32 at least. (B,) -> (B, W)"""
        dtype = torch.promote_types(t.dtype, torch.float32)
        half = self.width // 2
        index = torch.arange(half, device=t.device, dtype=dtype) / max(half - 1, 1)
        phase = t[:, None] * 10_000**-index
        return torch.cat([phase.sin(), phase.cos()], dim=1)
