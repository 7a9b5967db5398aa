"""Which kernels serve a call: the tables of implementations, results and launches.

`forward` and `backward` are the twins of those in `reference`, for (B, H, L, D) tensors on one
device.
"""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..call import Inputs, Saved, Spec, Tangents, empty_rows, is_default, split, tf32_allowed
from . import configs, cudnn, launch_cache
from .launch_cache import Launch
from .problem import (
    DETAILS,
    Call,
    Problem,
    architecture,
    maybe_contiguous,
    problem,
    readable,
    readable_mask,
    sequences_of,
    tiles_of,
    with_parts,
)

# The first that supports the problem. An implementation with an architecture's name is that
# architecture's alone, and not imported elsewhere. Before the tables comes cuDNN, which takes an
# ordinary forward or backward whole and allocates its results.
PASSES: dict[str, tuple[str, ...]] = {
    "split": ("portable",),
    "fwd": ("sm90", "portable"),
    "fwd_jvp": ("sm90", "portable"),
    "bwd_preprocess": ("portable",),
    "bwd_dkdv": ("sm90", "portable"),
    "bwd_dkdv_jvp": ("sm90", "portable"),
    "bwd_dq": ("sm90", "portable"),
    "bwd_dq_jvp": ("sm90", "portable"),
}


FORCED = (None, "cudnn", "sm90", "portable")
NOTHING = Tangents()


def forward(
    x: Inputs,
    t: Tangents | None,
    spec: Spec,
    *,
    force: str | None = None,
    into: tuple[Tensor | None, ...] | None = None,
) -> Saved:
    """O and LSE; with tangents, of which an absent one is zero, tO and μ too.

    `force`, for tests and tuning, names the implementation of every pass that it has; it supports
    the call or raises. `into` are tensors for O and tO, which may be rows of larger ones, and
    without a floating mask a third for LSE, contiguous; cuDNN returns its own.
    """
    pays = cudnn.pays if force == "cudnn" else cudnn.pays_forward
    if t is None and force in (None, "cudnn") and pays(x, spec):
        x = _readable(x)
        if cudnn.supports(x, spec):
            return cudnn.forward(x, spec)
    given = (*x, *(NOTHING if t is None else t), *(into or ()))
    key = launch_cache.key(("forward", t is None, spec, force, _tf32(x)), given)
    results = launch_cache.replay(key, given)
    if results is not None:
        return _with(Saved(*results[:4]), into)
    c = _forward_call(_readable(x), t, spec, into)
    launches = partial(_launches, c, spec, force)
    read = (*c.x, *c.t, *(into or ()))
    results = c.saved if into is None else _with(c.saved, (None,) * len(into))
    launch_cache.record(key, given, read, (*results, *(c.parts or ())), launches)
    return c.saved


def backward(
    d_out: Tensor | None,
    d_t_out: Tensor | None,
    x: Inputs,
    t: Tangents,
    saved: Saved,
    spec: Spec,
    mask_grad: bool,
    *,
    force: str | None = None,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tangents, Tangents]:
    """(dQ, dK, dV, db) and, with dtO, (dtQ, dtK, dtV, dtb); db and dtb are None unless
    `mask_grad`. `force` as in `forward`. `into` are tensors for dQ, dK and dV, which may be parts
    of a larger one; cuDNN, which allocates its own, is then not asked. A fourth is `room_for_sums`.
    """
    pays = cudnn.pays if force == "cudnn" else cudnn.pays_backward
    if d_t_out is None and into is None and force in (None, "cudnn") and pays(x, spec):
        x, saved = _readable(x), saved._replace(out=readable(saved.out))
        d_o: Any = readable(d_out)
        if cudnn.supports(x, spec, saved.out, d_o):
            return cudnn.backward(d_o, x, saved, spec), NOTHING
    given = (*x, *t, *saved, d_out, d_t_out, *(into or ()))
    fixed = mask_grad and torch.are_deterministic_algorithms_enabled()
    key = launch_cache.key(("backward", spec, force, mask_grad, fixed, _tf32(x)), given)
    results = launch_cache.replay(key, given)
    if results is not None:
        grads, t_grads, *_ = split(results, Tangents, Tangents)
    else:
        c = _backward_call(d_out, d_t_out, _readable(x), t, saved, spec, mask_grad, into)
        grads, t_grads = c.grads, c.t_grads
        read = (*c.x, *c.t, *c.saved, c.d_out, c.d_t_out, *(into or ()))
        allocated = grads if into is None else grads._replace(q=None, k=None, v=None)
        results = (*allocated, *t_grads, c.w_sum, c.h_sum, c.statistics, *(c.parts or ()))
        zeroed = tuple(i for i, x in enumerate(results) if x is grads.mask or x is t_grads.mask)
        launches = partial(_launches, c, spec, force)
        launch_cache.record(key, given, read, results, launches, zeroed)
    if into is not None:
        grads = grads._replace(q=into[0], k=into[1], v=into[2])
    if not mask_grad:
        return grads, t_grads
    return (
        grads._replace(mask=_mask_grad(grads.mask, x.mask)),
        t_grads._replace(mask=_mask_grad(t_grads.mask, x.mask)),
    )


