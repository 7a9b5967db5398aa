"""What a call of attention is made of, as small named values.

Below the public functions every signature, operator schema, fake and count follows from these
fields: a new one is added here, and met where it is used.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """Not differentiable, hashable, known before a kernel is chosen. An operator takes the fields
    as they are: float, bool, int, int | None or str."""

    scale: float  # softmax scale s
    causal: bool = False  # query i attends keys j <= i (top-left aligned when L != S)
    dropout_p: float = 0.0  # probability with which an attention weight is dropped
    backend: str = "reference"  # a name that `backends.implementation` knows
    left: int | None = None  # query i attends keys j >= i - left; None: no bound
    right: int | None = None  # and keys j <= i + right; a bound may be negative
    lower_right: bool = False  # i and j are counted from the last row of each packed sequence
    block_q: int | None = None  # rows of a block of queries, where there is a block mask
    block_k: int | None = None  # and of a block of keys
    t_rows_start: int | None = None  # queries from here on carry a tangent, the others none
    t_rows_stop: int | None = None  # and up to here; None: all do
    t_keys_start: int | None = None  # and of these keys t_k and t_v are read
    t_keys_stop: int | None = None
    softcap: float = 0.0  # c: scores are c tanh(s Q Kᵀ / c) before masks; 0: they are not capped
    rows_first: bool = False  # results lie in memory as (B, L, H, D), whatever the inputs do
    compiled: bool = False  # runs below an operator, in code that returns to the same shapes
    sharded: bool = False  # keys are a part of each row's; O, tO, LSE and μ handed in are of all


def changed(spec: Spec, **fields: Any) -> Spec:
    """`spec._replace`, which the compiler of torch 2.8 does not trace."""
    values = zip(Spec._fields, spec, strict=True)
    return Spec(*[fields.get(name, value) for name, value in values])


class Band(NamedTuple):
    """Query i attends keys i - left <= j <= i + right; None is no bound. Either may be negative."""

    left: int | None = None
    right: int | None = None


class Packed(NamedTuple):
    """Sequences that lie behind one another in one row of queries, and in one of keys: sequence n
    is rows cu[n] ... cu[n + 1] of them. What lies behind the last one belongs to none."""

    cu_q: Tensor | None = None  # (sequences + 1,) int32; None: nothing is packed
    cu_k: Tensor | None = None  # of the keys; None: as the queries
    lower_right: bool = False  # as in `Spec`


class Blocks(NamedTuple):
    """A static block mask: of each block of queries how many blocks of keys it sees, then which, in
    order; and the same of each block of keys. b and h are full or 1."""

    kv_blocks: Tensor | None = None
    q_blocks: Tensor | None = None
    block_q: int | None = None
    block_k: int | None = None


def band(spec: Spec) -> Band:
    """The pairs that positions alone let attend each other."""
    right = spec.right
    if spec.causal and (right is None or right > 0):
        right = 0
    return Band(spec.left, right)


def banded(spec: Spec, within: Band, L: int, S: int) -> Spec:
    """The call of L rows and S keys inside of one more band. Bounds that hide nothing are dropped:
    what is causal or full then is called so, and more kernels support it."""
    left, right = within
    if left is not None and left >= L - 1:
        left = None
    if right is not None and right >= S - 1:
        right = None
    if right == 0 or (spec.causal and (right is None or right > 0)):
        return changed(spec, causal=True, left=left, right=None)
    return changed(spec, causal=False, left=left, right=right)


def has_ranges(spec: Spec) -> bool:
    """Whether some rows or keys have no tangent, by declaration."""
    return spec.t_rows_stop is not None or spec.t_keys_stop is not None


def without_ranges(spec: Spec) -> Spec:
    """The call in which all rows and keys may have one."""
    if not has_ranges(spec):
        return spec
    of_keys = {"t_keys_start": None, "t_keys_stop": None}
    return spec._replace(t_rows_start=None, t_rows_stop=None, **of_keys)


def is_default(spec: Spec, but: tuple[str, ...]) -> bool:
    """Whether every field but these has its default: an implementation that supports some fields
    asks this, and so refuses those that it does not know."""
    defaults = Spec._field_defaults.items()
    return all(getattr(spec, field) == value for field, value in defaults if field not in but)


class Inputs(NamedTuple):
    """The tensors of a call; those that have a derivative first."""

    q: Tensor  # (B, H, L, D)
    k: Tensor  # (B, Hk, S, D)
    v: Tensor  # (B, Hk, S, Dv)
    mask: Tensor | None = None  # broadcastable to (B, H, L, S); bool, or floating: added
    seed: Tensor | None = None  # key of the dropout mask
    cu_q: Tensor | None = None  # (sequences + 1,) int32: where packed sequences begin, by `Packed`
    cu_k: Tensor | None = None  # of the keys; None: as the queries
    kv_blocks: Tensor | None = None  # (b, h, nQ, 1 + nK) int32, by `Blocks`
    q_blocks: Tensor | None = None  # (b, h, nK, 1 + nQ) int32


class Tangents(NamedTuple):
    """One for each differentiable input; None is zero. Gradients have the same form."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None


class Saved(NamedTuple):
    """What a forward pass returns, and its backward needs; tO and μ are None without tangents."""

    out: Tensor  # O (B, H, L, Dv)
    lse: Tensor  # (B, H, L), in the kernels beside a floating mask (B, H, L, 2)
    t_out: Tensor | None = None  # tO
    mu: Tensor | None = None  # μ (B, H, L)


def split(flat: Sequence, *kinds: Any) -> list[Any]:
    """A flat sequence, as Functions and operators take it, as values of these kinds and what comes
    after them."""
    values, at = [], 0
    for kind in kinds:
        values.append(kind._make(flat[at : at + len(kind._fields)]))
        at += len(kind._fields)
    return [*values, *flat[at:]]


def padded(values: Sequence, kind: Any) -> tuple:
    """One for each field of the kind: the values, then None."""
    return *values, *(None,) * (len(kind._fields) - len(values))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which results are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tf32_allowed() -> bool:
    """Whether float32 products may lose digits: PyTorch's switch, by its old or its new name, one
    of which raises where the other was used."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def row_strides(x: Tensor, width: int, spec: Spec) -> tuple[int, int, int, int]:
    """Strides of a result (B, H, L, width) beside x: dense, and in memory (B, L, H, width) where x
    is a view of such a tensor or `rows_first` asks for it."""
    _, H, L, _ = x.shape
    if spec.rows_first or (H > 1 and L > 1 and 0 < x.stride(1) < x.stride(2)):
        return L * H * width, width, H * width, 1
    return H * L * width, L * width, width, 1


def empty_rows(x: Tensor, width: int, spec: Spec, dtype: torch.dtype | None = None) -> Tensor:
    """New (B, H, L, width) with `row_strides`. Every implementation, and the operators' fakes,
    allocate O, tO and the gradients of q, k and v by it."""
    strides = row_strides(x, width, spec)
    return x.new_empty_strided((*x.shape[:3], width), strides, dtype=dtype or x.dtype)


def laid_out(result: Tensor, x: Tensor, spec: Spec) -> Tensor:
    """A result beside x with `row_strides`, which it has already as a rule."""
    if result.stride() == row_strides(x, result.shape[3], spec):
        return result
    return empty_rows(x, result.shape[3], spec).copy_(result)
