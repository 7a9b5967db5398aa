"""The diffusion transformer (DiT, arXiv 2212.09748) as a network of two times.

``net(z, t, r, y)`` sees the noisy image z at time t, an end time r <= t, and a label y. What it
makes of the two times is its own affair (``conditioning``); MeanFlow's choice is (t, h = t - r).

Some objectives ask for more, each switched on by its own option:

    net(z, t, r, y, guidance)      the guidance scale and interval as a condition       ``guided``
    net.heads(z, t, r, y, ...)     (u, v): a second head on the shared trunk       ``second_head``
    net.log_variance(t, r)         of the objective's error                       ``log_variance``
"""

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import nn

from training.models.embedders import (
    GuidanceEmbedder,
    InverseGuidance,
    LabelContext,
    LabelEmbedder,
    LearnsVariance,
    LogVariance,
    PatchEmbedder,
    PrefixTokens,
    TimeEmbedder,
    rotary_angles,
    sequence_angles,
    sin_cos_positions,
)
from training.models.jvp_layers import (
    Tensor,
    add,
    add_in_place,
    concatenate,
    linear_map,
    multiply,
    primal,
    silu,
    subtract,
)
from training.models.layers import (
    MLPS,
    NORMS,
    Attention,
    Block,
    FinalLayer,
    Residual,
    Stream,
    autocast_dtype,
    begin,
    settled,
)
from training.validation import between, integer, one_of, positive_integer, switch

# size: patch, depth, width, heads. Parameters with 4 x 32 x 32 latents and 1000 classes; of the
# first kind with two time embedders, of iMF's with its options (configs/model/imf_b2.yaml) and
# without the blocks of the second head, which samples do not need:
SIZES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (2, 3, 96, 4),  #          0.5 M, for 8 x 8 digits
    "S/4": (4, 12, 384, 6),  #          33 M
    "S/2": (2, 12, 384, 6),  #          33 M
    "B/4": (4, 12, 768, 12),  #        131 M
    "B/2": (2, 12, 768, 12),  #        131 M
    "M/2": (2, 16, 1024, 16),  #       308 M
    "L/2": (2, 24, 1024, 16),  #       459 M
    "XL/2": (2, 28, 1152, 16),  #      676 M, head dim 72
    "iMF-B/2": (2, 12, 768, 12),  #     89 M
    "iMF-M/2": (2, 24, 768, 12),  #    174 M
    "iMF-L/2": (2, 32, 1024, 16),  #   409 M
    "iMF-XL/2": (2, 48, 1024, 16),  #  610 M
}
CONDITIONINGS = ("t_h", "t_r", "h", "t", "t_then_r")
POSITIONS = ("sin_cos", "rope", "rope_1d")
INITIALISATIONS = ("dit", "imf", "spectral")