def room_for_sums(x: Inputs, spec: Spec, arch: str | None = None) -> Tensor | None:
    """For Σ dQ and Σ dV over the rows, in parts, (B, tiles of 64, 2, H, D) in float32: gradients of
    biases of Q and V. None where `backward` without tangents, of as many queries as keys, into
    tensors that lie as q, k and v do, gives no such sums."""
    q, k, v, *_ = x
    B, H, L, D = q.shape
    alike = Call(x, NOTHING, Saved(q, q), q, grads=Tangents(q, k, v), sums=q)
    try:
        choose("bwd_dkdv", problem(alike, spec, arch), alike)
    except NotImplementedError:
        return None
    return q.new_empty(B, tiles_of(L, 64, None), 2, H, D, dtype=torch.float32)


def launches(
    x: Inputs,
    t: Tangents | None,
    spec: Spec,
    saved: Saved | None = None,
    d_out: Tensor | None = None,
    d_t_out: Tensor | None = None,
    mask_grad: bool = False,
    *,
    arch: str | None = None,
    tma: bool | None = None,
    force: str | None = None,
) -> list[Launch]:
    """What `forward`, or with `saved` `backward`, launches for such tensors, which may lie
    anywhere, on an architecture of `configs.TABLES`; nothing is launched. `tma` says whether
    operands are TMA descriptors, by default where they can be. cuDNN is left out."""
    if saved is None:
        c = _forward_call(x, t, spec, arch=arch)
    else:
        c = _backward_call(d_out, d_t_out, x, t or Tangents(), saved, spec, mask_grad, arch=arch)
    return list(_launches(c, spec, force, arch, tma))


def _launches(
    c: Call, spec: Spec, force: str | None, arch: str | None = None, tma: bool | None = None
) -> Iterator[Launch]:
    p = problem(c, spec, arch, tma)
    jvp = "_jvp" if c.jvp else ""
    names = ["split", f"fwd{jvp}"]
    if c.w_sum is not None:
        names = ["split", "bwd_preprocess", f"bwd_dkdv{jvp}", f"bwd_dq{jvp}"]
        if not choose(names[2], p, c, force).needs_row_sums(p, c):
            names.remove("bwd_preprocess")
    for name in names:
        yield from choose(name, p, c, force).launches(name, p, c)


def choose(name: str, p: Problem, c: Call, force: str | None = None) -> Any:
    """The implementation of a pass.

    Raises:
        NotImplementedError: the one that `force` names does not support the problem.
    """
    if force not in FORCED:
        raise ValueError(f"force must be one of {FORCED}, got {force!r}")
    if force == "cudnn":
        raise NotImplementedError(f"cuDNN does not support this call, got {p}")
    forced = force in PASSES[name]
    reasons = []
    for candidate in (force,) if forced else PASSES[name]:
        if candidate in configs.TABLES and candidate != p.arch:
            reason = f"is for {candidate}, got {p.arch}"
        else:
            module = import_module(f".{candidate}.launch", __package__)
            reason = module.unsupported_reason(name, p, c)
            if reason is None:
                return module
        reasons.append(f"{name} of {candidate!r} {reason}")
    raise NotImplementedError("; ".join(reasons))


def _with(saved: Saved, into: Any) -> Saved:
    """With these for O, tO and LSE, where they are given."""
    return saved._replace(**dict(zip(("out", "t_out", "lse"), into or (), strict=False)))


