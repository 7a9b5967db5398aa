"""Every rule on the arguments of a call and the one line that its violation prints."""

import math
import warnings
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
import torch.fx
from torch import Tensor

from .broadcast import Sizes, together
from .call import Band, Packed, Spec
from .errors import ArgumentTypeError, ArgumentValueError
from .functorch import is_functorch_wrapped_tensor, is_watched, without_functorch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Types, ranks, dtypes and devices of the three inputs."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            traced = "; torch.fx keeps the call after torch.fx.wrap('attention')"
            hint = traced if isinstance(x, torch.fx.Proxy) else ""
            raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}{hint}")
        if x.is_nested:
            raise NotImplementedError(
                f"{name} must be a dense tensor, got a nested one; make query a jagged one too, or"
                " use jvp_flash_attention.flash_attn.flash_attn_varlen_func"
            )
        if x.layout != torch.strided:
            raise NotImplementedError(
                f"{name} must be a dense strided tensor, got layout {x.layout}"
            )
        if x.dim() < 2:
            raise ArgumentValueError(
                f"{name} must have shape (..., heads, length, head dim), got {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ArgumentTypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}"
            )
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ArgumentTypeError(
                f"{name} must have query's dtype {query.dtype}, got {x.dtype}; cast one of them"
            )
        if x.device != query.device:
            raise ArgumentValueError(
                f"{name} must be on query's device {query.device}, got {x.device}; move one of them"
            )


def shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Sizes:
    """Agreement of batch, heads, lengths and head dims, and what the first two broadcast to."""
    _layout(query, key)
    q, k, v = query.shape, key.shape, value.shape
    if q == k == v:
        return Sizes(q[:-2], q[-3] if len(q) > 2 else 1)
    batch = together(q[:-3], k[:-3], v[:-3])
    if batch is None:
        raise ArgumentValueError(
            "query, key and value must share their batch dimensions, or have 1 there, got shapes"
            f" {tuple(q)}, {tuple(k)} and {tuple(v)}"
        )
    if k[-1] != q[-1]:
        raise ArgumentValueError(f"key must have query's head dim {q[-1]}, got {k[-1]}")
    if v[-2] != k[-2]:
        raise ArgumentValueError(f"value must have key's length {k[-2]}, got {v[-2]}")
    if len(q) == len(k) == len(v) == 2:
        return Sizes((), 1)
    q_heads, k_heads, v_heads = (x[-3] if len(x) > 2 else 1 for x in (q, k, v))
    if enable_gqa and not q_heads == k_heads == v_heads:
        if not (_divides(k_heads, q_heads) and _divides(v_heads, q_heads)):
            heads = str(k_heads) if k_heads == v_heads else f"{k_heads} and {v_heads}"
            raise ArgumentValueError(
                "with enable_gqa the query heads must be a multiple of the key and value heads,"
                f" got {q_heads} and {heads}"
            )
        return Sizes((*batch, q_heads), k_heads if k_heads == v_heads else q_heads)
    heads = together((q_heads,), (k_heads,), (v_heads,))
    if heads is None and k_heads != v_heads:
        raise ArgumentValueError(
            f"value must have key's number of heads {k_heads}, or 1, got {v_heads}"
        )
    if heads is None:
        raise ArgumentValueError(
            f"key and value must have query's {q_heads} heads, or 1, got {k_heads};"
            f" {_advice(query, key, q_heads, k_heads)}"
        )
    return Sizes((*batch, *heads), 1 if k_heads == v_heads == 1 else heads[0])


def _divides(few: int, many: int) -> bool:
    return few > 0 and many % few == 0


def _advice(query: Tensor, key: Tensor, q_heads: int, k_heads: int) -> str:
    """What to do where the heads differ. Equal "lengths" beside different "heads" are what cross
    attention of (B, L, H, D) looks like."""
    advice = "repeat or cut them"
    if _divides(k_heads, q_heads):
        advice = "pass enable_gqa=True for grouped-query attention"
    if query.shape[-2] != key.shape[-2]:
        return advice
    layout = (
        f"tensors of layout (..., length, heads, D) would have {query.shape[-2]} heads and these"
        " lengths: transpose(1, 2) them, or use jvp_flash_attention.flash_attn.flash_attn_func"
    )
    return layout if looks_transposed(query, key) else f"{layout}; otherwise {advice}"


