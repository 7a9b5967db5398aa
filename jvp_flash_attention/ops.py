"""The four passes as opaque `torch.library` operators, with fakes and registered gradients.

`torch.compile` cannot see a Function's jvp rule, and an operator has none, so neither is ever
exposed: `api` unpacks the duals and calls `attention` or `attention_jvp` here, and every derivative
below is reverse mode. `forward` and `backward` are an implementation like `reference` and
`kernels`: they run the one that the spec names behind an operator, for whoever watches operators
and not memory (`make_fx`, fake tensors).

An operator takes the fields of `call`'s values one after the other. An absent gradient is a tensor
without elements, because an operator cannot return None.
"""

from typing import Any, get_type_hints

import torch
from torch import Tensor

from .backends import implementation
from .call import Inputs, Saved, Spec, Tangents, empty_rows, padded, split, wide
from .operators import operator

# Another copy of this package in the same process, as `kernels` loads it, has another name and so
# operators of its own.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")

RECORDED = (
    "attention that was recorded (torch.func.linearize, torch.compile, torch.export) has no tangent"
    " of its own; take the jvp of the function itself, or record the jvp (a jvp of a jvp of"
    " attention is not supported)"
)


def attention(x: Inputs, spec: Spec, _tangent_grad: bool = True) -> tuple[Tensor]:
    """As `autograd.attention`; a tangent never comes here."""
    return (forward(x, None, spec).out,)


def attention_jvp(
    x: Inputs, t: Tangents, spec: Spec, tangent_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """As `autograd.attention_jvp`; a graph saves what its backward uses and nothing else."""
    if not tangent_grad:
        t = Tangents(*[None if each is None else each.detach() for each in t])
    saved: Any = forward(x, t, spec)
    return saved.out, saved.t_out if tangent_grad else saved.t_out.detach()


def forward(x: Inputs, t: Tangents | None, spec: Spec) -> Saved:
    """As `reference.forward`."""
    return Saved(*(forward_op(*x, *spec) if t is None else forward_jvp_op(*x, *t, *spec)))


def backward(
    d_out, d_t_out, x: Inputs, t: Tangents, saved: Saved, spec: Spec, mask_grad: bool
) -> tuple[Tangents, Tangents]:
    """As `reference.backward`."""
    if d_t_out is None:
        plain = Saved(saved.out, saved.lse)  # a graph need not keep the others
        grads = backward_op(d_out, *x, *plain, *spec, mask_grad)
    else:
        grads = backward_jvp_op(d_out, d_t_out, *x, *t, *saved, *spec, mask_grad)
    if not mask_grad:
        grads = [*grads[:3], None, *grads[4:7], None]
    return Tangents(*grads[:4]), Tangents(*grads[4:] if d_t_out is not None else ())


TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?",
    float: "float", bool: "bool", int: "int", int | None: "int?", str: "str",
}  # fmt: skip


def _operator(name: str, results: int, *arguments: Any) -> Any:
    """An operator of these arguments: a name and its type, or a kind of value for all its
    fields."""
    named: list[tuple[str, Any]] = []
    for argument in arguments:
        if isinstance(argument, tuple):
            named.append(argument)
            continue
        prefix = "t_" if argument is Tangents else ""
        named += [(prefix + field, kind) for field, kind in get_type_hints(argument).items()]
    signature = ", ".join(f"{TYPES[kind]} {field}" for field, kind in named)
    schema = f"({signature}) -> ({', '.join(['Tensor'] * results)})"
    return operator(f"{NAMESPACE}::flash_attn_{name}", schema, no_tangent=RECORDED)


D_OUT, D_T_OUT, MASK_GRAD = ("d_out", Tensor), ("d_t_out", Tensor), ("mask_grad", bool)


@_operator("forward", 2, Inputs, Spec)
def forward_op(*args) -> Any:
    x, spec = split(args, Inputs, Spec)
    return implementation(spec).forward(x, None, _inner(spec))[:2]


@_operator("forward_jvp", 4, Inputs, Tangents, Spec)
def forward_jvp_op(*args) -> Any:
    x, t, spec = split(args, Inputs, Tangents, Spec)
    return tuple(implementation(spec).forward(x, t, _inner(spec)))


@_operator("backward", 4, D_OUT, Inputs, Saved, Spec, MASK_GRAD)
def backward_op(d_out, *args) -> Any:
    x, saved, spec, mask_grad = split(args, Inputs, Saved, Spec)
    run = implementation(spec).backward
    grads, _ = run(d_out, None, x, Tangents(), saved, _inner(spec), mask_grad)
    return _absent_as_empty(grads, x.q)