class DiT(LearnsVariance):
    """A DiT of the given size.

    Args:
        attention: a function with SDPA's signature and layout (B, H, N, D).
        image_size, channels: of the square images (or latents), (B, channels, size, size).
        size: a row of ``SIZES``; ``patch``, ``depth``, ``width`` and ``heads`` override it.
        num_classes: labels are 0 ... num_classes - 1; ``null_label`` = num_classes means no
            condition.
        conditioning: which times are embedded: ``t_h`` is (t, t - r), ``t_r`` is (t, r), ``h`` is
            t - r alone, ``t`` ignores r, ``t_then_r`` is t and, in its place, r in the last
            ``late_blocks`` and the final layer (arXiv 2510.24474).
        dropout: inside the perceptrons of the blocks.
        norm: ``layer`` or ``rms``, both without weights. mlp: ``gelu`` or ``swiglu``.
        qk_norm: RMS norm of queries and keys.
        bias: of the linear layers in the blocks.
        modulation_norm: RMS norm of what shifts, scales and gates (adaLN only, arXiv 2511.19797).
        positions: ``sin_cos`` adds fixed ones to the tokens; ``rope`` rotates queries and keys of
            the image's tokens by their place on the grid, ``rope_1d`` those of all tokens by their
            number in the sequence.
        initialisation: ``dit``, or ``imf``: normal of std 0.32 / sqrt(inputs) in the blocks and
            1 / sqrt(inputs) in the embedders; or ``spectral``: every linear layer has the spectral
            norm 1 (arXiv 2511.19797).
        label_tokens, time_tokens, guidance_tokens, interval_tokens: where ``label_tokens`` > 0 the
            conditions are so many tokens each before the image's (of each time, and of each end of
            the interval), and do not modulate the blocks (arXiv 2512.02012); 0 is adaLN.
        cross_tokens: the blocks also attend to so many learned tokens of the label, as they would
            to a text; 0 is none.
        guided: has guidance (w, t_min, t_max) as a condition; ``inverse``: 1/w alone, and what the
            network gives is multiplied by w (arXiv 2511.19797).
        second_head: the last so many blocks are doubled, for a second output; null is no second
            head, 0 doubles the final layer alone.
        log_variance: has ``log_variance(t)``, or of (t, r) where ``log_variance_times`` is 2.
        residual_in_fp32: the sum of the blocks' branches is float32 under autocast too; false: of
            autocast's dtype, which halves what the norms read and write.
    """

    takes_duals = True
    fused = False  # kernels of ours stand between a block's products: set by ``Step``
    sequence: Any = None  # tokens are shared with other processes: set by ``context_parallel``

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
        late_blocks: int = 0,
        dropout: float = 0.0,
        norm: str = "layer",
        mlp: str = "gelu",
        qk_norm: bool = False,
        bias: bool = True,
        modulation_norm: bool = False,
        positions: str = "sin_cos",
        initialisation: str = "dit",
        label_tokens: int = 0,
        time_tokens: int = 4,
        guidance_tokens: int = 4,
        interval_tokens: int = 2,
        cross_tokens: int = 0,
        guided: bool | str = False,
        second_head: int | None = None,
        log_variance: bool = False,
        log_variance_times: int = 1,
        residual_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        one_of("model.size", size, tuple(SIZES))
        one_of("model.conditioning", conditioning, CONDITIONINGS)
        one_of("model.norm", norm, tuple(NORMS))
        one_of("model.mlp", mlp, tuple(MLPS))
        one_of("model.positions", positions, POSITIONS)
        one_of("model.initialisation", initialisation, INITIALISATIONS)
        if guided is not True and guided is not False and guided != "inverse":
            raise ValueError(f"model.guided must be true, false or inverse; got {guided!r}")
        switch("model.bias", bias)
        switch("model.modulation_norm", modulation_norm)
        switch("model.residual_in_fp32", residual_in_fp32)
        between("model.dropout", dropout, 0, 1, open_high=True)
        patch, depth, width, heads = (
            default if given is None else given
            for given, default in zip((patch, depth, width, heads), SIZES[size], strict=True)
        )
        for name, value in (
            ("patch", patch),
            ("depth", depth),
            ("width", width),
            ("heads", heads),
            ("time_tokens", time_tokens),
            ("guidance_tokens", guidance_tokens),
            ("interval_tokens", interval_tokens),
        ):
            positive_integer(f"model.{name}", value)
        for name, value in (("label_tokens", label_tokens), ("cross_tokens", cross_tokens)):
            integer(f"model.{name}", value)
            between(f"model.{name}", value, 0)
        if image_size % patch:
            raise ValueError(f"model.patch must divide the image size {image_size}; got {patch}")
        if width % heads:
            raise ValueError(f"model.heads must divide model.width = {width}; got {heads}")
        if second_head is not None:
            integer("model.second_head", second_head)
            between("model.second_head", second_head, 0, depth)

        integer("model.late_blocks", late_blocks)
        if (conditioning == "t_then_r") != (late_blocks > 0) or late_blocks > depth:
            raise ValueError(
                f"model.late_blocks must be 1 to {depth} with model.conditioning=t_then_r, and 0"
                f" with others; got {late_blocks} with {conditioning}"
            )
        if late_blocks and (label_tokens or second_head is not None):
            raise ValueError(
                "model.conditioning=t_then_r goes with neither model.label_tokens nor"
                " model.second_head; leave them out"
            )
        self.late_blocks = late_blocks

        self.conditioning, self.null_label, self.rows = (
            conditioning,
            num_classes,
            image_size // patch,
        )
        self.patches = PatchEmbedder(patch, channels, width)
        self.register_buffer("positions", None, persistent=False)
        self.register_buffer("angles", None, persistent=False)
        self.time = TimeEmbedder(width)
        self.second_time = TimeEmbedder(width) if conditioning in ("t_h", "t_r") else None
        self.label = LabelEmbedder(num_classes, width)
        self.guidance = GuidanceEmbedder(width) if guided is True else None
        self.scaled = guided == "inverse"
        if self.scaled:
            self.guidance = InverseGuidance(width)
        self.context = LabelContext(num_classes, cross_tokens, width) if cross_tokens else None
        self.prefix, counts = None, []
        if label_tokens:  # in the order of self._conditions
            counts = [guidance_tokens, interval_tokens, interval_tokens] if guided else []
            counts = counts[:1] if self.scaled else counts
            counts = [label_tokens, *counts, *[time_tokens] * (1 + (self.second_time is not None))]
            self.prefix = nn.ModuleList(PrefixTokens(n, width) for n in counts)
        self.tokens = self.rows**2 + sum(counts)
        if positions == "rope":
            self.angles = rotary_angles(self.rows, width // heads)
        elif positions == "rope_1d":
            self.angles = sequence_angles(self.tokens, width // heads)
        else:
            self.positions = sin_cos_positions(self.rows, width)
        options = (norm, mlp, qk_norm, not label_tokens, cross_tokens > 0, bias, modulation_norm)
        final_options = (norm, not label_tokens, modulation_norm)
        block = lambda: Block(width, heads, mlp_ratio, dropout, attention, *options)  # noqa: E731
        final = lambda: FinalLayer(width, patch, channels, *final_options)  # noqa: E731
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.final = final()
        self.second_blocks = self.second_final = None
        if second_head is not None:
            self.second_blocks = nn.ModuleList(block() for _ in range(second_head))
            self.second_final = final()
        self.variance = LogVariance(log_variance_times) if log_variance else None
        self.residual_in_fp32 = residual_in_fp32
        self._initialise(initialisation)

    def _initialise(self, kind: str) -> None:
        """Zero gates and zero output. DiT's: Xavier everywhere, 0.02 in the embedders. iMF's: a
        normal distribution whose std falls with the root of the inputs; patches as DiT's. Spectral:
        normal, then divided by the largest singular value, times too; labels as DiT's.
        """
        imf = kind == "imf"
        normal = lambda w, c: nn.init.normal_(w, std=c / math.sqrt(w.shape[1]) if imf else 0.02)  # noqa: E731
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if kind == "spectral":
                    _spectral(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if imf and isinstance(module, Block):
                for layer in module.modules():
                    if isinstance(layer, nn.Linear):
                        normal(layer.weight, 0.32)
            if isinstance(module, TimeEmbedder) and kind != "spectral":
                normal(module.inward.weight, 1)
                normal(module.outward.weight, 1)
            elif isinstance(module, LabelEmbedder | LabelContext):
                normal(module.table.weight, 1)
            elif isinstance(module, Block | FinalLayer):
                if module.modulation.linear is not None:
                    nn.init.zeros_(module.modulation.linear.weight)
                if isinstance(module, FinalLayer):
                    nn.init.zeros_(module.projection.weight)
                elif module.cross is not None:
                    nn.init.zeros_(module.cross.projection.weight)
            elif isinstance(module, LogVariance):
                nn.init.zeros_(module.linear.weight)

    def forward(
        self,
        z: Tensor,  # (B, C, S, S)
        t: Tensor,  # (B,)
        r: Tensor,  # (B,)
        y: torch.Tensor,  # (B,) int64
        guidance: torch.Tensor | None = None,  # (B, 3): w, t_min, t_max; None is w = 1
    ) -> Any:  # (B, C, S, S), of z's dtype; Dual if z, t or r is
        """The average velocity u(z, t, r)."""
        x, condition, context = self._tokens(z, t, r, y, guidance)
        blocks, first = list(self.blocks), len(self.blocks) - self.late_blocks
        x = self._run(blocks[:first], x, condition, context)
        if self.late_blocks:
            condition = silu(reduce(add, self._conditions(r, r, y, guidance)))
            x = self._run(blocks[first:], x, condition, context)
        return self._scale(_as(self._output(x, condition, self.final), z), guidance)

    def heads(
        self, z: Tensor, t: Tensor, r: Tensor, y: torch.Tensor, guidance: torch.Tensor | None = None
    ) -> tuple[Any, torch.Tensor]:
        """What ``forward`` returns, and the output of the second head, which is computed without
        its tangent. Each (B, C, S, S)
        """
        if self.second_blocks is None or self.second_final is None:
            raise ValueError("the objective needs a second head; set model.second_head >= 0")
        x, condition, context = self._tokens(z, t, r, y, guidance)
        shared = len(self.blocks) - len(self.second_blocks)
        x = self._run(self.blocks[:shared], x, condition, context)
        first = self._run(self.blocks[shared:], x, condition, context)
        first = self._output(first, condition, self.final)
        condition = None if condition is None else primal(condition)
        second = self._run(self.second_blocks, _primal(x), condition, context)
        second = self._output(second, condition, self.second_final)
        first, second = self._scale(_as(first, z), guidance), primal(_as(second, z))
        return first, primal(self._scale(second, guidance))

    def _scale(self, x: Tensor, guidance: torch.Tensor | None) -> Tensor:
        if not self.scaled or guidance is None:
            return x
        return multiply(x, guidance[:, 0].to(primal(x).dtype)[:, None, None, None])

    def _conditions(
        self, t: Tensor, r: Tensor, y: torch.Tensor, guidance: torch.Tensor | None
    ) -> list[Tensor]:
        """Embeddings of label, guidance, and time or times. Each (B, W)"""
        embedded = [self.label(y)]
        if self.guidance is not None:
            if guidance is None:
                one = torch.ones_like(primal(t))
                guidance = torch.stack([one, torch.zeros_like(one), one], dim=1)
            embedded += self.guidance(guidance)
        elif guidance is not None:
            raise ValueError("this network has no guidance as a condition; set model.guided=true")
        first = subtract(t, r) if self.conditioning == "h" else t
        embedded.append(self.time(first))
        if self.second_time is not None:
            embedded.append(self.second_time(subtract(t, r) if self.conditioning == "t_h" else r))
        return embedded

    def _tokens(
        self, z: Tensor, t: Tensor, r: Tensor, y: torch.Tensor, guidance: torch.Tensor | None
    ) -> tuple[Tensor, Tensor | None, torch.Tensor | None]:
        """Tokens (B, N, W), the condition of adaLN (B, W), and the context (B, M, W)."""
        conditions = self._conditions(t, r, y, guidance)
        context = None if self.context is None else self.context(y)
        x = self.patches(z)
        if self.positions is not None:
            add_to = add if self.residual_in_fp32 else add_in_place
            x = add_to(x, self.positions)
        condition = None
        if self.prefix is None:
            condition = silu(reduce(add, conditions))
        else:
            prefix = [f(c) for f, c in zip(self.prefix, conditions, strict=True)]
            x = concatenate([*prefix, x], dim=1)
        return x if self.sequence is None else self.sequence.shard(x), condition, context

    def _run(
        self,
        blocks: Iterable[nn.Module],
        x: Stream,
        condition: Tensor | None,
        context: torch.Tensor | None,
    ) -> Stream:
        if not isinstance(x, Residual):
            if not self.residual_in_fp32:
                x = linear_map(lambda x: x.to(autocast_dtype(x)), x)
            first: Any = self.blocks[0]
            x = begin(x, 6, first.mlp.contract.bias) if self.fused else x
        angles = self._angles()
        for block in blocks:
            x = block(x, condition, angles, context)  # (B, N, W)
        return x

    def _angles(self) -> torch.Tensor | None:
        """Of the last tokens; of this process's where it holds a part. A prefix is not turned."""
        if self.angles is None or self.sequence is None:
            return self.angles
        prefix = self.angles.new_zeros(self.tokens - len(self.angles), self.angles.shape[1])
        return self.sequence.shard(torch.cat([prefix, self.angles]))

    def _output(self, x: Stream, condition: Tensor | None, final: FinalLayer) -> Tensor:
        if self.sequence is not None:
            patches = self.sequence.gather(final(x, condition, None))
            return final.image(linear_map(lambda x: x[:, -(self.rows**2) :], patches), self.rows)
        if self.prefix is None:
            return final(x, condition, self.rows)
        images = linear_map(lambda x: x[:, -(self.rows**2) :], settled(x))
        return final(images, condition, self.rows)


def _primal(x: Stream) -> Stream:
    return x._make(map(primal, x)) if isinstance(x, Residual) else primal(x)  # pyright: ignore


@torch.no_grad()
def _spectral(weight: torch.Tensor) -> None:
    nn.init.xavier_normal_(weight)
    wide = weight.double()
    gram = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide
    weight.div_(torch.linalg.eigvalsh(gram)[-1].sqrt())


def _as(x: Tensor, z: Tensor) -> Tensor:
    dtype = primal(z).dtype
    return linear_map(lambda x: x.to(dtype), x)
