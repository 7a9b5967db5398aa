"""`sdpa_override`: which calls it replaces, when, and that what it replaces has a tangent."""

import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

from jvp_flash_attention import attention
from jvp_flash_attention import override as module_of_the_override
from jvp_flash_attention.integrations.timm import use_fused_attention
from jvp_flash_attention.override import sdpa_override
from tests.integrations.derivative import check_tangent, relative

Q, K, V = torch.randn(
    3, 2, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
)
WEIGHTS = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1)) / 3


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach this attention."""
    seen = []

    def spy(*args, **kwargs):
        seen.append((args, kwargs))
        return attention(*args, **kwargs)

    monkeypatch.setattr(module_of_the_override, "attention", spy)
    return seen


def net(x):
    """A model that calls SDPA: (B, L, 8) -> (B, L, 8)."""
    heads = (F.linear(x, w.to(x.dtype)).unflatten(-1, (2, 4)).transpose(1, 2) for w in WEIGHTS)
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def net_inside(x):
    with sdpa_override():
        return net(x)


def exact_jvp(f, x, t):
    """The tangent of PyTorch's own attention, in the only backend of it that has one."""
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(f, (x,), (t,))


def no_tangent():
    """PyTorch's own attention is called again, and says so."""
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(F.scaled_dot_product_attention, (Q, K, V), (Q, K, V))


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, dtype=dtype, generator=generator) for _ in range(2)]


def test_calls_are_replaced_inside_and_only_inside(calls):
    F.scaled_dot_product_attention(Q, K, V)
    with sdpa_override():
        F.scaled_dot_product_attention(Q, K, V)
        torch.nn.functional.scaled_dot_product_attention(Q, K, V)
    F.scaled_dot_product_attention(Q, K, V)
    assert len(calls) == 2
    no_tangent()


MASK = torch.randn(4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
FORMS = {
    "positions": ((Q, K, V, MASK, 0.0, False), {}),
    "positions causal": ((Q, K, V, None, 0.0, True), {}),
    "names": ((), {"query": Q, "key": K, "value": V, "attn_mask": MASK > 0, "scale": 0.3}),
    "both": ((Q, K), {"value": V, "is_causal": True, "dropout_p": 0.0}),
    "gqa": ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True}),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_argument_is_passed_on_by_position_and_by_name(name, calls):
    args, kwargs = FORMS[name]
    exact = F.scaled_dot_product_attention(*args, **kwargs)
    with sdpa_override():
        got = F.scaled_dot_product_attention(*args, **kwargs)
    assert relative(got, exact) < 1e-13
    ((got_args, got_kwargs),) = calls
    assert got_args == args
    assert got_kwargs == {**kwargs, "backend": None, "tangent_grad": True}


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_is_the_mask_that_it_stands_for(make):
    """PyTorch's own kind of mask, a tensor with a shape and without elements."""
    q, mask = Q[:, :, :3], make(3, 5)
    exact = F.scaled_dot_product_attention(q, K, V, mask)
    with sdpa_override():
        assert relative(F.scaled_dot_product_attention(q, K, V, mask), exact) < 1e-13
    assert relative(attention(q, K, V, mask), exact) < 1e-13


def test_dropout_is_passed_on():
    ones = torch.ones(1, 1, 64, 64)
    with sdpa_override():
        out = F.scaled_dot_product_attention(ones, ones, ones, dropout_p=0.5)
    assert out.std() > 0
    assert abs(out.mean() - 1) < 0.2


def test_the_backend_is_passed_on_and_checked(calls):
    with sdpa_override(backend="reference"):
        F.scaled_dot_product_attention(Q, K, V)
    assert calls[0][1]["backend"] == "reference"
    with pytest.raises(ValueError, match="backend must be one of"):
        sdpa_override(backend="flash")


def test_jvp_inside_and_around_equals_finite_differences():
    x = draw(2, 5, 8, dtype=torch.float64)[0]
    with sdpa_override():
        check_tangent(net, x)
    check_tangent(net_inside, x)


