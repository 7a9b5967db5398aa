"""The transformer of improved MeanFlow as published: parameters, initialisation, forward."""

import math

import pytest
import torch
from torch.nn.functional import linear, silu, softmax

from training.attentions import sdpa
from training.models.dit import DiT

PUBLISHED = {
    "mlp_ratio": 2.6666667,
    "conditioning": "h",
    "norm": "rms",
    "mlp": "swiglu",
    "qk_norm": True,
    "positions": "rope_1d",
    "bias": False,
    "initialisation": "imf",
    "label_tokens": 8,
    "guided": True,
    "second_head": 8,
}


@pytest.mark.parametrize(
    ("size", "whole", "without"),
    [
        ("iMF-B/2", 145_596_960, 88_948_256),
        ("iMF-M/2", 230_570_016, None),
        ("iMF-L/2", 509_752_352, None),
        ("iMF-XL/2", 711_113_760, None),
    ],
)
def test_parameters_are_those_published(size, whole, without):
    with torch.device("meta"):
        net = DiT(sdpa, image_size=32, channels=4, num_classes=1000, size=size, **PUBLISHED)
    assert sum(p.numel() for p in net.parameters()) == whole
    if without is not None:
        assert whole - sum(p.numel() for p in net.second_blocks.parameters()) == without


def small(**options):
    torch.manual_seed(0)
    sizes = {"patch": 2, "depth": 3, "width": 48, "heads": 4, "second_head": 1}
    return DiT(sdpa, 8, 3, 5, **(PUBLISHED | sizes | options))


def test_weights_begin_with_the_published_deviations_and_zeros():
    net = small(width=192)
    assert not any(".bias" in name for name, _ in net.blocks.named_parameters())
    for layer, c in (
        (net.blocks[0].attention.qkv, 0.32),
        (net.second_blocks[0].mlp.contract, 0.32),
        (net.time.inward, 1),
        (net.guidance.end.outward, 1),
        (net.label.table, 1),
    ):
        std = c / math.sqrt(layer.weight.shape[1])
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.1)
    assert not any(block.modulation.constants.any() for block in net.blocks)
    assert not net.final.projection.weight.any()
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x):
    """Neighbouring features as complex numbers, turned by position / 10000^(2i / D)."""
    n, d = x.shape[-2:]
    phase = torch.arange(n).double()[:, None] * 10_000 ** (-torch.arange(0, d, 2).double() / d)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(phase), phase
    )
    return torch.view_as_real(z).flatten(-2)


def block(part, x, heads):
    scale_a, gate_a, scale_m, gate_m = part["modulation.constants"].chunk(4)
    qkv = linear(rms(x, 1 + scale_a), part["attention.qkv.weight"])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q = rotated(rms(q, part["attention.qk_norm.query"]))
    k = rotated(rms(k, part["attention.qk_norm.key"]))
    mixed = softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
    x = x + gate_a * linear(mixed.transpose(1, 2).flatten(2), part["attention.projection.weight"])
    gate, hidden = linear(rms(x, 1 + scale_m), part["mlp.expand.weight"]).chunk(2, -1)
    return x + gate_m * linear(silu(gate) * hidden, part["mlp.contract.weight"])


def test_the_forward_is_that_of_the_paper():
    """Tokens of label, guidance, interval and time before the image's; written from the paper."""
    torch.set_default_dtype(torch.float64)
    try:
        net = small()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.3)
        state = {name: p.detach() for name, p in net.named_parameters()}
        z, t, y = torch.randn(4, 3, 8, 8), torch.rand(4), torch.arange(4)
        r = t * torch.rand(4)
        guidance = torch.stack([1 + 7 * torch.rand(4), 0.5 * torch.rand(4), torch.ones(4)], 1)
        outputs = net.heads(z, t, r, y, guidance)
        assert torch.equal(net(z, t, r, y, guidance), outputs[0])
    finally:
        torch.set_default_dtype(torch.float32)

    def embed(name, value):
        phase = value[:, None] * torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
        hidden = torch.cat([phase.cos(), phase.sin()], 1)
        part = lambda layer: (state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"])  # noqa: E731
        return linear(silu(linear(hidden, *part("inward"))), *part("outward"))

    w, start, end = guidance.unbind(1)
    conditions = [state["label.table.weight"][y], embed("guidance.scale", 1 - 1 / w)]
    conditions += [embed("guidance.start", start), embed("guidance.end", end)]
    conditions += [embed("time", t - r)]
    tokens = [state[f"prefix.{i}.vectors"] + c[:, None] for i, c in enumerate(conditions)]
    assert [part.shape[1] for part in tokens] == [8, 4, 2, 2, 4]
    patches = z.reshape(4, 3, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(4, 16, 12)
    tokens.append(
        linear(patches, state["patches.projection.weight"], state["patches.projection.bias"])
    )
    x = torch.cat(tokens, 1)
    under = lambda name: {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}  # noqa: E731
    trunk = block(under("blocks.1."), block(under("blocks.0."), x, 4), 4)
    for output, (name, final) in zip(
        outputs, {"blocks.2.": "final.", "second_blocks.0.": "second_final."}.items(), strict=True
    ):
        last, head = block(under(name), trunk, 4)[:, 20:], under(final)
        pixels = rms(last, 1 + head["modulation.constants"])
        pixels = linear(pixels, head["projection.weight"], head["projection.bias"])
        images = pixels.reshape(4, 4, 4, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(4, 3, 8, 8)
        torch.testing.assert_close(output, images, rtol=1e-9, atol=1e-10)


def test_a_normed_modulation_has_vectors_of_length_one_and_none_at_the_start():
    torch.manual_seed(0)
    net = DiT(sdpa, 8, 3, 5, modulation_norm=True)
    condition = torch.randn(2, 96)
    assert not any(vector.any() for vector in net.blocks[0].modulation(condition))
    torch.nn.init.normal_(net.blocks[0].modulation.linear.weight)
    for vector in net.blocks[0].modulation(condition):
        torch.testing.assert_close(vector.square().mean(-1), torch.ones(2, 1), rtol=1e-4, atol=0)
