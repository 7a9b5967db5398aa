"""Hugging Face transformers with `attn_implementation="jvp"`, tiny models, random weights."""

import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.integrations.derivative import check_tangent, first_tensor, math_jvp, relative
from tests.integrations.transformers_models import FAMILIES

transformers = pytest.importorskip("transformers", reason="needs the transformers library")

from jvp_flash_attention import reference  # noqa: E402
from jvp_flash_attention.integrations.transformers import register  # noqa: E402
from jvp_flash_attention.override import sdpa_override  # noqa: E402

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {"vocab_size": 11, "num_key_value_heads": 2, "max_position_embeddings": 32}
MODELS = {
    "starcoder2": lambda: transformers.Starcoder2Config(**SMALL, **DECODER),
    "llama": lambda: transformers.LlamaConfig(**SMALL, **DECODER),
    "bert": lambda: transformers.BertConfig(**SMALL, vocab_size=11, max_position_embeddings=32),
    "vit": lambda: transformers.ViTConfig(**SMALL, image_size=8, patch_size=4),
}
PADDING = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def model(name, implementation):
    torch.manual_seed(0)
    config = MODELS[name]()
    config._attn_implementation = implementation
    return transformers.AutoModel.from_config(config).double().eval()


def function(net, padding):
    """The model in its continuous input: pixels, or embeddings of a sequence of 7."""
    torch.manual_seed(1)
    if net.config.model_type == "vit":
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        return lambda y: net(pixel_values=y).last_hidden_state, x
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    return lambda y: net(inputs_embeds=y, attention_mask=padding).last_hidden_state, x


@pytest.fixture(autouse=True)
def registered():
    register()


@pytest.mark.parametrize("padding", [None, PADDING], ids=["", "padded"])
@pytest.mark.parametrize("name", ["starcoder2", "bert", "vit"])
def test_output_is_that_of_sdpa_and_the_tangent_equals_finite_differences(name, padding):
    f, x = function(model(name, "sdpa"), padding)
    exact = f(x)
    g, _ = function(model(name, "jvp"), padding)
    out, _ = check_tangent(g, x)
    assert relative(out, exact) < 1e-12
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(f, (x,), (x,))
    with sdpa_override():
        out, _ = check_tangent(f, x)
    assert relative(out, exact) < 1e-12


@pytest.mark.parametrize("padding", [None, PADDING], ids=["", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_tangent_are_those_of_plain_attention(name, padding):
    """For every model, and for Llama alone, whose norm rounds to float32: no finite differences."""
    f, x = function(model(name, "sdpa"), padding)
    g, _ = function(model(name, "jvp"), padding)
    with sdpa_kernel(SDPBackend.MATH):
        exact = jvp(f, (x,), (x.flip(0),))
    for got, e in zip(jvp(g, (x,), (x.flip(0),)), exact, strict=True):
        assert relative(got, e) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_tangent_of_pytorchs_attention(name, monkeypatch):
    """By name and in the override, with every attention of the model counted."""
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    settings, draw = FAMILIES[name]
    config = transformers.AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    net = transformers.AutoModel.from_config(config, attn_implementation="sdpa").double().eval()
    for p in net.parameters():  # attention is to matter, which it does not at the start
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    inputs = draw()
    key = next(iter(inputs))
    x = inputs.pop(key)
    f = lambda y: first_tensor(net(**{key: y}, **inputs, return_dict=False))  # noqa: E731
    t = torch.randn_like(x)
    exact, calls = math_jvp(f, x, t)
    with sdpa_override() as o:
        inside = jvp(f, (x,), (t,))
    assert o.jvp_calls == calls > 0
    passes = []

    run = reference.forward  # a decoder's self-attention may have no tangent
    monkeypatch.setattr(reference, "forward", lambda *args: passes.append(args) or run(*args))
    net.set_attn_implementation("jvp")
    by_name = jvp(f, (x,), (t,))
    assert len(passes) == calls
    for got in (inside, by_name):
        for g, e in zip(got, exact, strict=True):
            assert relative(g, e) < 1e-5  # norms of many round to float32


@pytest.mark.parametrize("softcap", [None, 0.3])
def test_gemma_2s_soft_cap_is_that_of_its_eager_attention(softcap):
    """Which takes the softmax in float32. transformers' sdpa has none."""
    results = []
    for implementation in ("eager", "jvp"):
        torch.manual_seed(0)
        config = transformers.Gemma2Config(
            **SMALL, **DECODER, head_dim=4, query_pre_attn_scalar=4, sliding_window=4,
            attn_logit_softcapping=softcap,
        )  # fmt: skip
        net = transformers.AutoModel.from_config(config, attn_implementation=implementation)
        for p in net.double().eval().parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.3)
        f, x = function(net, PADDING)
        results.append(jvp(f, (x,), (x.flip(0),)))
    for exact, got in zip(*results, strict=True):
        assert relative(got[PADDING > 0], exact[PADDING > 0]) < 1e-6


def test_a_model_that_exists_can_be_switched():
    net = model("starcoder2", "sdpa")
    net.set_attn_implementation("jvp")
    check_tangent(*function(net, PADDING))


def test_a_cache_continues_a_sequence():
    net = model("starcoder2", "jvp")
    f, x = function(net, None)
    start = net(inputs_embeds=x[:, :5], use_cache=True)
    end = net(inputs_embeds=x[:, 5:], past_key_values=start.past_key_values)
    assert relative(end.last_hidden_state, f(x)[:, 5:]) < 1e-6


def test_gradients_through_the_value_and_the_tangent_are_those_of_plain_attention():
    grads = []
    for implementation in ("sdpa", "jvp"):
        net = model("starcoder2", implementation)
        f, x = function(net, PADDING)
        with sdpa_kernel(SDPBackend.MATH):
            out, t_out = jvp(f, (x,), (x.flip(0),))
        loss = out.square().mean() + t_out.square().mean()
        grads.append(torch.autograd.grad(loss, list(net.layers.parameters())))
    for exact, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_compiled_jvp_is_right_or_raises(name):
    torch._dynamo.reset()
    f, x = function(model(name, "jvp"), None)
    t = torch.randn_like(x)
    step = torch.compile(lambda x, t: jvp(f, (x,), (t,)), fullgraph=True, backend="aot_eager")
    try:
        got = step(x, t)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError):
        assert name == "vit"  # affine F.layer_norm has no compiled tangent, PyTorch's limit
        return
    for g, e in zip(got, jvp(f, (x,), (t,)), strict=True):
        torch.testing.assert_close(g, e)


def test_the_backend_is_passed_on():
    register("jvp_triton", backend="triton")
    f, x = function(model("vit", "jvp_triton"), None)
    with pytest.raises(NotImplementedError, match="backend='triton'"):
        f(x)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "jvp_flash"])
def test_names_that_transformers_reads_otherwise_are_refused(name):
    with pytest.raises(ValueError, match="name must not contain 'flash'"):
        register(name)
