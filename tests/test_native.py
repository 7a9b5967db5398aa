"""The switch of PyTorch's own attention: what comes to this one, on which thread, and back."""

import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from jvp_flash_attention import native
from tests.cases import close

SDPA = F.scaled_dot_product_attention
RNG = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, 2, 5, 4, dtype=torch.float64, generator=RNG) for _ in range(3))
X, T = (torch.randn(2, 5, 8, dtype=torch.float64, generator=RNG) for _ in range(2))
WEIGHTS = [
    torch.randn(8, 8, dtype=torch.float64, generator=RNG, requires_grad=True) for _ in range(3)
]


@pytest.fixture(autouse=True)
def _restored():
    yield
    native.deactivate()


def net(x):
    heads = (F.linear(x, w).unflatten(-1, (2, 4)).transpose(1, 2) for w in WEIGHTS)
    return x + SDPA(*heads).transpose(1, 2).flatten(2)


def encoder(training=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64)
    return layer.train(training)


def in_a_thread(f):
    found = []
    thread = threading.Thread(target=lambda: found.append(f()))
    thread.start()
    thread.join()
    return found[0]


def dual():
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(SDPA(forward_ad.make_dual(Q, V), K, V))


def step():
    out, t_out = jvp(net, (X,), (T,))
    return torch.autograd.grad((out * t_out).sum(), WEIGHTS)


def quietly(context):
    with context():
        return [x.clone() for x in jvp(SDPA, (Q, K, V), (V, Q, K))]


def checkpointed():
    x = X.clone().requires_grad_()
    return torch.autograd.grad(checkpoint(net, x, use_reentrant=False).square().sum(), x)


@torch.jit.script
def scripted(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


USES = {
    "TorchScript": lambda: jvp(scripted, (Q, K, V), (V, Q, K)),
    "plain": lambda: SDPA(Q, K, V, is_causal=True),
    "jvp": lambda: jvp(SDPA, (Q, K, V), (V, Q, K)),
    "dual level": dual,
    "gradient through the jvp": step,
    "hvp": lambda: jvp(grad(lambda q: SDPA(q, K, V).square().sum()), (Q,), (V,)),
    "vmap": lambda: vmap(SDPA)(Q, K, V),
    "vmap of jvp": lambda: vmap(lambda q, t: jvp(lambda q: SDPA(q, K, V), (q,), (t,)))(Q, V),
    "hessian": lambda: hessian(lambda q: SDPA(q, K, V).sin().sum())(Q[:, :, :1]),
    "thread": lambda: in_a_thread(lambda: jvp(SDPA, (Q, K, V), (V, Q, K))),
    "no_grad": lambda: quietly(torch.no_grad),
    "inference mode": lambda: quietly(torch.inference_mode),
    "encoder layer": lambda: jvp(encoder(), (X,), (T,)),
    "encoder layer in eval": lambda: jvp(encoder(False), (X,), (T,)),
    "checkpointing": checkpointed,
}


@pytest.mark.parametrize("name", USES)
def test_every_use_has_the_value_and_derivatives_of_pytorchs_attention(name, monkeypatch):
    calls, attention = [], native.attention
    monkeypatch.setattr(native, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    with sdpa_kernel(SDPBackend.MATH):
        exact = USES[name]()
    assert not calls
    native.activate()
    got = USES[name]()
    assert calls
    exact, got = ((x,) if isinstance(x, torch.Tensor) else x for x in (exact, got))
    for g, e in zip(got, exact, strict=True):
        close(g, e)


def test_it_begins_and_ends():
    no_tangent = pytest.raises(NotImplementedError, match="forward AD")
    assert not native.is_active()
    for _ in range(2):
        native.activate()
        native.activate(tangent_grad=False)  # changes how
        assert native.is_active()
        assert not jvp(SDPA, (Q.requires_grad_(), K, V), (V, Q.detach(), K))[1].requires_grad
        Q.requires_grad_(False)
        native.deactivate()
        native.deactivate()
        assert not native.is_active()
        with no_tangent:
            jvp(SDPA, (Q, K, V), (V, Q, K))


@pytest.mark.skipif(native._registry is None, reason="this PyTorch has no registry")
def test_pytorchs_registry_switches_it():
    from torch.nn import attention as registry

    assert native.NAME in registry.list_flash_attention_impls()
    registry.activate_flash_attention_impl(native.NAME)
    assert native.is_active()
    close(jvp(SDPA, (Q, K, V), (V, Q, K))[0], SDPA(Q, K, V))
    registry.restore_flash_attention_impl()
    assert not native.is_active()


def test_without_a_registry_it_is_a_library_of_its_own(monkeypatch):
    monkeypatch.setattr(native, "_registry", None)
    exact = jvp(lambda q: native.attention(q, K, V), (Q,), (T[0, 0, 0].expand_as(Q),))
    native.activate()
    assert native.is_active()
    close(jvp(lambda q: SDPA(q, K, V), (Q,), (T[0, 0, 0].expand_as(Q),))[1], exact[1])
    native.deactivate()
    assert not native.is_active()
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(SDPA, (Q, K, V), (V, Q, K))


def test_what_it_does_not_know_stays_pytorchs():
    native.activate()
    assert SDPA(*(x.to("meta") for x in (Q, K, V))).is_meta
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)])
    assert SDPA(nested, nested, nested).is_nested
    with pytest.raises(RuntimeError, match="dtype"):
        SDPA(Q, K.float(), V)
    with pytest.raises(ValueError, match="backend must be one of"):
        native.activate(backend="cudnn")


