"""The diffusion transformer (DiT, arXiv 2212.09748) as a network of two times.

``net(z, t, r, y)`` sees the noisy image z at time t, an end time r <= t, and a label y. What it
makes of the two times is its own affair (``conditioning``); MeanFlow's choice is (t, h = t - r).
"""

import torch
from torch import nn
from torch.nn.functional import silu

from training.models.embedders import (
    LabelEmbedder,
    PatchEmbedder,
    TimeEmbedder,
    sin_cos_positions,
)
from training.models.layers import Attention, Block, FinalLayer
from training.validation import between, one_of, positive_integer

# size: patch, depth, width, heads. With 4 x 32 x 32 latents, 1000 classes and two time embedders:
SIZES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (2, 3, 96, 4),  #      0.5 M, for 8 x 8 digits
    "S/2": (2, 12, 384, 6),  #      33 M
    "B/4": (4, 12, 768, 12),  #    131 M
    "B/2": (2, 12, 768, 12),  #    131 M
    "L/2": (2, 24, 1024, 16),  #   459 M
    "XL/2": (2, 28, 1152, 16),  #  676 M, head dim 72
}
CONDITIONINGS = ("t_h", "t_r", "t")


class DiT(nn.Module):
    """A DiT of the given size.

    Args:
        attention: a function with SDPA's signature and layout (B, H, N, D).
        image_size, channels: of the square images (or latents), (B, channels, size, size).
        size: a row of ``SIZES``; ``patch``, ``depth``, ``width`` and ``heads`` override it.
        num_classes: labels are 0 ... num_classes - 1; ``null_label`` = num_classes means no
            condition.
        conditioning: which times are embedded: ``t_h`` is (t, t - r), ``t_r`` is (t, r), ``t``
            ignores r.
        dropout: inside the perceptrons of the blocks.
    """

    def __init__(
        self,
        attention: Attention,
        image_size: int,
        channels: int,
        num_classes: int,
        size: str = "tiny",
        patch: int | None = None,
        depth: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        conditioning: str = "t_h",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        one_of("model.size", size, tuple(SIZES))
        one_of("model.conditioning", conditioning, CONDITIONINGS)
        between("model.dropout", dropout, 0, 1)
        sized = SIZES[size]
        patch, depth, width, heads = (
            default if given is None else given
            for given, default in zip((patch, depth, width, heads), sized, strict=True)
        )
        for name, value in (
            ("patch", patch),
            ("depth", depth),
            ("width", width),
            ("heads", heads),
        ):
            positive_integer(f"model.{name}", value)
        if image_size % patch:
            raise ValueError(f"model.patch must divide the image size {image_size}; got {patch}")
        if width % heads:
            raise ValueError(f"model.heads must divide model.width = {width}; got {heads}")

        self.conditioning, self.null_label, self.rows = (
            conditioning,
            num_classes,
            image_size // patch,
        )
        self.patches = PatchEmbedder(patch, channels, width)
        self.register_buffer("positions", sin_cos_positions(self.rows, width), persistent=False)
        self.time = TimeEmbedder(width)
        self.second_time = TimeEmbedder(width) if conditioning != "t" else None
        self.label = LabelEmbedder(num_classes, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, dropout, attention) for _ in range(depth)
        )
        self.final = FinalLayer(width, patch, channels)
        self._initialise()

    def _initialise(self) -> None:
        """DiT's: Xavier everywhere, 0.02 in the embedders, zero gates and zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, TimeEmbedder):
                nn.init.normal_(module.inward.weight, std=0.02)
                nn.init.normal_(module.outward.weight, std=0.02)
            elif isinstance(module, LabelEmbedder):
                nn.init.normal_(module.table.weight, std=0.02)
            elif isinstance(module, Block | FinalLayer):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.final.projection.weight)

    def forward(
        self,
        z: torch.Tensor,  # (B, C, S, S)
        t: torch.Tensor,  # (B,)
        r: torch.Tensor,  # (B,)
        y: torch.Tensor,  # (B,) int64
    ) -> torch.Tensor:  # (B, C, S, S), of z's dtype
        condition = self.time(t) + self.label(y)
        if self.second_time is not None:
            condition = condition + self.second_time(t - r if self.conditioning == "t_h" else r)
        condition = silu(condition)
        x = self.patches(z) + self.positions
        for block in self.blocks:
            x = block(x, condition)  # (B, N, W)
        return self.final(x, condition, self.rows).to(z.dtype)
