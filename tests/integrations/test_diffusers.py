"""Hugging Face diffusers: the attention processor and the override, tiny models, random weights."""

import inspect

import pytest
import torch
from torch import nn
from torch.func import jvp

from tests.integrations.derivative import check_tangent, first_tensor, math_jvp, relative
from tests.integrations.diffusers_models import FLOAT32, MODELS, NOT_HERE

diffusers = pytest.importorskip("diffusers", reason="needs the diffusers library")

from diffusers.models.attention_processor import (  # noqa: E402
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
)

from jvp_flash_attention.integrations.diffusers import JVPFlashAttnProcessor  # noqa: E402
from jvp_flash_attention.override import sdpa_override  # noqa: E402

LAYERS = {
    "self": {},
    "cross": {"cross_attention_dim": 10},
    "cross with norms": {"cross_attention_dim": 10, "cross_attention_norm": "layer_norm"},
    "qk norms": {"qk_norm": "layer_norm"},
    "image": {"norm_num_groups": 2, "residual_connection": True, "rescale_output_factor": 1.3},
}


def layer(name, processor):
    torch.manual_seed(0)
    options = {"query_dim": 8, "heads": 2, "dim_head": 4, "bias": True}
    return Attention(**options, **LAYERS[name], processor=processor).double().eval()


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_output_of_sdpa_and_the_tangent_of_finite_differences(name, masked):
    torch.manual_seed(1)
    x = torch.randn(2, *((8, 2, 3) if name == "image" else (6, 8)), dtype=torch.float64)
    context = torch.randn(2, 5, 10, dtype=torch.float64) if "cross" in name else None
    S = 6 if context is None else 5
    mask = torch.randn(2, 1, S, dtype=torch.float64) if masked else None
    exact = layer(name, AttnProcessor2_0())(x, context, attention_mask=mask)
    ours = layer(name, JVPFlashAttnProcessor())
    out, _ = check_tangent(lambda y: ours(y, context, attention_mask=mask), x)
    assert relative(out, exact) < 1e-12
    if context is not None:
        check_tangent(lambda c: ours(x, c, attention_mask=mask), context)


def unet():
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=10,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    context = torch.randn(1, 5, 10, dtype=torch.float64)
    time = torch.tensor([3.0], dtype=torch.float64)
    net = net.double().eval()
    return net, lambda x: net(x, time, context).sample, torch.randn(1, 2, 8, 8).double()


def dit():
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=2,
    )
    net = net.double().eval()
    time, label = torch.tensor([3]), torch.tensor([1])
    return net, lambda x: net(x, time, label).sample, torch.randn(1, 2, 8, 8).double()


def test_a_unet_with_the_processor_has_a_tangent():
    net, f, x = unet()
    exact = f(x)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(f, (x,), (x,))
    net.set_attn_processor(JVPFlashAttnProcessor())
    out, _ = check_tangent(f, x)
    assert relative(out, exact) < 1e-12


def test_a_model_without_set_attn_processor_takes_it_layer_by_layer():
    net, f, x = dit()
    exact = f(x)
    for module in net.modules():
        if isinstance(module, Attention):
            module.set_processor(JVPFlashAttnProcessor())
    out, _ = check_tangent(f, x)
    assert relative(out, exact) < 1e-12


@pytest.mark.parametrize("make", [unet, dit])
def test_a_model_in_the_override_has_a_tangent(make):
    _, f, x = make()
    exact = f(x)
    with sdpa_override():
        out, _ = check_tangent(f, x)
    assert relative(out, exact) < 1e-12


def test_gradients_through_the_tangent_are_those_of_plain_attention():
    grads = []
    for processor in (AttnProcessor(), JVPFlashAttnProcessor()):
        net, f, x = unet()
        net.set_attn_processor(processor)
        out, t_out = jvp(f, (x,), (x.flip(-1),))
        loss = out.square().mean() + t_out.square().mean()
        grads.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    for exact, got in zip(*grads, strict=True):
        assert (exact is None) == (got is None)
        if exact is not None:
            torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-12)


