"""Multi-head attention as an `nn.Module`, for people's own trainers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import validation
from .api import Range, Seqlens, attention


class RMSNorm(nn.Module):
    """x · γ / sqrt(mean(x²) + ε) over the last dimension (arXiv 1910.07467, Equation 4).

    Of primitives, so that it has a tangent under `torch.compile` of `torch.func.jvp`. float16 and
    bfloat16 are normalised in float32. `dim` is the length of the last dimension, `eps` is ε.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))  # γ

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim) in x's dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762, Section 3.2.2) whose core is
    `jvp_flash_attention.attention`: differentiable forward and backward, twice.

        q, k, v = split(W x)        or, with a context,   q = W_q x,  (k, v) = split(W_kv context)
        q, k    = rope(norm(q)), rope(norm(k))
        y       = W_o softmax(q kᵀ / sqrt(D) + mask) v

    Self-attention has one fused projection `qkv`, whose rows are the H query heads, then the Hk key
    heads, then the Hk value heads. Cross attention has `q` and a fused `kv` instead.

    Args:
        dim: width W of x and of the output.
        num_heads: H. The head dim D is dim / H.
        num_kv_heads: Hk, a divisor of H: grouped-query attention (arXiv 2305.13245); H by default.
        context_dim: width C of the context; given, the module is a cross attention.
        qk_norm: normalise queries and keys by an RMSNorm over D each (arXiv 2302.05442).
        rope: applied to the queries (B, H, L, D) and to the keys (B, Hk, S, D) after their norm,
            keeps the shape; a rotary embedding (arXiv 2104.09864) or any other. A module is
            registered as `rope`.
        dropout_p: probability of dropping an attention weight in training mode.
        is_causal: query i attends keys j <= i.
        softcap: scores S become softcap · tanh(S / softcap), as in `attention`; 0 for none.
        window: (left, right), a sliding window, as in `attention`.
        qkv_bias: biases in the projections to q, k and v.
        out_bias: bias in the output projection.
        backend: as in `attention`.

    Raises:
        ValueError: the sizes do not divide, dropout_p is not in [0, 1), softcap is neither 0 nor
            from 1e-30 to 1e30, or the window's bounds are not a pair of integers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        context_dim: int | None = None,
        qk_norm: bool = False,
        rope: Callable[[Tensor], Tensor] | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        softcap: float = 0.0,
        window: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _divides("num_heads", num_heads, "dim", dim)
        _divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
        self.dim, self.context_dim = dim, context_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.dropout_p, self.is_causal, self.backend = dropout_p, is_causal, backend
        validation.soft_cap(softcap)
        self.softcap, self.window = softcap, validation.window(window)
        kv_dim = 2 * num_kv_heads * self.head_dim
        if context_dim is None:
            self.qkv = nn.Linear(dim, dim + kv_dim, bias=qkv_bias)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(context_dim, kv_dim, bias=qkv_bias)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.rope = rope
        self.out = nn.Linear(dim, dim, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        cu_seqlens: Seqlens = None,
        block_mask: Any = None,
        tangent_rows: Range = None,
        tangent_keys: Range = None,
    ) -> Tensor:
        """
        Args:
            x: (B, L, W).
            context: (B, S, C), where the module was made with `context_dim`, and only there.
            attn_mask: broadcastable to (B, H, L, S), bool or floating, as in `attention`.
            cu_seqlens, block_mask: as in `attention`. `rope` is handed whole rows and is to count
                packed positions itself.
            tangent_rows, tangent_keys: as in `attention`: the rows of x, and of x or the context,
                that carry a tangent there.

        Returns:
            (B, L, W).

        Raises:
            ValueError: a shape is not as above; and what `attention` raises.
        """
        q, k, v = self._project(x, context)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        out = attention(
            q, k, v, attn_mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=self.is_causal,
            softcap=self.softcap,
            window=self.window,
            cu_seqlens=cu_seqlens,
            block_mask=block_mask,
            tangent_rows=tangent_rows,
            tangent_keys=tangent_keys,
            enable_gqa=self.num_kv_heads != self.num_heads,
            backend=self.backend,
        )  # (B, H, L, D)  # fmt: skip
        return self.out(out.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, L, D), k (B, Hk, S, D), v (B, Hk, S, D)."""
        _sequence("x", x, self.dim)
        H, Hk = self.num_heads, self.num_kv_heads
        if self.context_dim is None:
            if context is not None:
                raise ValueError("context must be None: the module was made without context_dim")
            heads = self.qkv(x).unflatten(-1, (H + 2 * Hk, self.head_dim)).transpose(1, 2)
            q, k, v = heads.split((H, Hk, Hk), dim=1)
            return q, k, v
        if context is None:
            raise ValueError(f"context is missing: pass a tensor (B, S, {self.context_dim})")
        _sequence("context", context, self.context_dim)
        q = self.q(x).unflatten(-1, (H, self.head_dim)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2 * Hk, self.head_dim)).transpose(1, 2).chunk(2, 1)
        return q, k, v


def _divides(name: str, n: int, of: str, total: int) -> None:
    if n < 1 or total < 1 or total % n:
        raise ValueError(f"{name} must be a positive divisor of {of} = {total}, got {n}")


def _sequence(name: str, x: Tensor, width: int) -> None:
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"{name} must have shape (batch, length, {width}), got {tuple(x.shape)}")
