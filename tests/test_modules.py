"""The attention module: the same function as dense attention, and every derivative of it right."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call, jvp
from torch.nn import functional as F

from jvp_flash_attention.block_mask import block_mask
from jvp_flash_attention.modules import Attention, RMSNorm
from tests.integrations.derivative import check_tangent, relative

B, L, S, W, C = 2, 5, 7, 24, 10


def rotary(x):
    """Rotates the halves of the last dimension by position times frequency (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    frequency = 100.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequency  # (L, D/2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


OPTIONS = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "causal": {"is_causal": True},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 0.5},
    "qk_norm": {"qk_norm": True},
    "rope": {"rope": rotary},
    "without biases": {"qkv_bias": False, "out_bias": False},
    "cross": {"context_dim": C},
    "all": {"num_kv_heads": 1, "context_dim": C, "qk_norm": True, "rope": rotary},
}


def make(name, dtype=torch.float64):
    """A module with random norm weights, and its input x and context."""
    torch.manual_seed(0)
    module = Attention(W, 4, **OPTIONS[name]).to(dtype)
    for norm in (module.q_norm, module.k_norm):
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    context = torch.randn(B, S, C, dtype=dtype) if module.context_dim else None
    return SimpleNamespace(module=module, x=torch.randn(B, L, W, dtype=dtype), context=context)


