"""Drop-ins for public trainers: signature, layout, order of results, value, tangent and gradients,
against softmax in float64."""

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from jvp_flash_attention.dropins import dmf, fastgen, rcm, tvm
from tests.cases import close

B, H, L, S, D = 2, 3, 5, 7, 4


def exact(q, k, v, scale=D**-0.5):
    """(B, H, L, D)"""
    return (q @ k.mT * scale).softmax(-1) @ v


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def inputs(shapes) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    return [draw(*s).requires_grad_() for s in shapes], [draw(*s).requires_grad_() for s in shapes]


HEADS_FIRST = [(B, H, L, D), (B, H, S, D), (B, H, S, D)]
HEADS_SECOND = [(B, L, H, D), (B, S, H, D), (B, S, H, D)]


def grads(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def test_rcm_returns_value_and_a_detached_tangent():
    x, t = inputs(HEADS_FIRST)
    cotangent = draw(B, H, L, D)
    out_exact, t_exact = jvp(lambda *x: exact(*x, 0.3), tuple(x), tuple(t))
    grads_exact = grads((out_exact * cotangent).sum(), x)
    for function in (rcm._attention.apply, rcm.attention):
        out, t_out = function(*x, *t, 0.3)
        close(out, out_exact)
        close(t_out, t_exact)
        assert not t_out.requires_grad
        got = grads((out * cotangent).sum(), [*x, *t])
        assert got[3:] == (None,) * 3
        for g, e in zip(got[:3], grads_exact, strict=True):
            close(g, e)
    out, t_out = rcm.attention(*x, None, t[1], None)
    close(t_out, jvp(lambda k: exact(x[0], k, x[2]), (x[1],), (t[1],))[1])


def test_rcm_pairs_have_the_sequence_before_the_heads():
    x, t = inputs(HEADS_SECOND)
    got = rcm.torch_attention_op_withT(*zip(x, t, strict=True))
    want = rcm.attention(*(y.transpose(1, 2) for y in (*x, *t)))
    for g, e in zip(got, want, strict=True):
        close(g, e.transpose(1, 2))
        assert g.shape == (B, L, H, D)


def test_tvm_differentiates_through_the_tangent_in_every_input():
    x, t = inputs(HEADS_FIRST)
    c, c_t = draw(B, H, L, D), draw(B, H, L, D)
    results = []
    for f in (exact, tvm.sdpa_jvp):
        out, t_out = jvp(f, tuple(x), tuple(t))
        loss = (out * c).sum() + (t_out * c_t).sum()
        results.append((out, t_out, *grads(loss, [*x, *t])))
    for e, g in zip(*results, strict=True):
        close(g, e)
    close(tvm.sdpa_jvp(*x), exact(*x))  # without a jvp


def test_dmf_has_flash_attentions_layout_and_a_detached_tangent():
    x, t = inputs(HEADS_SECOND)
    c, c_t = draw(B, L, H, D), draw(B, L, H, D)

    def transposed(*x):
        return exact(*(y.transpose(1, 2) for y in x), 0.3).transpose(1, 2)

    out_exact, t_exact = jvp(transposed, tuple(x), tuple(t))
    out, t_out = jvp(lambda *x: dmf.flash_attn_func(*x, softmax_scale=0.3), tuple(x), tuple(t))
    close(out, out_exact)
    close(t_out, t_exact)
    got = grads((out * c).sum() + (t_out * c_t).sum(), x)  # the second term has no gradient
    for g, e in zip(got, grads((out_exact * c).sum(), x), strict=True):
        close(g, e)
    close(dmf.flash_attn_func(*x, 0.3), out_exact)


def weights_then_values(q, k, v):
    return torch.einsum("nqk,nck->ncq", fastgen.AttentionOp.apply(q, k), v)


@pytest.mark.parametrize("function", [weights_then_values, fastgen.unet_attention])
def test_fastgen_has_channels_first_and_heads_in_the_batch(function):
    x, t = inputs([(B * H, D, L), (B * H, D, S), (B * H, D + 1, S)])
    c, c_t = draw(B * H, D + 1, L), draw(B * H, D + 1, L)
    results = []
    for f in (lambda *x: exact(*(y.mT for y in x)).mT, function):
        out, t_out = jvp(f, tuple(x), tuple(t))
        loss = (out * c).sum() + (t_out * c_t).sum()
        results.append((out, t_out, *grads(loss, [*x, *t])))
    for e, g in zip(*results, strict=True):
        close(g, e)


def test_fastgens_weights_have_the_dtype_of_the_query():
    q = torch.randn(2, 4, 5, dtype=torch.bfloat16)
    w = fastgen.AttentionOp.apply(q, q)
    assert w.dtype == torch.bfloat16
    torch.testing.assert_close(w.double().sum(-1), torch.ones(2, 5).double(), rtol=0, atol=2e-2)