def _layout(query: Tensor, key: Tensor) -> None:
    """Warns of (B, L, H, D) where (B, H, L, D) belongs: it computes something, and something else.
    No model has 64 heads and more over a quarter as many positions."""
    if looks_transposed(query, key) and together(query.shape[-3:-2], key.shape[-3:-2]) is not None:
        warnings.warn(
            f"query has {query.shape[-3]} heads over sequences of {query.shape[-2]}, by the layout"
            " (..., heads, length, D); if it is (..., length, heads, D), transpose(1, 2) it, or use"
            " jvp_flash_attention.flash_attn.flash_attn_func",
            stacklevel=6,
        )


def looks_transposed(query: Tensor, key: Tensor) -> bool:
    """Whether `shapes` may warn of these."""
    if query.dim() < 4 or query.shape[-3] < 64:
        return False
    return 1 < max(query.shape[-2], key.shape[-2]) <= query.shape[-3] // 4


def mask(attn_mask: Tensor | None, scores: tuple[int, ...], device: torch.device) -> None:
    """`attn_mask` is bool or floating and broadcasts to the shape `scores` = (..., H, L, S)."""
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise ArgumentTypeError(
            f"attn_mask must be a torch.Tensor or None, got {type(attn_mask).__name__}"
        )
    if attn_mask.layout != torch.strided:
        raise NotImplementedError(
            f"attn_mask must be a dense strided tensor, got layout {attn_mask.layout}"
        )
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ArgumentTypeError(
            "attn_mask must be bool (True attends) or floating (added to the scores),"
            f" got {attn_mask.dtype};"
            " use attn_mask.bool()"
        )
    if attn_mask.is_floating_point() and attn_mask.dtype not in DTYPES:
        raise ArgumentTypeError(
            "a floating attn_mask must be float16, bfloat16, float32 or float64, got"
            f" {attn_mask.dtype}; cast it, as attn_mask.to(query.dtype)"
        )
    if attn_mask.device != device:
        raise ArgumentValueError(
            f"attn_mask must be on query's device {device}, got {attn_mask.device}"
        )
    padded = (1,) * (len(scores) - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(padded) != len(scores) or any(
        m not in (1, n) for m, n in zip(padded, scores, strict=True)
    ):
        raise ArgumentValueError(
            f"attn_mask must broadcast to (..., heads, L, S) = {scores},"
            f" got {tuple(attn_mask.shape)}; one (B, S) of keys is attn_mask[:, None, None, :],"
            " one (B, L, S) of pairs attn_mask[:, None]"
        )


def window(given: Any) -> Band | None:
    """The bounds of a pair (left, right), which are None or ints >= 0, or -1 for None. A `Band`,
    as callers inside the library give it, is taken as it is."""
    if given is None or isinstance(given, Band):
        return given
    pair = given if isinstance(given, (tuple, list)) else ()
    kinds = [x is None or (isinstance(x, int) and not isinstance(x, bool)) for x in pair]
    if len(pair) != 2 or not all(kinds):
        raise ArgumentTypeError(
            "window must be a pair (left, right) of ints, with -1 or None for no bound,"
            f" got {given!r}"
        )
    if any(x is not None and x < -1 for x in pair):
        raise ArgumentValueError(
            f"window must have bounds >= 0, with -1 or None for no bound, got {given!r}"
        )
    return Band(*[None if x == -1 else x for x in pair])


def ranges(rows: Any, keys: Any) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """`tangent_rows` and `tangent_keys`: each a pair (start, stop) of ints, or None."""
    found = []
    for name, given in (("tangent_rows", rows), ("tangent_keys", keys)):
        pair = given if isinstance(given, (tuple, list)) else ()
        kinds = [isinstance(x, int) and not isinstance(x, bool) for x in pair]
        if given is not None and (len(pair) != 2 or not all(kinds)):
            raise ArgumentTypeError(
                f"{name} must be a pair (start, stop) of ints, or None where all have a tangent,"
                f" got {given!r}"
            )
        found.append(None if given is None else tuple(pair))
    return found[0], found[1]


def ranges_fit(ranges: Any, spec: Spec, cu: Packed, L: int, S: int) -> None:
    """Ranges without a tangent lie inside of the rows, and beside nothing that they do not go
    with."""
    sizes = (("tangent_rows", L, spec.block_q), ("tangent_keys", S, spec.block_k))
    for given, (name, length, block) in zip(ranges, sizes, strict=True):
        if given is None:
            continue
        start, stop = given
        if not 0 <= start <= stop <= length:
            raise ArgumentValueError(
                f"{name} must be (start, stop) with 0 <= start <= stop <= {length}, got {given}"
            )
        if cu.cu_q is not None:
            raise NotImplementedError(
                f"{name} is not supported beside cu_seqlens, got {given}; leave it out and pass"
                " tangents that are zero there"
            )
        if spec.dropout_p > 0.0:
            raise NotImplementedError(
                f"{name} is not supported beside dropout, got {given} and dropout_p ="
                f" {spec.dropout_p}; leave it out and pass tangents that are zero there"
            )
        if block is not None and any(x % block and x != length for x in given):
            raise NotImplementedError(
                f"{name} must begin and end where blocks of {block} do beside block_mask, got"
                f" {given}; round it outward and pass tangents that are zero there"
            )


def packed(given: Any) -> Packed:
    """`cu_seqlens`: one tensor, or one of the queries and one of the keys. A `Packed`, as callers
    inside the library give it, keeps where it is aligned."""
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    if len(pair) not in (2, 3) or not all(isinstance(cu, Tensor) for cu in pair[:2]):
        raise ArgumentTypeError(
            "cu_seqlens must be a tensor, or a pair of tensors (of the queries, of the keys),"
            f" got {given!r}"
        )
    if pair[1] is pair[0]:  # both ends of a sequence are aligned
        return Packed(pair[0])
    return Packed(*pair)


def sequences(cu: Packed, attn_mask: Tensor | None, device: torch.device) -> None:
    """Kinds and number of the packed sequences, and what does not go with them."""
    if cu.cu_q is None:
        return
    for name, x in zip(_names(cu), (cu.cu_q, cu.cu_k), strict=True):
        if x is None:
            continue
        if x.dtype != torch.int32:
            raise ArgumentTypeError(f"{name} must be int32, got {x.dtype}; use {name}.int()")
        if x.dim() != 1 or x.shape[0] == 0:
            raise ArgumentValueError(
                f"{name} must have shape (sequences + 1,), got {tuple(x.shape)}"
            )
        if x.device != device:
            raise ArgumentValueError(
                f"{name} must be on query's device {device}, got {x.device}; move it there"
            )
    if cu.cu_k is not None and cu.cu_k.shape != cu.cu_q.shape:
        raise ArgumentValueError(
            "cu_seqlens_q and cu_seqlens_k must be of equally many sequences,"
            f" got {cu.cu_q.shape[0] - 1} and {cu.cu_k.shape[0] - 1}"
        )
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask is not supported beside cu_seqlens; call attention once for each sequence,"
            " or pad the sequences to (B, H, L, D) and let the mask hide the padding"
        )