def dense(m, x, context=None, mask=None):
    """The module's function from its weights, with the scores as a matrix."""
    if m.context_dim is None:
        q, k, v = m.qkv(x).split([m.dim, *[m.num_kv_heads * m.head_dim] * 2], -1)
    else:
        q, (k, v) = m.q(x), m.kv(context).chunk(2, -1)
    q, k, v = (y.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for y in (q, k, v))
    if m.q_norm is not None:
        q = F.rms_norm(q, (m.head_dim,), m.q_norm.weight, 1e-6)
        k = F.rms_norm(k, (m.head_dim,), m.k_norm.weight, 1e-6)
    if m.rope is not None:
        q, k = m.rope(q), m.rope(k)
    k, v = (y.repeat_interleave(m.num_heads // m.num_kv_heads, 1) for y in (k, v))
    scores = q @ k.mT / math.sqrt(m.head_dim)
    if m.softcap:
        scores = m.softcap * torch.tanh(scores / m.softcap)
    if m.is_causal:
        scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    if m.window is not None:
        left, right = m.window
        beside = torch.arange(L) - torch.arange(L)[:, None]  # j - i
        scores = scores.masked_fill((beside < -left) | (beside > right), -math.inf)
    if mask is not None:
        scores = scores + mask
    return m.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", OPTIONS)
def test_output_is_that_of_dense_attention(name):
    p = make(name)
    mask = torch.randn(B, 1, L, S if p.context is not None else L, dtype=torch.float64)
    for m in (None, mask):
        got, exact = p.module(p.x, p.context, m), dense(p.module, p.x, p.context, m)
        assert relative(got, exact) < 1e-13


@pytest.mark.parametrize("name", OPTIONS)
def test_tangent_in_the_input_equals_finite_differences(name):
    p = make(name)
    check_tangent(lambda x: p.module(x, p.context), p.x)


@pytest.mark.parametrize("name", ["cross", "all"])
def test_tangent_in_the_context_equals_finite_differences(name):
    p = make(name)
    check_tangent(lambda c: p.module(p.x, c), p.context)


def test_tangent_in_the_mask_equals_finite_differences():
    p = make("plain")
    check_tangent(lambda m: p.module(p.x, attn_mask=m), torch.randn(1, 4, L, L).double())


@pytest.mark.parametrize("name", OPTIONS)
def test_tangent_in_every_parameter_equals_finite_differences(name):
    p = make(name)
    parameters = dict(p.module.named_parameters())
    for key in parameters:
        check_tangent(
            lambda w, key=key: functional_call(p.module, {**parameters, key: w}, (p.x, p.context)),
            parameters[key].detach(),
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_value_and_tangent_in_every_parameter_are_those_of_dense_attention(name):
    p = make(name)
    t, weights = torch.randn_like(p.x), torch.randn(2, B, L, W, dtype=torch.float64)

    def gradients(f):
        out, t_out = jvp(f, (p.x,), (t,))
        loss = (out * weights[0]).sum() + (t_out * weights[1]).sum()
        return torch.autograd.grad(loss, list(p.module.parameters()))

    got = gradients(lambda x: p.module(x, p.context))
    exact = gradients(lambda x: dense(p.module, x, p.context))
    for (key, _), g, e in zip(p.module.named_parameters(), got, exact, strict=True):
        assert torch.allclose(g, e, rtol=1e-9, atol=1e-11), key


STRUCTURE = {
    "cu_seqlens": torch.tensor([0, 128, 200], dtype=torch.int32),
    "block_mask": block_mask(torch.eye(2, dtype=torch.bool), 128),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_is_that_of_a_mask_with_its_tangent(name):
    given, p = STRUCTURE[name], make("gqa")
    p.x = torch.randn(1, 200, W, dtype=torch.float64)
    part = torch.arange(200) // 128
    seen, t = part[:, None] == part, torch.randn_like(p.x)
    got = jvp(lambda x: p.module(x, **{name: given}), (p.x,), (t,))
    exact = jvp(lambda x: p.module(x, attn_mask=seen), (p.x,), (t,))
    for g, e in zip(got, exact, strict=True):
        assert relative(g, e) < 1e-13


def test_dropout_acts_in_training_mode_only():
    torch.manual_seed(0)
    module, x = Attention(W, 4, dropout_p=0.5), torch.randn(B, L, W)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_rope_module_is_a_child():
    rope = torch.nn.Identity()
    assert dict(Attention(W, 4, rope=rope).named_children())["rope"] is rope


def test_rms_norm_is_pytorchs():
    torch.manual_seed(0)
    norm = RMSNorm(8, eps=1e-5)
    torch.nn.init.uniform_(norm.weight)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x = torch.randn(3, 8, dtype=dtype)
        exact = F.rms_norm(x.double(), (8,), norm.weight.double(), 1e-5)
        assert norm(x).dtype == dtype
        assert relative(norm(x).double(), exact) < tolerance


def test_autocast_keeps_the_tangent():
    p = make("all", torch.float32)
    t = torch.randn_like(p.x)
    exact = jvp(lambda x: p.module(x, p.context), (p.x,), (t,))
    with torch.autocast("cpu", torch.bfloat16):
        got = jvp(lambda x: p.module(x, p.context), (p.x,), (t,))
    for g, e in zip(got, exact, strict=True):
        assert g.dtype == torch.bfloat16
        assert relative(g.float(), e) < 2e-2


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "backend"),
    [("plain", "aot_eager")]
    + [pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("plain", "all")],
)
def test_a_compiled_jvp_has_the_tangent_and_the_gradients_of_eager(name, backend):
    torch._dynamo.reset()
    p = make(name, torch.float32)
    t = torch.randn_like(p.x)

    def step(x, t):
        out, t_out = jvp(lambda y: p.module(y, p.context), (x,), (t,))
        return out, t_out.detach(), (out - 0.3 * t_out.detach()).square().mean()

    exact = step(p.x, t)
    exact_grads = torch.autograd.grad(exact[2], list(p.module.parameters()))
    got = torch.compile(step, fullgraph=True, backend=backend)(p.x, t)
    grads = torch.autograd.grad(got[2], list(p.module.parameters()))
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e)
    for g, e in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "num_heads must be a positive divisor of dim = 24, got 5"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must be a positive divisor"),
        ({"num_heads": 4, "num_kv_heads": 0}, "num_kv_heads must be a positive divisor"),
        ({"num_heads": 4, "window": (-2, 0)}, "window must have bounds >= 0"),
        ({"num_heads": 4, "softcap": -1.0}, "softcap must be 0 for none"),
        ({"num_heads": 4, "dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_wrong_size_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        Attention(W, **arguments)


def test_a_wrong_call_names_the_argument():
    x, context = torch.randn(B, L, W), torch.randn(B, S, C)
    itself, cross = Attention(W, 4), Attention(W, 4, context_dim=C)
    for call, message in (
        (lambda: itself(x, context), "context must be None"),
        (lambda: cross(x), "context is missing"),
        (lambda: cross(x, x), "context must have shape"),
        (lambda: itself(x[0]), "x must have shape"),
        (lambda: itself(x, attn_mask=torch.zeros(3, 3)), "attn_mask must broadcast"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
