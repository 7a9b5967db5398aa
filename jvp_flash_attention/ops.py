"""The four passes as opaque `torch.library` operators, with fakes and registered gradients.

`torch.compile` cannot see a Function's jvp rule, and an operator has none, so neither is ever
exposed: `api` unpacks the duals and calls `attention` or `attention_jvp` here, and every derivative
below is reverse mode. The other four functions are an implementation like `reference` and
`kernels`: they run the one that the options name behind an operator, for whoever watches operators
and not memory (`make_fx`, fake tensors). An absent gradient is a tensor without elements, because
an operator cannot return None.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, custom_op

from .backends import implementation
from .functorch import make_autograd_impl, may_be_dual
from .options import Options, empty_rows

# Another copy of this package in the same process, as `kernels` loads it, has another name and so
# operators of its own.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")

RECORDED = (
    "attention that was recorded (torch.func.linearize, torch.compile, torch.export) has no tangent"
    " of its own; take the jvp of the function itself, or record the jvp (a jvp of a jvp of"
    " attention is not supported)"
)


def attention(q, k, v, bias, seed, options: Options, _tangent_grad: bool = True) -> tuple[Tensor]:
    """As `autograd.attention`; a tangent never comes here."""
    return forward(q, k, v, bias, seed, options)[:1]


def attention_jvp(
    q, k, v, bias, seed, t_q, t_k, t_v, t_bias, options: Options, tangent_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """As `autograd.attention_jvp`; a graph saves what its backward uses and nothing else."""
    tangents = [t_q, t_k, t_v, t_bias]
    if not tangent_grad:
        tangents = [None if t is None else t.detach() for t in tangents]
    out, t_out, _lse, _mu = forward_jvp(q, k, v, bias, seed, *tangents, options)
    return out, t_out if tangent_grad else t_out.detach()


def forward(q, k, v, bias, seed, options: Options):
    """As `reference.forward`."""
    return forward_op(q, k, v, bias, seed, *_static(options))


def forward_jvp(q, k, v, bias, seed, t_q, t_k, t_v, t_bias, options: Options):
    """As `reference.forward_jvp`."""
    return forward_jvp_op(q, k, v, bias, seed, t_q, t_k, t_v, t_bias, *_static(options))


def backward(d_out, q, k, v, bias, seed, out, lse, options: Options, bias_grad: bool):
    """As `reference.backward`."""
    grads = backward_op(d_out, q, k, v, bias, seed, out, lse, *_static(options), bias_grad)
    return _empty_as_none(grads, bias_grad)


def backward_jvp(
    d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
    options: Options, bias_grad: bool,
):  # fmt: skip
    """As `reference.backward_jvp`."""
    grads = backward_jvp_op(
        d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
        *_static(options), bias_grad,
    )  # fmt: skip
    return *_empty_as_none(grads[:4], bias_grad), *_empty_as_none(grads[4:], bias_grad)


@custom_op(f"{NAMESPACE}::flash_attn_forward", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None,
    scale: float, causal: bool, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = _options(scale, causal, dropout_p, backend)
    return implementation(backend).forward(q, k, v, bias, seed, options)


@custom_op(f"{NAMESPACE}::flash_attn_forward_jvp", mutates_args=())
def forward_jvp_op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None,
    t_q: Tensor | None, t_k: Tensor | None, t_v: Tensor | None, t_bias: Tensor | None,
    scale: float, causal: bool, dropout_p: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = _options(scale, causal, dropout_p, backend)
    return implementation(backend).forward_jvp(q, k, v, bias, seed, t_q, t_k, t_v, t_bias, options)


@custom_op(f"{NAMESPACE}::flash_attn_backward", mutates_args=())
def backward_op(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None,
    out: Tensor, lse: Tensor,
    scale: float, causal: bool, dropout_p: float, backend: str, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = _options(scale, causal, dropout_p, backend)
    grads = implementation(backend).backward(
        d_out, q, k, v, bias, seed, out, lse, options, bias_grad
    )
    return _absent_as_empty(grads, q)


@custom_op(f"{NAMESPACE}::flash_attn_backward_jvp", mutates_args=())
def backward_jvp_op(
    d_out: Tensor | None, d_t_out: Tensor,
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None,
    t_q: Tensor | None, t_k: Tensor | None, t_v: Tensor | None, t_bias: Tensor | None,
    out: Tensor, t_out: Tensor, lse: Tensor, mu: Tensor,
    scale: float, causal: bool, dropout_p: float, backend: str, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = _options(scale, causal, dropout_p, backend)
    grads = implementation(backend).backward_jvp(
        d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
        options, bias_grad,
    )  # fmt: skip
    return _absent_as_empty(grads, q)


# Fakes. Outputs lie as (B, L, H, D) whatever the inputs' strides are: the compiler does not always
# know those when it asks for the outputs'.


@forward_op.register_fake
def _(q, k, v, bias, seed, scale, causal, dropout_p, backend):
    return _fake_out(q, v), _fake_lse(q, bias, backend)


@forward_jvp_op.register_fake
def _(q, k, v, bias, seed, t_q, t_k, t_v, t_bias, scale, causal, dropout_p, backend):
    return _fake_out(q, v), _fake_out(q, v), _fake_lse(q, bias, backend), _fake_rows(q)


@backward_op.register_fake
def _(d_out, q, k, v, bias, seed, out, lse, scale, causal, dropout_p, backend, bias_grad):
    return _fake_grads(q, k, v, bias, bias_grad)


@backward_jvp_op.register_fake
def _(
    d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
    scale, causal, dropout_p, backend, bias_grad,
):  # fmt: skip
    # eight distinct tensors: the tracer tells outputs apart by identity
    return *_fake_grads(q, k, v, bias, bias_grad), *_fake_grads(q, k, v, bias, bias_grad)


# Gradients.


def _save(ctx, inputs, output):
    *tensors, scale, causal, dropout_p, backend = inputs
    ctx.options = Options(scale, causal, dropout_p, backend)
    ctx.mark_non_differentiable(*output[len(output) // 2 :])  # LSE and μ
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _forward_backward(ctx, d_out, _d_lse):
    if d_out is None:
        return (None,) * 9
    q, k, v, bias, seed, out, lse = ctx.saved_tensors
    bias_grad = ctx.needs_input_grad[3]
    grads = backward(d_out, q, k, v, bias, seed, out, lse, ctx.options, bias_grad)
    return (*grads, *(None,) * 5)


def _forward_jvp_backward(ctx, d_out, d_t_out, _d_lse, _d_mu):
    q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu = ctx.saved_tensors
    bias_grad = ctx.needs_input_grad[3] or ctx.needs_input_grad[8]
    if d_t_out is None:
        if d_out is None:
            return (None,) * 13
        grads = backward(d_out, q, k, v, bias, seed, out, lse, ctx.options, bias_grad)
        return (*grads, *(None,) * 9)
    grads = backward_jvp(
        d_out, d_t_out, q, k, v, bias, seed, t_q, t_k, t_v, t_bias, out, t_out, lse, mu,
        ctx.options, bias_grad,
    )  # fmt: skip
    tangents = (t_q, t_k, t_v, t_bias)
    t_grads = [g if t is not None else None for g, t in zip(grads[4:], tangents, strict=True)]
    return (*grads[:4], None, *t_grads, *(None,) * 4)


forward_op.register_autograd(_forward_backward, setup_context=_save)
forward_jvp_op.register_autograd(_forward_jvp_backward, setup_context=_save)


def _refuse_duals(op: Any, overload: Any) -> None:
    """An operator drops a tangent without a sign of it; one that meets these raises."""
    differentiate = make_autograd_impl(overload, op)

    def run(keyset, *args, **kwargs):
        if may_be_dual():
            tensors = (x for x in args if isinstance(x, Tensor))
            if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
                raise NotImplementedError(RECORDED)
        return differentiate(keyset, *args, **kwargs)

    for device in ("CPU", "CUDA"):
        _library.impl(overload, run, f"Autograd{device}", with_keyset=True)


_library = Library(NAMESPACE, "IMPL")
_overloads = getattr(torch.ops, NAMESPACE)
for _op, _overload in (
    (forward_op, _overloads.flash_attn_forward.default),
    (forward_jvp_op, _overloads.flash_attn_forward_jvp.default),
    (backward_op, _overloads.flash_attn_backward.default),
    (backward_jvp_op, _overloads.flash_attn_backward_jvp.default),
):
    if make_autograd_impl is not None:
        _refuse_duals(_op, _overload)


def _fake_out(q: Tensor, v: Tensor) -> Tensor:
    return empty_rows(q, v.shape[3], _options(1.0))


def _fake_rows(q: Tensor, *more: int) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], *more, dtype=wide)


def _fake_lse(q: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """The kernels keep m and log l apart beside a floating mask."""
    split = backend == "triton" and bias is not None and bias.dtype != torch.bool
    return _fake_rows(q, *[2] * split)


def _fake_grads(q, k, v, bias, bias_grad: bool) -> tuple[Tensor, ...]:
    d_bias = bias.new_empty(bias.shape) if bias_grad else q.new_empty(0)
    return *(empty_rows(x, x.shape[3], _options(1.0)) for x in (q, k, v)), d_bias


def _absent_as_empty(grads, q: Tensor) -> Any:
    return tuple(q.new_empty(0) if g is None else g for g in grads)


def _options(*static: Any) -> Options:
    """What runs below an operator."""
    return Options(*static, rows_first=True)


def _static(options: Options) -> tuple[float, bool, float, str]:
    """The options as an operator takes them. Shards of keys stay below the operators: a backend
    that has them is itself one."""
    if options.sharded:
        raise NotImplementedError("an operator of attention knows no shards of keys")
    return options.scale, options.causal, options.dropout_p, options.backend


def _empty_as_none(grads, bias_grad: bool):
    return (*grads[:3], grads[3] if bias_grad else None)