@_operator(
    "backward_jvp", 8, ("d_out", Tensor | None), D_T_OUT, Inputs, Tangents, Saved, Spec, MASK_GRAD
)
def backward_jvp_op(d_out, d_t_out, *args) -> Any:
    x, t, saved, spec, mask_grad = split(args, Inputs, Tangents, Saved, Spec)
    run = implementation(spec).backward
    grads, t_grads = run(d_out, d_t_out, x, t, saved, _inner(spec), mask_grad)
    return _absent_as_empty((*grads, *t_grads), x.q)


# Fakes. Outputs lie as (B, L, H, D) whatever the inputs' strides are: the compiler does not always
# know those when it asks for the outputs'.


@forward_op.register_fake
def _(*args):
    x, spec = split(args, Inputs, Spec)
    return _fake_out(x), _fake_lse(x, spec)


@forward_jvp_op.register_fake
def _(*args):
    x, _t, spec = split(args, Inputs, Tangents, Spec)
    return _fake_out(x), _fake_lse(x, spec), _fake_out(x), _fake_rows(x.q)


@backward_op.register_fake
def _(_d_out, *args):
    x, _saved, _spec, mask_grad = split(args, Inputs, Saved, Spec)
    return _fake_grads(x, mask_grad)


@backward_jvp_op.register_fake
def _(_d_out, _d_t_out, *args):
    x, _t, _saved, _spec, mask_grad = split(args, Inputs, Tangents, Saved, Spec)
    # eight distinct tensors: the tracer tells outputs apart by identity
    return *_fake_grads(x, mask_grad), *_fake_grads(x, mask_grad)


# Gradients.


def _save(ctx, inputs, output):
    tensors = inputs[: -len(Spec._fields)]
    ctx.spec = Spec(*inputs[len(tensors) :])
    ctx.mark_non_differentiable(*output[1::2])  # LSE and μ
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _forward_backward(ctx, d_out, _d_lse):
    grads: Any = ()
    if d_out is not None:
        x, *saved = split(ctx.saved_tensors, Inputs)
        mask_grad = ctx.needs_input_grad[Inputs._fields.index("mask")]
        how = (ctx.spec, mask_grad)
        grads, _ = backward(d_out, None, x, Tangents(), Saved(*saved), *how)
    return *padded(grads, Inputs), *padded((), Spec)


def _forward_jvp_backward(ctx, d_out, _d_lse, d_t_out, _d_mu):
    grads: Any = ()
    t_grads = Tangents()
    if d_out is not None or d_t_out is not None:
        x, t, saved = split(ctx.saved_tensors, Inputs, Tangents, Saved)
        needs, needs_t, *_ = split(ctx.needs_input_grad, Inputs, Tangents)
        how = (ctx.spec, needs.mask or needs_t.mask)
        grads, t_grads = backward(d_out, d_t_out, x, t, saved, *how)
        t_grads = [g if each is not None else None for g, each in zip(t_grads, t, strict=True)]
    return *padded(grads, Inputs), *t_grads, *padded((), Spec)


forward_op.register_autograd(_forward_backward, setup_context=_save)
forward_jvp_op.register_autograd(_forward_jvp_backward, setup_context=_save)


def _inner(spec: Spec) -> Spec:
    """What runs below an operator."""
    return spec._replace(rows_first=True, compiled=True)


def _fake_out(x: Inputs) -> Tensor:
    return empty_rows(x.q, x.v.shape[3], _inner(Spec(1.0)))


def _fake_rows(q: Tensor, *more: int) -> Tensor:
    return q.new_empty(*q.shape[:3], *more, dtype=wide(q.dtype))


def _fake_lse(x: Inputs, spec: Spec) -> Tensor:
    """The kernels keep m and log l apart beside a floating mask."""
    pair = spec.backend == "triton" and x.mask is not None and x.mask.dtype != torch.bool
    return _fake_rows(x.q, *[2] * pair)


def _fake_grads(x: Inputs, mask_grad: bool) -> tuple[Tensor, ...]:
    rows = (empty_rows(y, y.shape[3], _inner(Spec(1.0))) for y in x[:3])
    if not mask_grad or x.mask is None:
        return *rows, x.q.new_empty(0)
    return *rows, x.mask.new_empty(x.mask.shape)


def _absent_as_empty(grads, q: Tensor) -> Any:
    return tuple(q.new_empty(0) if g is None else g for g in grads)