def test_other_transforms_inside_and_around_equal_those_of_pytorch():
    x, t = draw(2, 5, 8, dtype=torch.float64)
    compositions = (
        lambda f: grad(lambda y: f(y).square().sum())(x),
        lambda f: vmap(lambda y: f(y[None])[0])(x),
        lambda f: grad(lambda y: jvp(f, (y,), (t,))[1].square().sum())(x),
        lambda f: jvp(grad(lambda y: f(y).square().sum()), (x,), (t,))[1],
        lambda f: vmap(lambda d: jvp(f, (x,), (d,))[1])(torch.stack([t, x])),
    )
    for compose in compositions:
        with sdpa_kernel(SDPBackend.MATH):
            exact = compose(net)
        with sdpa_override():
            assert relative(compose(net), exact) < 1e-12
        assert relative(compose(net_inside), exact) < 1e-12


def test_it_nests_and_ends_with_an_exception(calls):
    mode = sdpa_override()
    with mode, sdpa_override(), mode:
        F.scaled_dot_product_attention(Q, K, V)
    assert len(calls) == 1  # once, not once a level
    with pytest.raises(ValueError, match="key must have query's head dim"), sdpa_override():
        F.scaled_dot_product_attention(Q, K[..., :3], V)
    no_tangent()
    with pytest.raises(KeyError), sdpa_override(), sdpa_override():
        raise KeyError
    no_tangent()


def test_other_modes_still_see_the_other_calls(calls):
    with torch.device("meta"), sdpa_override(), torch.device("cpu"):
        assert torch.zeros(1).device.type == "cpu"
        F.scaled_dot_product_attention(Q, K, V)
    with torch.device("meta"), sdpa_override():
        assert torch.zeros(1).device.type == "meta"
    assert len(calls) == 1


def test_other_threads_are_left_alone(calls):
    with sdpa_override():
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=(Q, K, V))
        thread.start()
        thread.join()
    assert calls == []


# nn.MultiheadAttention and nn.TransformerEncoderLayer


