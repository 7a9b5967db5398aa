"""The public functions: check, unpack duals, choose an implementation, pack duals."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import (
    autograd,
    backends,
    broadcast,
    jagged,
    ops,
    shadowed,
    transforms,  # noqa: F401 (registers what transforms make of the operators)
    validation,
)
from .block_mask import block_mask as lists_of
from .broadcast import Sizes
from .call import Band, Blocks, Inputs, Packed, Spec, Tangents, banded, changed
from .call import band as band_of
from .functorch import PLAIN, SHORTCUTS, Pairs, below_duals, pack, unpack, unpack_compiled

shadowed.check()

Window = tuple[int | None, int | None] | None
Range = tuple[int, int] | None
Seqlens = Tensor | tuple[Tensor, Tensor] | Packed | None
UNPACKED, UNBLOCKED = Packed(), Blocks()
TANGENTS = ("t_query", "t_key", "t_value", "t_attn_mask")
UNDETACHED = (
    "tangent_grad=False in a compiled torch.func.jvp must not lie inside another transform (grad,"
    " vjp, vmap, jvp); leave it out and detach the tangent that the jvp returns"
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float = 0.0,
    window: Window = None,
    cu_seqlens: Seqlens = None,
    block_mask: Any = None,
    tangent_rows: Range = None,
    tangent_keys: Range = None,
    backend: str | None = None,
    tangent_grad: bool = True,
) -> Tensor:
    """Scaled dot-product attention, differentiable forward and backward: softmax(s Q Kᵀ + b) V.

    A drop-in for `torch.nn.functional.scaled_dot_product_attention` with the same names, positions,
    layout and meaning. Call it plainly, under `torch.func.jvp` or inside `forward_ad.dual_level`:
    where an input carries a tangent, the output carries its tangent, computed in the same pass over
    the keys in O(L) memory (mathematics: docs/mathematics.md).

    Args:
        query: (..., H, L, D), float16, bfloat16, float32 or float64. Jagged nested tensors (B, H,
            L*, D) are packed sequences, and the result is jagged too; PyTorch gives them no forward
            mode, so their tangent is that of `attention_jvp`.
        key: (..., Hk, S, D), query's dtype and device; Hk = H, or a divisor of H with `enable_gqa`.
        value: (..., Hk, S, Dv), query's dtype and device. Batch and head dimensions of the three
            broadcast, with stride 0.
        attn_mask: broadcastable to (..., H, L, S). Bool: True attends. Floating: added to the
            scaled scores; it may hold −inf, has a gradient and may have a tangent. A row that
            attends nothing gives 0. PyTorch's `CausalBias` becomes the (L, S) mask it stands for;
            `is_causal` costs nothing.
        dropout_p: probability of dropping an attention weight, in [0, 1). As in SDPA there is no
            training flag.
        is_causal: query i attends keys j <= i (top-left aligned when L != S); may be combined with
            `attn_mask`.
        scale: softmax scale s, by default 1/sqrt(D).
        enable_gqa: let query head h read key/value head h // (H / Hk).
        softcap: c > 0 replaces the scaled scores S by c tanh(S / c) before masks are added, as in
            Gemma 2 (arXiv 2408.00118); 0 for none. On a GPU it takes the kernels of
            `kernels/portable`.
        window: (left, right), a sliding window: query i attends keys i - left <= j <= i + right, -1
            or None for no bound. As `is_causal` it counts from the first query and the first key
            also when L != S (`flash_attn_func` counts from the last), and may be combined with
            `is_causal` and `attn_mask`. Keys outside cost nothing in any pass. A GPU compiles
            kernels for each pair of bounds.
        cu_seqlens: sequences of different lengths that lie behind one another in L and S: one
            (sequences + 1,) int32 tensor on query's device, from 0 up, of where each begins and the
            last ends, or a pair, of the queries and of the keys. Queries attend the keys of their
            own sequence, and pairs of two sequences cost nothing in the kernels. `is_causal` and
            `window` count from the first query and key of each (`flash_attn_varlen_func` from the
            last). Rows behind the last one give 0. All batch entries are packed alike. There is no
            `attn_mask` beside it. On a GPU nothing waits for the lengths, so they are not checked.
        block_mask: which blocks of queries see which blocks of keys: what
            `jvp_flash_attention.block_mask.block_mask` returns, or outside of compiled code a
            `BlockMask` of flex_attention whose blocks are seen whole or not at all. Blocks that are
            not seen cost nothing in the kernels. It stands alone: no other mask, causal, window or
            cu_seqlens beside it.
        tangent_rows: (start, stop) with 0 <= start <= stop <= L, the only queries that carry a
            tangent; t_query is read there alone. The tangent of every other row of the output is
            zero by definition, and those rows cost a plain call. For rows that stand still along
            the derivative, as the clean frames of teacher forcing. It is the twin in forward mode
            of a stop-gradient: values and ordinary gradients stay what they are, and a row outside
            whose true tangent is not zero loses it.
        tangent_keys: (start, stop) with 0 <= start <= stop <= S, the only keys whose t_key and
            t_value are read. Those of the others are zero by definition. The others cost four
            products of six, or two beside queries without a tangent, and merging them with the
            first a pass over O and tO. In 16 bits that rounds both once more, to 1.25 times the
            error. For the old keys of a KV cache. A floating `attn_mask` keeps its tangent
            everywhere, and beside one nothing is saved. Neither range goes with packed sequences or
            dropout. Beside `block_mask` they begin and end where blocks do. On a GPU a range beside
            `is_causal` or a window compiles kernels of its own.
        backend: "triton", "reference" (plain PyTorch, O(L) memory), or None: the kernels for CUDA
            tensors in float16, bfloat16 and float32 with head dims up to 256, the reference
            otherwise.
        tangent_grad: False where the tangent is a target and not differentiated, as in MeanFlow,
            sCM and TVM's stop-gradients: it comes back detached (`Tensor.detach`), and a call under
            `torch.func.jvp` saves for backward, and runs in backward, what a plain call does.

    Returns:
        (..., H, L, Dv) in query's dtype.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype or device.
        NotImplementedError: the requested backend cannot serve the inputs, or a third derivative or
            a jvp of a jvp is asked for.
    """
    if jagged.is_jagged(query):
        return jagged.attend(
            attention, {"query": query, "key": key, "value": value}, attn_mask=attn_mask,
            dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            softcap=softcap, window=window, cu_seqlens=cu_seqlens, block_mask=block_mask,
            tangent_rows=tangent_rows, tangent_keys=tangent_keys,
            backend=backend, tangent_grad=tangent_grad,
        )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    numbers = (dropout_p, is_causal, scale, enable_gqa)
    if compiling and not SHORTCUTS:
        how = {"window": window, "cu_seqlens": cu_seqlens, "block_mask": block_mask}
        how |= {"backend": backend, "tangent_grad": tangent_grad, "softcap": softcap}
        how |= {"tangent_rows": tangent_rows, "tangent_keys": tangent_keys}
        return _uncompiled(attention)(query, key, value, attn_mask, *numbers, **how)
    numbers = (*numbers, backend, softcap, window, cu_seqlens, block_mask)
    numbers = (*numbers, tangent_rows, tangent_keys)
    x, _, spec, sizes = prepare(query, key, value, attn_mask, *numbers)
    if compiling:
        route, pairs = ops, unpack_compiled(*x, nested=None if tangent_grad else UNDETACHED)
    else:
        route, pairs = autograd, unpack(*x)
    if pairs is None:
        (out,) = route.attention(x, spec, tangent_grad)
        return broadcast.result(out, sizes)
    x, t = paired(x, pairs)
    if t is None:
        (out,) = below_duals(route.attention, x, spec, tangent_grad)
    else:
        out, t_out = below_duals(route.attention_jvp, x, t, spec, tangent_grad)
        out = pack(out, t_out)
    return broadcast.result(out, sizes)


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    t_query: Tensor | None,
    t_key: Tensor | None,
    t_value: Tensor | None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    t_attn_mask: Tensor | None = None,
    softcap: float = 0.0,
    window: Window = None,
    cu_seqlens: Seqlens = None,
    block_mask: Any = None,
    tangent_rows: Range = None,
    tangent_keys: Range = None,
    backend: str | None = None,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention and its Jacobian-vector product in one pass, without dual numbers.

    Args:
        t_query, t_key, t_value: tangents, each with its primal's shape, dtype and device; None
            means zero and saves the matrix products that it would take part in.
        t_attn_mask: tangent of a floating `attn_mask`, of its shape; None means zero.
        tangent_grad: False detaches `t_out` and the tangents: nothing is saved for backward that
            `attention` would not save, and its backward is that of `attention`.

    The other arguments and the errors are those of `attention`.

    Returns:
        (out, t_out), both (..., H, L, Dv) in query's dtype, both differentiable in every input and
        tangent; with `tangent_grad=False` only `out`, in the inputs.
    """
    if jagged.is_jagged(query):
        given = {"query": query, "key": key, "value": value}
        given |= {"t_query": t_query, "t_key": t_key, "t_value": t_value}
        return jagged.attend(
            attention_jvp, given, attn_mask=attn_mask, t_attn_mask=t_attn_mask,
            dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            softcap=softcap, window=window, cu_seqlens=cu_seqlens, block_mask=block_mask,
            tangent_rows=tangent_rows, tangent_keys=tangent_keys,
            backend=backend, tangent_grad=tangent_grad,
        )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    numbers = (dropout_p, is_causal, scale, enable_gqa)
    if compiling and not SHORTCUTS:
        args = (query, key, value, t_query, t_key, t_value, attn_mask, *numbers)
        how = {"window": window, "cu_seqlens": cu_seqlens, "block_mask": block_mask}
        how |= {"backend": backend, "tangent_grad": tangent_grad, "softcap": softcap}
        how |= {"tangent_rows": tangent_rows, "tangent_keys": tangent_keys}
        how["t_attn_mask"] = t_attn_mask
        return _uncompiled(attention_jvp)(*args, **how)
    tangents = (t_query, t_key, t_value, t_attn_mask)
    numbers = (*numbers, backend, softcap, window, cu_seqlens, block_mask)
    numbers = (*numbers, tangent_rows, tangent_keys)
    x, t, spec, sizes = prepare(query, key, value, attn_mask, *numbers, tangents)
    route = ops if compiling else autograd
    out, t_out = route.attention_jvp(x, t, spec, tangent_grad)
    return broadcast.result(out, sizes), broadcast.result(t_out, sizes)