def _forward_call(x: Inputs, t: Tangents | None, spec: Spec, into: Any = None, arch=None) -> Call:
    jvp = t is not None
    pair = x.mask is not None and x.mask.dtype != torch.bool  # m and log l apart
    mu = _row_vector(x.q) if jvp else None
    if into is None:
        out = empty_rows(x.q, x.v.shape[3], spec)
        into = out, torch.empty_like(out) if jvp else None
    lse = into[2] if len(into) > 2 else _row_vector(x.q, *[2] * pair)
    saved = Saved(into[0], lse, into[1], mu)
    c = Call(_inputs(x), _tangents(t) if t is not None else NOTHING, saved)
    return with_parts(c, spec, arch, "fwd_jvp" if jvp else "fwd")


def _backward_call(
    d_out, d_t_out, x: Inputs, t: Tangents, saved: Saved, spec: Spec, mask_grad: bool,
    into: Any = None, arch=None,
) -> Call:  # fmt: skip
    q, k, v, mask, *_ = x
    jvp = d_t_out is not None
    d_mask, d_t_mask = (
        _mask_accumulator(mask, q, k) if mask_grad and mask is not None and there else None
        for there in (True, jvp)
    )
    d_q, d_k, d_v, *sums = into or (empty_rows(y, y.shape[3], spec) for y in (q, k, v))
    d_t_q, d_t_k, d_t_v = (empty_rows(y, y.shape[3], spec) if jvp else None for y in (q, k, v))
    d_out, d_t_out = readable(d_out), readable(d_t_out)
    out: Any = readable(saved.out)
    statistics = None
    plain = is_default(spec, but=DETAILS) and x.cu_q is None and q.element_size() == 2
    # a head in a block reads none (sm90/launch.py, needs_row_sums)
    plain &= configs.whole_head(q.shape[3], q.shape[2], k.shape[2]) is None
    if (jvp or plain) and mask is None and (arch or architecture(q.device)) == "sm90":
        rows = tiles_of(q.shape[2], 64, sequences_of(x)) * 64
        statistics = q.new_empty(*q.shape[:2], 4 if jvp else 2, rows, dtype=torch.float32)
    c = Call(
        _inputs(x),
        _tangents(t),
        Saved(out, saved.lse.contiguous(), readable(saved.t_out), maybe_contiguous(saved.mu)),
        d_out,
        d_t_out,
        Tangents(d_q, d_k, d_v, d_mask),
        Tangents(d_t_q, d_t_k, d_t_v, d_t_mask),
        w_sum=_row_vector(q),
        h_sum=_row_vector(q) if jvp else None,
        statistics=statistics,
        sums=sums[0] if sums else None,
    )
    return with_parts(c, spec, arch, "bwd_dkdv")


def _readable(x: Inputs) -> Inputs:
    """q, k and v as the kernels read them."""
    q, k, v, *_ = x
    ready: Any = readable(q), readable(k), readable(v)
    if ready[0] is q and ready[1] is k and ready[2] is v:
        return x
    return x._replace(q=ready[0], k=ready[1], v=ready[2])


def _inputs(x: Inputs) -> Inputs:
    """All the others too; q, k and v are so already."""
    q, k, v, mask, *others = x
    if mask is None and not any(y is not None for y in others):
        return x
    return Inputs(q, k, v, readable_mask(mask), *map(maybe_contiguous, others))


def _tangents(t: Tangents) -> Tangents:
    return Tangents(readable(t.q), readable(t.k), readable(t.v), readable_mask(t.mask))


def _tf32(x: Inputs) -> bool:
    return x.q.dtype == torch.float32 and tf32_allowed()


def _row_vector(q: Tensor, *more: int) -> Tensor:
    return q.new_empty(*q.shape[:3], *more, dtype=torch.float32)


def _mask_accumulator(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Where the atomic additions of a mask's gradient go: its own shape, in float32; the full shape
    where PyTorch is told to be deterministic, so that no two additions meet."""
    full = (*q.shape[:3], k.shape[2])
    shape = full if torch.are_deterministic_algorithms_enabled() else mask.shape
    return torch.zeros(shape, dtype=torch.float32, device=mask.device)


def _mask_grad(accumulator: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if accumulator is None or mask is None:
        return None
    return accumulator.sum_to_size(mask.shape).to(mask.dtype)