def test_who_chooses_math_has_it_but_inside_a_jvp(monkeypatch):
    calls, attention = [], native.attention
    monkeypatch.setattr(native, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    exact = torch.ops.aten._scaled_dot_product_attention_math(Q, K, V)[0]
    native.activate()
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(SDPA(Q, K, V), exact)
        close(
            grad(lambda q: SDPA(q, K, V).sum())(Q),
            grad(lambda q: native.attention(q, K, V).sum())(Q),
        )
        assert len(calls) == 1  # that of the line before
        out, _ = jvp(SDPA, (Q, K, V), (V, Q, K))  # as trainers do, for the tangent
    assert len(calls) == 2
    close(out, exact)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        SDPA(Q, K, V)
    assert len(calls) == 3


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_jvp_inside_of_math_is_ours(backend, monkeypatch):
    calls, attention = [], native.attention
    monkeypatch.setattr(native, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    tangent = lambda q, t: jvp(lambda q: SDPA(q, K, V), (q,), (t,))  # noqa: E731
    native.activate()
    counts = []
    for chosen in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        calls.clear()
        torch._dynamo.reset()
        with sdpa_kernel(chosen):
            found = torch.compile(tangent, backend=backend, fullgraph=True)(Q, V)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    for x, exact in zip(found, tangent(Q, V), strict=True):
        close(x, exact)


def test_a_mask_and_causal_are_combined_as_pytorchs_fused_kernel_does():
    """Its MATH raises."""
    mask = torch.rand(5, 5, generator=RNG) > 0.3
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        exact = SDPA(Q, K, V, mask, is_causal=True)
    native.activate()
    close(SDPA(Q, K, V, mask, is_causal=True), exact)


@pytest.mark.compile
@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_a_compiled_jvp_has_the_value_tangent_and_gradients_of_eager(backend):
    def step(x, t):
        out, t_out = jvp(net, (x,), (t,))
        return (out * (out + t_out.detach())).mean()

    with sdpa_kernel(SDPBackend.MATH):
        exact = step(X, T)
    native.activate()
    torch._dynamo.reset()
    got = torch.compile(step, backend=backend, fullgraph=True)(X, T)
    close(got, exact)
    for g, e in zip(*(torch.autograd.grad(x, WEIGHTS) for x in (got, exact)), strict=True):
        close(g, e)