def layers(dtype=torch.float64):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=True, dtype=dtype)
    other = nn.MultiheadAttention(8, 2, kdim=8, vdim=8, add_bias_kv=True, bias=False, dtype=dtype)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=dtype)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=dtype)
    return {
        "mha": (mha, lambda x: mha(x, x, x, need_weights=False)[0]),
        "mha padded": (mha, lambda x: mha(x, x, x, padding, need_weights=False)[0]),
        "mha causal": (
            mha,
            lambda x: mha(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0],
        ),
        "mha weights": (mha, lambda x: mha(x, x, x)[0]),
        "mha with key biases": (other, lambda x: other(x, x, x, need_weights=False)[0]),
        "encoder layer": (encoder, encoder),
        "encoder layer padded": (encoder, lambda x: encoder(x, src_key_padding_mask=padding)),
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", layers())
def test_pytorchs_attention_layers_have_a_tangent_in_training_and_in_eval(name, training):
    module, f = layers()[name]
    module.train(training).requires_grad_(training)
    x = draw(2, 5, 8, dtype=torch.float64)[0]
    with sdpa_kernel(SDPBackend.MATH):
        exact = f(x)
    with sdpa_override():
        out, _ = check_tangent(f, x)
        with torch.no_grad():  # where PyTorch would take its inference kernel
            assert relative(f(x), exact) < 1e-12
    assert relative(out, exact) < 1e-12


def test_a_padding_mask_of_a_wrong_shape_raises():
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    with sdpa_override(), pytest.raises(ValueError, match="key_padding_mask must have shape"):
        mha(x, x, x, torch.zeros(5, 2, dtype=torch.bool), need_weights=False)


# checkpointing


def test_checkpointing_is_right_with_the_override_inside_the_checkpointed_function():
    x = draw(2, 5, 8, dtype=torch.float64)[0].requires_grad_()
    (exact,) = torch.autograd.grad(net(x).square().sum(), x)
    out = checkpoint(net_inside, x, use_reentrant=False)
    (got,) = torch.autograd.grad(out.square().sum(), x)
    assert relative(got, exact) < 1e-12


def test_checkpointing_with_the_override_outside_raises_or_is_right():
    x = draw(2, 5, 8, dtype=torch.float64)[0].requires_grad_()
    (exact,) = torch.autograd.grad(net(x).square().sum(), x)
    with sdpa_override():
        out = checkpoint(net, x, use_reentrant=False)
    try:
        (got,) = torch.autograd.grad(out.square().sum(), x)
    except torch.utils.checkpoint.CheckpointError:
        return
    assert relative(got, exact) < 1e-12


# torch.compile


def around(f, *args):
    with sdpa_override():
        return f(*args)


def compiled(f, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


WHERE = {
    "override around the compiled function": lambda b: (
        lambda x, t: around(compiled(lambda x, t: jvp(net, (x,), (t,)), b), x, t)
    ),
    "override in the compiled function": lambda b: compiled(
        lambda x, t: around(jvp, net, (x,), (t,)), b
    ),
    "override in the differentiated function": lambda b: compiled(
        lambda x, t: jvp(net_inside, (x,), (t,)), b
    ),
}


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", WHERE)
def test_a_compiled_jvp_has_the_tangent_of_eager(where, backend):
    x, t = draw(2, 5, 8)
    for got, exact in zip(WHERE[where](backend)(x, t), exact_jvp(net, x, t), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.compile
def test_a_compiled_function_notices_when_the_override_begins_and_ends():
    seen = []

    def backend(graph, _):
        names = {str(node.target) for node in graph.graph.nodes}
        seen.append("ours" if any("jvp_flash_attention" in n for n in names) else "PyTorch's")
        return graph

    x, _ = draw(2, 5, 8)
    f = compiled(net, backend)
    for call in (f, lambda y: around(f, y), f, lambda y: around(f, y)):
        torch.testing.assert_close(call(x), net(x))
    assert seen == ["PyTorch's", "ours"]  # compiled once each, the right one taken thereafter


@pytest.mark.compile
def test_a_graph_break_keeps_the_override():
    def broken(x):
        y = net(x)
        torch._dynamo.graph_break()
        return jvp(net, (y,), (x,))

    x, _ = draw(2, 5, 8)
    with sdpa_kernel(SDPBackend.MATH):
        exact = broken(x)
    torch._dynamo.reset()
    for f in (
        lambda y: around(torch.compile(broken, backend="aot_eager"), y),
        torch.compile(lambda y: around(broken, y), backend="aot_eager"),
    ):
        for g, e in zip(f(x), exact, strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.compile
def test_a_compiled_jvp_of_an_affine_layer_norm_has_the_gradients_of_eager():
    layer = {"norm_first": True, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    model = nn.TransformerEncoderLayer(8, 2, 8, **layer)
    nn.init.normal_(model.norm1.weight)
    nn.init.normal_(model.norm2.bias)
    x, t = (y.clone() for y in draw(2, 5, 8, dtype=torch.float64))

    def step(x, t):
        out, t_out = jvp(lambda x: model(x), (x,), (t,))
        return (out * (out + t_out.detach())).mean()

    with sdpa_kernel(SDPBackend.MATH):
        exact = step(x, t)
    got = around(compiled(step), x, t)
    grads = (torch.autograd.grad(y, list(model.parameters())) for y in (got, exact))
    for g, e in zip(*grads, strict=True):
        assert relative(g, e) < 1e-11


@pytest.mark.compile
def test_jvp_of_a_compiled_function_raises_as_for_every_function():
    x, t = draw(2, 5, 8)
    with sdpa_override(), pytest.raises(torch._dynamo.exc.Unsupported, match="jvp"):
        jvp(compiled(net), (x,), (t,))


MHA = ["mha causal", "mha weights", "mha with key biases"]
# "mha" is in all of them, and a compiled step with "mha padded" is in the next test
MHA += [pytest.param(name, marks=pytest.mark.slow) for name in ("mha", "mha padded")]


@pytest.mark.compile
@pytest.mark.parametrize("name", MHA)
def test_a_compiled_jvp_of_multi_head_attention_has_the_tangent_of_eager(name):
    _, f = layers(torch.float32)[name]
    x, t = draw(2, 5, 8)
    got = around(compiled(lambda x, t: jvp(f, (x,), (t,))), x, t)
    for g, e in zip(got, exact_jvp(f, x, t), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.compile
def test_weights_get_the_gradients_of_eager_in_a_compiled_meanflow_step():
    module, _ = layers(torch.float32)["mha padded"]
    parameters = dict(module.named_parameters())
    x, t = draw(2, 5, 8)

    def step(parameters, x, t):
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        call = lambda y: functional_call(  # noqa: E731
            module, parameters, (y, y, y, padding), {"need_weights": False}
        )[0]
        u, du = jvp(call, (x,), (t,))
        return (u - (t - 0.3 * du).detach()).square().mean()

    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.autograd.grad(step(parameters, x, t), list(parameters.values()))
    loss = around(compiled(step), parameters, x, t)
    got = torch.autograd.grad(loss, list(parameters.values()))
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_what_came_is_counted_and_a_jvp_without_attention_is_warned_about(recwarn):
    x, t = draw(2, 5, 8)
    with sdpa_override() as o:
        net(x)
        jvp(net, (x,), (t,))
        jvp(lambda x: net(x), (x,), (t,))
    assert (o.calls, o.jvp_calls) == (3, 2)
    assert not [w for w in recwarn if "sdpa_override" in str(w.message)]
    with pytest.warns(UserWarning, match="fused_attn"), sdpa_override() as o:
        jvp(lambda x: x.softmax(-1) @ x.mT, (x,), (t,))
    assert (o.calls, o.jvp_calls) == (0, 0)


class WrittenOut(nn.Module):
    """timm's pattern: a switch between SDPA and products."""

    def __init__(self, fused_attn):
        super().__init__()
        self.fused_attn = fused_attn

    def forward(self, x):
        if self.fused_attn:
            return F.scaled_dot_product_attention(x, x, x)
        return (x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) @ x


def test_the_fused_path_of_a_model_is_switched_on():
    model = nn.Sequential(WrittenOut(False), WrittenOut(True), WrittenOut(False))
    x, t = draw(1, 2, 5, 8, dtype=torch.float64)
    exact = jvp(nn.Sequential(*(WrittenOut(False) for _ in range(3))), (x,), (t,))
    assert use_fused_attention(model) == 3
    with sdpa_override() as o:
        got = jvp(model, (x,), (t,))
    assert o.jvp_calls == 3
    for g, e in zip(got, exact, strict=True):
        assert relative(g, e) < 1e-12
    with pytest.raises(ValueError, match="fused_attn"):
        use_fused_attention(nn.Linear(2, 2))


def test_the_other_layout_is_named_where_shapes_give_it_away():
    x, y = torch.randn(1, 256, 8, 4), torch.randn(1, 77, 8, 4)
    with pytest.warns(UserWarning, match="flash_attn"):
        attention(x, x, x)
    with pytest.raises(ValueError, match=r"transpose\(1, 2\).*flash_attn_func") as raised:
        attention(x, y, y)
    assert "enable_gqa" not in str(raised.value)
    with pytest.raises(ValueError, match="flash_attn_func") as raised:
        attention(x, y[:, :64], y[:, :64])  # grouping would be wrong too
    assert "enable_gqa" not in str(raised.value)
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        attention(Q, K[:, :2, :4], V[:, :2, :4])