def blocks(given: Any, q: Tensor, k: Tensor, beside: dict[str, Any]) -> None:
    """A block mask covers the rows and keys of q and k (B, H, rows, D), alone."""
    for name, x in beside.items():
        if x is not None:
            raise NotImplementedError(
                f"{name} is not supported beside block_mask; leave out of the block mask what it"
                " hides, or give all of it as a bool attn_mask"
            )
    found, sizes = given.kv_blocks, (given.block_q, given.block_k)
    if found is None:
        return
    B, H, L, _ = q.shape
    wanted = (B, H, -(-L // sizes[0]), -(-k.shape[2] // sizes[1]))
    got = (*found.shape[:3], found.shape[3] - 1)
    if got[2:] != wanted[2:] or any(n not in (1, m) for n, m in zip(got[:2], (B, H), strict=True)):
        raise ArgumentValueError(
            f"block_mask must broadcast to (B, H, nQ, nK) = {wanted} in blocks of"
            f" {sizes[0]} x {sizes[1]}, got {got}"
        )
    if found.device != q.device:
        raise ArgumentValueError(
            f"block_mask must be on query's device {q.device}, got {found.device}; make it there"
        )


def lengths(cu: Packed, L: int, S: int) -> None:
    """Packed sequences lie inside of the rows, where reading them waits for no device."""
    cu_k = cu.cu_q if cu.cu_k is None else cu.cu_k
    for name, x, rows in zip(_names(cu), (cu.cu_q, cu_k), (L, S), strict=True):
        if x is None or not _is_read(x):
            continue
        with without_functorch():  # below a jvp torch 2.8 reads no tensor
            ends = x.tolist()
        if ends[0] != 0 or ends[-1] > rows or any(a > b for a, b in pairwise(ends)):
            raise ArgumentValueError(
                f"{name} must rise from 0 to at most {rows}, the number of rows, got {ends}"
            )


def cache_lengths(given: Any, B: int, S: int) -> None:
    """`cache_seqlens`: how many of S positions are filled, of all or of each of B entries."""
    if isinstance(given, Tensor):
        if given.shape not in ((), (1,), (B,)) or given.is_floating_point():
            raise ArgumentValueError(
                f"cache_seqlens must be an int or ({B},) integers, got {given.dtype}"
                f" {tuple(given.shape)}"
            )
        return
    if not isinstance(given, int) or not 0 <= given <= S:
        raise ArgumentValueError(f"cache_seqlens must be from 0 to {S}, got {given!r}")


def _names(cu: Packed) -> tuple[str, str]:
    """Of the queries' and the keys' argument: one for both, or a pair."""
    if cu.cu_k is None:
        return "cu_seqlens", "cu_seqlens"
    return "cu_seqlens_q", "cu_seqlens_k"


def _is_read(x: Tensor) -> bool:
    """Whether the elements of a tensor may be looked at, and that costs nothing."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    return not is_watched() and not is_functorch_wrapped_tensor(x)


def scalars(
    dropout_p: float, is_causal: bool, scale: float | None, softcap: float, enable_gqa: bool
) -> None:
    """Kinds and ranges of the numbers."""
    for name, x in (("dropout_p", dropout_p), ("scale", scale)):
        if isinstance(x, Tensor):  # it would be read once, and have neither gradient nor tangent
            raise ArgumentTypeError(
                f"{name} must be a Python number, got a torch.Tensor; fold it into query"
            )
        if x is not None and not isinstance(x, Real):
            raise ArgumentTypeError(f"{name} must be a Python number, got {x!r}")
    for name, x in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(x, bool):
            raise ArgumentTypeError(f"{name} must be a bool, got {x!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ArgumentValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if scale is not None and not -math.inf < scale < math.inf:  # math.isfinite is not traced
        raise ArgumentValueError(f"scale must be finite, got {scale}")
    soft_cap(softcap)


def soft_cap(softcap: float) -> None:
    """0 for none, or a number above it that float32 can multiply and divide by."""
    if isinstance(softcap, bool) or not isinstance(softcap, Real):
        raise ArgumentTypeError(
            f"softcap must be a Python number, 0 for none, got {type(softcap).__name__}"
        )
    if not 0.0 <= softcap <= 1e30 or 0.0 < softcap < 1e-30:
        raise ArgumentValueError(
            f"softcap must be 0 for none, or from 1e-30 to 1e30, got {softcap}"
        )


def tangent(name: str, t: Tensor | None, primal: Tensor | None) -> None:
    """A tangent has its primal's shape, dtype and device."""
    if t is None:
        return
    if primal is None or not primal.is_floating_point():
        raise ArgumentValueError(f"{name} must be None where there is no floating attn_mask")
    if not isinstance(t, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor or None, got {type(t).__name__}")
    if t.shape != primal.shape:
        raise ArgumentValueError(
            f"{name} must have its primal's shape {tuple(primal.shape)}, got {tuple(t.shape)}"
        )
    if t.dtype != primal.dtype:
        raise ArgumentTypeError(
            f"{name} must have its primal's dtype {primal.dtype}, got {t.dtype}"
        )
    if t.device != primal.device:
        raise ArgumentValueError(
            f"{name} must be on its primal's device {primal.device}, got {t.device}"
        )