def _uncompiled(function: Callable) -> Callable:
    """The function as the compiler leaves it to eager."""
    return torch.compiler.disable(function, recursive=True)


def prepare(
    query,
    key,
    value,
    attn_mask,
    dropout_p,
    is_causal,
    scale,
    enable_gqa,
    backend,
    softcap: float = 0.0,
    window: Window = None,
    cu_seqlens: Seqlens = None,
    block_mask: Any = None,
    tangent_rows: Range = None,
    tangent_keys: Range = None,
    tangents: tuple | None = None,
) -> tuple[Inputs, Any, Spec, Sizes]:
    """The checked call: its tensors four-dimensional, the `Tangents` if any are given, its
    numbers, and what its batch and heads broadcast to. What is of a kind that passed before is not
    checked again."""
    given = (query, key, value, attn_mask)
    band = None if window is None else validation.window(window)
    cu = UNPACKED if cu_seqlens is None else validation.packed(cu_seqlens)
    cu_q, cu_k, lower_right = cu
    blocks = UNBLOCKED if block_mask is None else lists_of(block_mask)
    # not sliced: the compiler of torch 2.8 slices no named tuple
    kv_blocks, q_blocks, block_q, block_k = blocks
    numbers = (dropout_p, is_causal, scale, enable_gqa, backend, softcap, band, lower_right)
    ranges = (tangent_rows, tangent_keys)
    if ranges != (None, None):
        ranges = validation.ranges(*ranges)
    numbers = (*numbers, ranges, (block_q, block_k))
    dtype = _autocast_dtype(query)
    kind = _kind((*given, cu_q, cu_k, kv_blocks, q_blocks), tangents, numbers, dtype)
    checked = None if kind is None else _checked.get(kind)
    q, k, v = query, key, value
    t_q, t_k, t_v, t_mask = tangents or Tangents()
    if dtype is not None:  # all together, before anything unpacks them
        q, k, v, t_q, t_k, t_v = (_cast(x, dtype) for x in (q, k, v, t_q, t_k, t_v))
    if checked is None:
        attn_mask = _with_elements(attn_mask, query)
        checked = _check(q, k, v, attn_mask, *numbers, cu, blocks)
        if tangents is not None:
            for name, t, primal in zip(TANGENTS, tangents, given, strict=True):
                validation.tangent(name, t, primal)
        if kind is not None and not validation.looks_transposed(q, k):
            if len(_checked) >= MOST:
                _checked.clear()
            _checked[kind] = checked
    spec, sizes, fits = checked
    if cu_q is not None:
        validation.lengths(cu, q.shape[-2], k.shape[-2])
    t: Any = tangents
    if fits:
        if tangents is not None:
            t = Tangents(t_q, t_k, t_v, t_mask)
        others = (_seed(q, dropout_p), cu_q, cu_k, kv_blocks, q_blocks)
        return Inputs(q, k, v, attn_mask, *others), t, spec, sizes
    mask = None if attn_mask is None else broadcast.mask(attn_mask, sizes)
    q, k, v = broadcast.queries(q, sizes), broadcast.keys(k, sizes), broadcast.keys(v, sizes)
    t = broadcast.tangents(t_q, t_k, t_v, t_mask, sizes)
    others = (_seed(q, dropout_p), cu_q, cu_k, kv_blocks, q_blocks)
    return Inputs(q, k, v, mask, *others), t, spec, sizes