def test_gradient_checkpointing_recomputes_the_same_attention():
    grads = []
    for processor in (AttnProcessor2_0(), JVPFlashAttnProcessor()):
        net, f, x = unet()
        net.set_attn_processor(processor)
        net.train()
        net.enable_gradient_checkpointing()
        loss = f(x.requires_grad_()).square().mean()
        grads.append(torch.autograd.grad(loss, x)[0])
    assert relative(grads[1], grads[0]) < 1e-11


@pytest.mark.compile
@pytest.mark.slow
def test_a_compiled_jvp_of_a_layer_has_the_tangent_of_eager():
    torch._dynamo.reset()
    ours = layer("self", JVPFlashAttnProcessor())
    x, t = torch.randn(2, 6, 8).double(), torch.randn(2, 6, 8).double()
    got = torch.compile(lambda x, t: jvp(ours, (x,), (t,)), fullgraph=True)(x, t)
    for g, e in zip(got, jvp(ours, (x,), (t,)), strict=True):
        torch.testing.assert_close(g, e)


def test_a_layer_with_other_projections_is_refused():
    added = Attention(query_dim=8, heads=2, dim_head=4, added_kv_proj_dim=6, norm_num_groups=2)
    added.set_processor(AttnAddedKVProcessor2_0())
    with pytest.raises(NotImplementedError, match=r"run the model inside .*sdpa_override"):
        JVPFlashAttnProcessor()(added, torch.randn(1, 8, 2, 2), torch.randn(1, 3, 6))


def value(x, dtype):
    """What an input stands for."""
    if isinstance(x, tuple) and all(isinstance(n, int) for n in x):
        return torch.randn(x, dtype=dtype)
    if isinstance(x, list):
        return [value(y, dtype) for y in x] if isinstance(x[0], tuple) and len(x) > 1 else x
    return x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_the_override_has_the_tangent_of_pytorchs_attention(name):
    """The tangent of its first input, with every attention of the model counted."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    config, given = MODELS[name]
    dtype = torch.float32 if name in FLOAT32 else torch.float64
    torch.manual_seed(0)
    model = getattr(diffusers, name)
    net = model(**config).to(dtype).eval()
    for p in net.parameters():  # layers that start at zero would hide the others
        if not p.any():
            nn.init.normal_(p, std=0.1)
    inputs = {key: value(x, dtype) for key, x in given.items()}
    key = next(iter(inputs))
    x = inputs.pop(key)
    if "return_dict" in inspect.signature(model.forward).parameters:
        inputs["return_dict"] = False
    wrap = (lambda y: [y]) if name.startswith("ZImage") else (lambda y: y)
    f = lambda y: first_tensor(net(**{key: wrap(y)}, **inputs))  # noqa: E731
    t = torch.randn_like(x)
    exact, calls = math_jvp(f, x, t)
    with sdpa_override() as o:
        got = jvp(f, (x,), (t,))
    assert o.jvp_calls == calls > 0
    for g, e in zip(got, exact, strict=True):
        assert e.norm() > 0
        # norms and positions of many round to float32
        assert relative(g, e) < (1e-5 if name in FLOAT32 else 1e-6)


def test_every_model_of_the_tested_version_is_tried_or_has_a_reason():
    if diffusers.__version__ != "0.42.1":
        pytest.skip("the list is that of diffusers 0.42.1")
    found = set()
    for module in (diffusers.models.transformers, diffusers.models.unets):
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, diffusers.ModelMixin):
                found.add(name)
    assert found - set(MODELS) <= set(NOT_HERE)
    assert not set(MODELS) & set(NOT_HERE)


def test_the_backend_is_passed_on():
    with pytest.raises(NotImplementedError, match="backend='triton'"):
        layer("self", JVPFlashAttnProcessor(backend="triton"))(torch.randn(1, 6, 8).double())
