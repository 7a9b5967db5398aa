"""Every rule on the arguments of a call and the one line that its violation prints."""

import math
import warnings
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Types, ranks, dtypes and devices of the three inputs."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise NotImplementedError(
                f"{name} must be a dense strided tensor, got layout {x.layout}"
            )
        if x.dim() < 2:
            raise ValueError(
                f"{name} must have shape (..., heads, length, head dim), got {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(
                f"{name} must have query's dtype {query.dtype}, got {x.dtype}; cast one of them"
            )
        if x.device != query.device:
            raise ValueError(
                f"{name} must be on query's device {query.device}, got {x.device}; move one of them"
            )


def shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Agreement of batch, heads, lengths and head dims."""
    _layout(query, key)
    if query.shape == key.shape == value.shape and query.numel() > 0:
        return
    q, k, v = ((1,) * (3 - x.dim()) + tuple(x.shape) for x in (query, key, value))
    if not q[:-3] == k[:-3] == v[:-3]:
        raise ValueError(
            f"query, key and value must share their batch dimensions, got shapes {q}, {k} and {v}"
        )
    if q[-1] == 0 or v[-1] == 0:
        raise ValueError(
            f"head dim must be at least 1, got {q[-1]} for query and {v[-1]} for value"
        )
    if q[-3] == 0:
        raise ValueError("query must have at least 1 head, got 0")
    if k[-1] != q[-1]:
        raise ValueError(f"key must have query's head dim {q[-1]}, got {k[-1]}")
    if v[-2] != k[-2]:
        raise ValueError(f"value must have key's length {k[-2]}, got {v[-2]}")
    if v[-3] != k[-3]:
        raise ValueError(f"value must have key's number of heads {k[-3]}, got {v[-3]}")
    if k[-3] == q[-3]:
        return
    if not enable_gqa:
        advice = "pass enable_gqa=True for grouped-query attention"
        if k[-3] == 0 or q[-3] % k[-3]:
            advice = "repeat or cut them"
        if q[-2] == k[-2] and q[-3] != k[-3]:
            advice = (
                f"tensors of layout (..., length, heads, D) would have {q[-2]} heads and these"
                " lengths: transpose(1, 2) them, or use jvp_flash_attention.flash_attn;"
                f" otherwise {advice}"
            )
        raise ValueError(f"key and value must have query's {q[-3]} heads, got {k[-3]}; {advice}")
    if k[-3] == 0 or q[-3] % k[-3]:
        raise ValueError(
            "with enable_gqa the query heads must be a multiple of the key heads,"
            f" got {q[-3]} and {k[-3]}"
        )


def _layout(query: Tensor, key: Tensor) -> None:
    """Warns of (B, L, H, D) where (B, H, L, D) belongs: it computes something, and something else.
    No model has 64 heads and more over a quarter as many positions."""
    if query.dim() < 4 or query.shape[-3] < 64:
        return
    H, longest = query.shape[-3], max(query.shape[-2], key.shape[-2])
    if 1 < longest <= H // 4:
        warnings.warn(
            f"query has {H} heads over sequences of {longest}, by the layout (..., heads, length,"
            " D); if it is (..., length, heads, D), transpose(1, 2) it, or use"
            " jvp_flash_attention.flash_attn",
            stacklevel=5,
        )


def mask(attn_mask: Tensor | None, scores: tuple[int, ...], device: torch.device) -> None:
    """`attn_mask` is bool or floating and broadcasts to the shape `scores` = (..., H, L, S)."""
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.layout != torch.strided:
        raise NotImplementedError(
            f"attn_mask must be a dense strided tensor, got layout {attn_mask.layout}"
        )
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(
            "attn_mask must be bool (True attends) or floating (added to the scores),"
            f" got {attn_mask.dtype};"
            " use attn_mask.bool()"
        )
    if attn_mask.device != device:
        raise ValueError(f"attn_mask must be on query's device {device}, got {attn_mask.device}")
    padded = (1,) * (len(scores) - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(padded) != len(scores) or any(
        m not in (1, n) for m, n in zip(padded, scores, strict=True)
    ):
        raise ValueError(
            f"attn_mask must broadcast to (..., heads, L, S) = {scores},"
            f" got {tuple(attn_mask.shape)}"
        )


def scalars(dropout_p: float, is_causal: bool, scale: float | None) -> None:
    """Kinds and ranges of the numbers."""
    for name, x in (("dropout_p", dropout_p), ("scale", scale)):
        if isinstance(x, Tensor):  # it would be read once, and have neither gradient nor tangent
            raise TypeError(
                f"{name} must be a Python number, got a torch.Tensor; fold it into query"
            )
        if x is not None and not isinstance(x, Real):
            raise TypeError(f"{name} must be a Python number, got {x!r}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {is_causal!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def tangent(name: str, t: Tensor | None, primal: Tensor | None) -> None:
    """A tangent has its primal's shape, dtype and device."""
    if t is None:
        return
    if primal is None or not primal.is_floating_point():
        raise ValueError(f"{name} must be None where there is no floating attn_mask")
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(t).__name__}")
    if t.shape != primal.shape:
        raise ValueError(
            f"{name} must have its primal's shape {tuple(primal.shape)}, got {tuple(t.shape)}"
        )
    if t.dtype != primal.dtype:
        raise TypeError(f"{name} must have its primal's dtype {primal.dtype}, got {t.dtype}")
    if t.device != primal.device:
        raise ValueError(f"{name} must be on its primal's device {primal.device}, got {t.device}")