class _Checked(NamedTuple):
    """What the kinds of a call's arguments determine."""

    spec: Spec
    sizes: Sizes
    fits: bool  # all tensors have four dimensions and need not be expanded


MOST = 4096  # kinds of calls; a program with more starts to collect anew
_checked: dict[tuple, _Checked] = {}


def _kind(given: tuple, tangents: tuple | None, numbers: tuple, dtype: Any) -> tuple | None:
    """All of a call that is checked; None where it cannot be said, or not all of it."""
    if tangents is not None:
        given += tangents
    if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, given)):
        return None
    try:
        of_tensors = [x if x is None else (x.shape, x.dtype, x.device, x.layout) for x in given]
        kind = (*of_tensors, *numbers, type(numbers[1]), type(numbers[5]), dtype)  # 1 is no True
        hash(kind)
    except (TypeError, RuntimeError):  # a number that is none, a nested tensor
        return None
    return kind


def _check(
    q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend, softcap, band,
    lower_right, ranges, _block_sizes, cu: Packed, blocks: Blocks,
) -> _Checked:  # fmt: skip
    validation.scalars(dropout_p, is_causal, scale, softcap, enable_gqa)
    validation.tensors(q, k, v)
    validation.sequences(cu, attn_mask, q.device)
    sizes = validation.shapes(q, k, v, enable_gqa)
    validation.mask(attn_mask, (*sizes.lead, q.shape[-2], k.shape[-2]), q.device)
    q_, k_, v_ = broadcast.queries(q, sizes), broadcast.keys(k, sizes), broadcast.keys(v, sizes)
    spec = Spec(
        scale=1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale),
        causal=bool(is_causal),
        dropout_p=float(dropout_p),
        backend=backends.choose(backend, q_, v_),
        block_q=blocks.block_q,
        block_k=blocks.block_k,
        softcap=float(softcap),
    )
    if blocks.kv_blocks is not None:
        beside = {"attn_mask": attn_mask, "is_causal": is_causal or None, "window": band}
        validation.blocks(blocks, q_, k_, beside | {"cu_seqlens": cu.cu_q})
    if band is not None:
        L, S = q.shape[-2], k.shape[-2]
        spec = banded(spec, band, max(L, S) if lower_right else L, max(L, S) if lower_right else S)
    if lower_right and band_of(spec) != Band():
        spec = changed(spec, lower_right=True)
    if ranges != (None, None):
        validation.ranges_fit(ranges, spec, cu, q.shape[-2], k.shape[-2])
        spec = _ranged(spec, ranges, q.shape[-2], k.shape[-2])
    fits = q_ is q and k_ is k and v_ is v and (attn_mask is None or attn_mask.dim() == 4)
    return _Checked(spec, sizes, fits)


