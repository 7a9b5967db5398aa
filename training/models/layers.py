"""Layers of the diffusion transformer; the attention function is an argument."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import silu

from training.models.duals import Linear, layer_norm, modulate, rms_norm

Attention = Callable[..., torch.Tensor]  # (query, key, value), each (B, H, N, D) -> (B, H, N, D)


NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"layer": layer_norm, "rms": rms_norm}


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions (RoPE, arXiv 2104.09864): pairs of features turned by their angle.

    x: (B, H, N, D); angles: (n, D/2), n <= N. The N - n leading tokens have no place on the grid
    and are left as they are.
    """
    prefix, x = x.tensor_split([x.shape[-2] - len(angles)], dim=-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)  # (B, H, n, D/2)
    return torch.cat([prefix, torch.cat([a * cos - b * sin, a * sin + b * cos], -1)], -2)


class QueryKeyNorm(nn.Module):
    """RMS norm of queries and keys over the features of a head (arXiv 2010.04245)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(head_dim))
        self.key = nn.Parameter(torch.ones(head_dim))

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(q) * self.query, rms_norm(k) * self.key


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, attention: Attention, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = Linear(width, 3 * width)
        self.qk_norm = QueryKeyNorm(width // heads) if qk_norm else None
        self.projection = Linear(width, width)

    def forward(self, x: torch.Tensor, angles: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return self.projection(rearrange(self.attention(q, k, v), "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Tokens attend to a context. The context depends on neither image nor time, so that its keys
    and values have no tangent: attention is told None and leaves out their products.
    """

    def __init__(self, width: int, heads: int, attention: Attention, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.qk_norm = QueryKeyNorm(width // heads) if qk_norm else None
        self.projection = Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(
            self.key_value(context), "b m (two h d) -> two b h m d", two=2, h=self.heads
        )
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        return self.projection(rearrange(self.attention(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.expand = Linear(width, hidden)
        self.activation = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(dropout)
        self.contract = Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.contract(self.dropout(self.activation(self.expand(x))))


class SwiGLU(nn.Module):
    """silu(A x) ∘ B x, contracted (arXiv 2002.05202); 2/3 of the hidden width costs what Mlp
    costs.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.expand = Linear(width, 2 * hidden)
        self.dropout = nn.Dropout(dropout)
        self.contract = Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, x = self.expand(x).chunk(2, -1)
        return self.contract(self.dropout(silu(gate) * x))


MLPS: dict[str, type[nn.Module]] = {"gelu": Mlp, "swiglu": SwiGLU}


class Modulation(nn.Module):
    """``n`` vectors that shift, scale and gate: linear in the condition (adaLN), or learned
    constants where the condition comes as tokens. Zero at initialisation.
    """

    def __init__(self, width: int, n: int, conditioned: bool) -> None:
        super().__init__()
        self.n = n
        self.linear = Linear(width, n * width) if conditioned else None
        self.constants = None if conditioned else nn.Parameter(torch.zeros(n * width))

    def forward(self, condition: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """(B, W) -> n vectors (B or 1, 1, W)."""
        if self.constants is not None:
            return self.constants[None, None].chunk(self.n, -1)
        return self.linear(condition)[:, None].chunk(self.n, -1)  # type: ignore[misc]


class Block(nn.Module):
    """adaLN-zero block (DiT, arXiv 2212.09748): the condition shifts, scales and gates both
    branches; between them, if asked for, attention to a context.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        attention: Attention,
        norm: str = "layer",
        mlp: str = "gelu",
        qk_norm: bool = False,
        conditioned: bool = True,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.norm = NORMS[norm]
        self.attention = SelfAttention(width, heads, attention, qk_norm)
        self.cross = CrossAttention(width, heads, attention, qk_norm) if cross else None
        self.mlp = MLPS[mlp](width, int(mlp_ratio * width), dropout)
        self.modulation = Modulation(width, 6, conditioned)

    def forward(
        self,
        x: torch.Tensor,  # (B, N, W)
        condition: torch.Tensor | None = None,  # (B, W)
        angles: torch.Tensor | None = None,  # (n, D/2), of the n last tokens
        context: torch.Tensor | None = None,  # (B, M, W)
    ) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)
        x = x + gate_a * self.attention(modulate(self.norm(x), shift_a, scale_a), angles)
        if self.cross is not None:
            if context is None:
                raise ValueError("context must be (B, M, W) for cross attention; got None")
            x = x + self.cross(self.norm(x), context)
        return x + gate_m * self.mlp(modulate(self.norm(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens to pixels; its zero weights make the network exactly 0 at initialisation."""

    def __init__(
        self,
        width: int,
        patch: int,
        channels: int,
        norm: str = "layer",
        conditioned: bool = True,
    ) -> None:
        super().__init__()
        self.patch, self.norm = patch, NORMS[norm]
        self.modulation = Modulation(width, 2, conditioned)
        self.projection = Linear(width, channels * patch * patch)

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None, rows: int) -> torch.Tensor:
        shift, scale = self.modulation(condition)
        x = self.projection(modulate(self.norm(x), shift, scale))
        p = self.patch
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)
