"""FlashAttention's functions by their names, arguments and layout (B, L, H, D), with a tangent.

    from jvp_flash_attention.flash_attn import flash_attn_func      # instead of flash_attn

Each is `jvp_flash_attention.attention` on transposed views: nothing is copied, results come in the
layout of q. As in FlashAttention, grouped heads need no flag, and `causal` and `window_size` are
aligned bottom-right where the lengths differ. ALiBi, paged caches and the returned probabilities
raise NotImplementedError by name.
"""

from typing import Any

import torch
from torch import Tensor

from . import validation
from .api import attention
from .call import Band, Packed

_NOT_YET = {
    "alibi_slopes": None,
    "return_attn_probs": False,
    "block_table": None,
    "rotary_cos": None,
    "rotary_sin": None,
    "cache_batch_idx": None,
    "cache_leftpad": None,
    "k": None,
    "v": None,
    "return_softmax_lse": False,
}


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention of q over k and v.

    Args:
        q: (B, L, H, D).
        k, v: (B, S, Hk, D), Hk a divisor of H.
        dropout_p: probability of dropping an attention weight.
        softmax_scale: by default 1/sqrt(D).
        causal: query i attends keys j <= i + S − L.
        window_size: (left, right), a sliding window: query i attends keys
            i + S − L − left <= j <= i + S − L + right; -1 for no bound.
        softcap: scores S become softcap · tanh(S / softcap) before masks; 0 for none.
        deterministic: follows `torch.use_deterministic_algorithms`; True asks nothing more here.

    Returns:
        (B, L, H, D).

    Raises:
        NotImplementedError: alibi_slopes or return_attn_probs is given.
        TypeError, ValueError: those of `attention`.
    """
    _refuse(alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs)
    return _attend(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap)


def flash_attn_qkvpacked_func(qkv: Tensor, *args, **kwargs) -> Tensor:
    """`flash_attn_func` of one tensor qkv (B, L, 3, H, D), with its other arguments."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args, **kwargs) -> Tensor:
    """`flash_attn_func` of q (B, L, H, D) and kv (B, S, 2, Hk, D), with its other arguments."""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention of sequences of different lengths that lie behind one another, in one call.

    Rows behind the last sequence give 0. On a GPU the host does not read the lengths, and nothing
    checks them.

    Args:
        q: (sum of L, H, D).
        k, v: (sum of S, Hk, D).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1), int32: where each begins, and the last ends.
            One tensor given twice is two lengths that are equal, which costs less.
        max_seqlen_q, max_seqlen_k: the longest; not needed here.

    The other arguments and the errors are those of `flash_attn_func`.

    Returns:
        (sum of L, H, D).
    """
    _refuse(alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs, block_table=block_table)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    gqa = q.shape[0] != k.shape[0]
    out = attention(
        q, k, v, None, dropout_p, False, softmax_scale, gqa,
        softcap=softcap,
        window=_band(causal, window_size),
        cu_seqlens=Packed(cu_seqlens_q, cu_seqlens_k, lower_right=True),
    )  # fmt: skip
    return out.transpose(0, 1)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args, **kwargs
) -> Tensor:
    """`flash_attn_varlen_func` of one tensor qkv (sum of L, 3, H, D), with its other arguments."""
    q, k, v = qkv.unbind(1)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *lengths, *args, **kwargs)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args, **kwargs) -> Tensor:
    """`flash_attn_varlen_func` of q (sum of L, H, D) and kv (sum of S, 2, Hk, D), with its other
    arguments."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """Attention of q over a cache of which the first `cache_seqlens` positions are filled.

    Args:
        q: (B, L, H, D).
        k_cache, v_cache: (B, S, Hk, D).
        cache_seqlens: int, or (B,): how many positions count; all by default.
        causal: the last query attends all of them, the one before it one less.

    New keys are not appended here (`k`, `v`): write them into the cache before. The other arguments
    that raise NotImplementedError are named by the error. `num_splits` changes nothing.

    Returns:
        (B, L, H, D).
    """
    _refuse(
        k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, block_table=block_table,
        alibi_slopes=alibi_slopes, return_softmax_lse=return_softmax_lse,
    )  # fmt: skip
    if cache_seqlens is None:
        return _attend(q, k_cache, v_cache, 0.0, softmax_scale, causal, window_size, softcap)
    B, L, S = *q.shape[:2], k_cache.shape[1]
    validation.cache_lengths(cache_seqlens, B, S)
    lengths = torch.as_tensor(cache_seqlens, device=q.device).view(-1, 1, 1, 1)
    j = torch.arange(S, device=q.device)
    rows = lengths - L + torch.arange(L, device=q.device).view(L, 1)  # key beside each query
    left, right = _band(causal, window_size)
    mask = j < lengths
    if right is not None:
        mask = mask & (j <= rows + right)
    if left is not None:
        mask = mask & (j >= rows - left)
    return _attend(q, k_cache, v_cache, 0.0, softmax_scale, False, (-1, -1), softcap, mask)


def _band(causal: bool, window_size: tuple[int, int]) -> Band:
    """The bounds beside the bottom-right diagonal."""
    left, right = validation.window(window_size) or Band()
    return Band(left, 0 if causal else right)


def _attend(
    q, k, v, dropout_p, scale, causal, window, softcap, mask: Tensor | None = None
) -> Tensor:
    left, right = _band(causal, window)
    more = k.shape[1] - q.shape[1]  # `attention` counts from the first query and key
    band = Band(
        None if left is None else left - more,
        None if right is None else right + more,
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = attention(q, k, v, mask, dropout_p, False, scale, gqa, softcap=softcap, window=band)
    return out.transpose(1, 2)


def _refuse(**given: Any) -> None:
    for name, x in given.items():
        default = _NOT_YET[name]
        if x is not default and (isinstance(x, Tensor) or x != default):
            raise NotImplementedError(
                f"{name} is not supported yet by jvp_flash_attention.flash_attn, got"
                f" {tuple(x.shape) if isinstance(x, Tensor) else x}; leave it at {default}"
            )
