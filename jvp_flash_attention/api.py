"""The public functions: check, unpack duals, choose an implementation, pack duals."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import (
    autograd,
    backends,
    broadcast,
    ops,
    shadowed,
    transforms,  # noqa: F401 (registers what transforms make of the operators)
    validation,
)
from .broadcast import Sizes
from .call import Inputs, Spec, Tangents
from .functorch import SHORTCUTS, Pairs, below_duals, pack, unpack, unpack_compiled

shadowed.check()

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
    backend: str | None = None,
    tangent_grad: bool = True,
) -> Tensor:
    """Scaled dot-product attention, differentiable forward and backward: softmax(s Q Kᵀ + b) V.

    A drop-in for `torch.nn.functional.scaled_dot_product_attention` with the same names, positions,
    layout and meaning. Call it plainly, under `torch.func.jvp` or inside `forward_ad.dual_level`:
    where an input carries a tangent, the output carries its tangent, computed in the same pass over
    the keys in O(L) memory (mathematics: docs/mathematics.md).

    Args:
        query: (..., H, L, D), float16, bfloat16, float32 or float64.
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
    compiling = torch.compiler.is_compiling()
    numbers = (dropout_p, is_causal, scale, enable_gqa)
    if compiling and not SHORTCUTS:
        how = {"backend": backend, "tangent_grad": tangent_grad}
        return _uncompiled(attention)(query, key, value, attn_mask, *numbers, **how)
    x, spec, sizes = prepare(query, key, value, attn_mask, *numbers, backend)
    if compiling:
        x, t = paired(x, unpack_compiled(*x, nested=None if tangent_grad else UNDETACHED))
        route = ops
    else:
        x, t = paired(x, unpack(*x))
        route = autograd
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
    compiling = torch.compiler.is_compiling()
    numbers = (dropout_p, is_causal, scale, enable_gqa)
    if compiling and not SHORTCUTS:
        args = (query, key, value, t_query, t_key, t_value, attn_mask, *numbers)
        how = {"t_attn_mask": t_attn_mask, "backend": backend, "tangent_grad": tangent_grad}
        return _uncompiled(attention_jvp)(*args, **how)
    x, spec, sizes = prepare(query, key, value, attn_mask, *numbers, backend)
    for name, t, primal in (
        ("t_query", t_query, query),
        ("t_key", t_key, key),
        ("t_value", t_value, value),
        ("t_attn_mask", t_attn_mask, attn_mask),
    ):
        validation.tangent(name, t, primal)
    t = broadcast.tangents(t_query, t_key, t_value, t_attn_mask, x.q.dtype, sizes)
    route = ops if compiling else autograd
    out, t_out = route.attention_jvp(x, t, spec, tangent_grad)
    return broadcast.result(out, sizes), broadcast.result(t_out, sizes)


def _uncompiled(function: Callable) -> Callable:
    """The function as the compiler leaves it to eager."""
    return torch.compiler.disable(function, recursive=True)


def prepare(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend
) -> tuple[Inputs, Spec, Sizes]:
    """The checked call: its tensors four-dimensional, its numbers, and what its batch and heads
    broadcast to."""
    validation.scalars(dropout_p, is_causal, scale)
    query, key, value = _autocast(query, key, value)
    validation.tensors(query, key, value)
    sizes = validation.shapes(query, key, value, enable_gqa)
    if attn_mask is not None:
        if type(attn_mask) is not Tensor:
            attn_mask = _with_elements(attn_mask, query.device)
        scores = (*sizes.lead, query.shape[-2], key.shape[-2])
        validation.mask(attn_mask, scores, query.device)
        attn_mask = broadcast.mask(attn_mask, sizes)
    q, k, v = query, key, value
    if not (len(q.shape) == 4 and q.shape == k.shape == v.shape):
        q, k, v = broadcast.queries(q, sizes), broadcast.keys(k, sizes), broadcast.keys(v, sizes)
    spec = Spec(
        scale=1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale),
        causal=bool(is_causal),
        dropout_p=float(dropout_p),
        backend=backends.choose(backend, q, v),
    )
    return Inputs(q, k, v, attn_mask, _seed(q, dropout_p)), spec, sizes


def _with_elements(mask: Tensor, device: torch.device) -> Tensor:
    """PyTorch's causal mask has no elements, only a shape to give them: as bool (L, S). Any other
    mask as it is."""
    # imported here because it takes the compiler along, which doubles the time of `import torch`
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(mask, CausalBias):
        return mask
    L, S = mask.seq_len_q, mask.seq_len_kv
    diagonal = 0 if mask.variant == CausalVariant.UPPER_LEFT else S - L
    return torch.ones(L, S, dtype=torch.bool, device=device).tril(diagonal)


def _autocast(*tensors):
    """Under autocast primals and tangents are cast together, before anything unpacks them."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    keep = (torch.float64, dtype)
    return [
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in keep
        else x
        for x in tensors
    ]


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