def _ranged(spec: Spec, ranges: tuple[Range, Range], L: int, S: int) -> Spec:
    """With ranges, but for those that are all."""
    rows, keys = ranges
    if rows is not None and rows != (0, L):
        spec = changed(spec, t_rows_start=rows[0], t_rows_stop=rows[1])
    if keys is not None and keys != (0, S):
        spec = changed(spec, t_keys_start=keys[0], t_keys_stop=keys[1])
    return spec


def _with_elements(mask: Any, query: Tensor) -> Any:
    """PyTorch's causal mask has no elements, only a shape to give them: as bool (L, S). Any other
    mask as it is."""
    if mask is None or type(mask) is Tensor:
        return mask
    # imported here because it takes the compiler along, which doubles the time of `import torch`
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(mask, CausalBias):
        return mask
    L, S = mask.seq_len_q, mask.seq_len_kv
    diagonal = 0 if mask.variant == CausalVariant.UPPER_LEFT else S - L
    return torch.ones(L, S, dtype=torch.bool, device=query.device).tril(diagonal)


def _autocast_dtype(query: Any) -> torch.dtype | None:
    """What autocast makes of floating tensors here."""
    kind = "cpu"
    if isinstance(query, Tensor) and not query.is_cpu:
        kind = query.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in (torch.float64, dtype):
        return x.to(dtype)
    return x


def paired(x: Inputs, pairs: Pairs | None) -> tuple[Inputs, Tangents | None]:
    """The inputs, and their tangents where one of them has one."""
    if pairs is None:
        return x, None
    x = Inputs(*[y for y, _ in pairs])
    tangents = [t for _, t in pairs[: len(Tangents._fields)]]
    if all(t is None for t in tangents):
        return x, None
    for i, t in enumerate(tangents):  # in its primal's dtype, which PyTorch does not ask for
        if t is not None and t.dtype != pairs[i][0].dtype:
            tangents[i] = t.to(pairs[i][0].dtype)
    return x, Tangents(*tangents)


def _seed(q: Tensor, dropout_p: float) -> Tensor | None:
    """One key for the dropout mask, drawn on the device from PyTorch's own generator, so that
    `torch.manual_seed`, CUDA graphs and vmap's randomness rules apply."""
    if dropout_p == 0.0:
        return None
    return torch.randint(0, 2**62, (1,), device=q.device, dtype=torch.int64)
