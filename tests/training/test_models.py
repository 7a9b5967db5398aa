"""The diffusion transformer: published sizes, zero initialisation, what its conditions do."""

import pytest
import torch
from torch.nn.functional import silu

from training.attentions import sdpa
from training.models.dit import SIZES, DiT
from training.models.embedders import PatchEmbedder, TimeEmbedder, rotary_angles
from training.models.jvp_layers import Dual, layer_norm, rms_norm
from training.models.layers import FinalLayer, QueryKeyNorm, rotate

IMF = {
    "mlp_ratio": 8 / 3,
    "conditioning": "h",
    "norm": "rms",
    "mlp": "swiglu",
    "qk_norm": True,
    "positions": "rope",
    "label_tokens": 8,
    "guided": True,
}
EVERY = {  # each option away from its default, in a few networks
    "modern": {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "positions": "rope"},
    "tokens": IMF | {"second_head": 1, "log_variance": True},
    "cross": {"cross_tokens": 3, "qk_norm": True, "guided": True, "second_head": 0},
    "tvm": {
        "norm": "rms",
        "modulation_norm": True,
        "initialisation": "spectral",
        "guided": "inverse",
        "log_variance": True,
        "log_variance_times": 2,
    },
    "dmf": {"conditioning": "t_then_r", "late_blocks": 1},
}


def latents(size, **options):
    """The network for 256 x 256 ImageNet latents, on the meta device: shapes only."""
    with torch.device("meta"):
        return DiT(sdpa, image_size=32, channels=4, num_classes=1000, size=size, **options)


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("S/4", 33),
        ("S/2", 33),
        ("B/4", 131),
        ("B/2", 131),
        ("M/2", 308),
        ("L/2", 459),
        ("XL/2", 676),
    ],
)
def test_sizes_have_the_published_number_of_parameters(size, millions):
    count = sum(p.numel() for p in latents(size).parameters())
    assert abs(count / 1e6 - millions) < 0.5


@pytest.mark.parametrize(
    ("size", "millions"),
    [("iMF-B/2", 89), ("iMF-M/2", 174), ("iMF-L/2", 409), ("iMF-XL/2", 610)],
)
def test_sizes_of_imf_have_the_published_number_of_parameters(size, millions):
    net = latents(size, **IMF)
    count = sum(p.numel() for p in net.parameters())
    assert abs(count / 1e6 - millions) < 0.002 * millions + 0.5
    assert sum(len(p.vectors) for p in net.prefix) == 20
    tokens = []
    net.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    t = torch.rand(2, device="meta")
    label = torch.zeros(2, dtype=torch.int64, device="meta")
    net(torch.randn(2, 4, 32, 32, device="meta"), t, t, label)
    assert tokens == [276]


def test_every_size_is_tested():
    assert set(SIZES) == {"tiny", "S/4", "S/2", "B/4", "B/2", "M/2", "L/2", "XL/2"} | {
        f"iMF-{size}/2" for size in ("B", "M", "L", "XL")
    }


def test_xl_has_head_dimension_72():
    _, _, width, heads = SIZES["XL/2"]
    assert width // heads == 72


@pytest.mark.parametrize("options", [{}, *EVERY.values()], ids=["default", *EVERY])
def test_the_network_is_exactly_zero_at_initialisation(tiny, batch, options):
    x, y = batch
    t = torch.rand(len(x))
    net = tiny(awake=False, **options)
    assert not net(x, t, t / 2, y).any()
    if "second_head" in options:
        assert not net.heads(x, t, t / 2, y)[1].any()
    if "log_variance" in options:
        assert not net.log_variance(t).any()


@pytest.mark.parametrize("options", [{}, *EVERY.values()], ids=["default", *EVERY])
def test_every_parameter_receives_a_gradient(tiny, batch, options):
    x, y = batch
    net = tiny(**options)
    t = torch.rand(len(x))
    guidance = torch.rand(len(x), 3) + 1 if "guided" in options else None
    out = net.heads if "second_head" in options else lambda *args: (net(*args),)
    loss = torch.cat(out(x, t, t / 2, y, guidance)).square().mean()
    if "log_variance" in options:
        loss = loss + net.log_variance(t).mean()
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.any(), name  # noqa: PT018


def test_the_first_head_is_the_network_and_the_second_is_another(tiny, batch):
    x, y = batch
    t = torch.rand(len(x))
    for second_head in (0, 1, 2):
        net = tiny(second_head=second_head)
        u, v = net.heads(x, t, t / 2, y)
        torch.testing.assert_close(u, net(x, t, t / 2, y))
        assert not torch.equal(u, v)


def test_guidance_is_a_condition_and_none_means_a_scale_of_one(tiny, batch):
    x, y = batch
    net, t = tiny(guided=True), torch.rand(len(x))
    told = lambda *g: net(x, t, t / 2, y, torch.tensor([g]).expand(len(x), 3))  # noqa: E731
    base = net(x, t, t / 2, y)
    torch.testing.assert_close(told(1.0, 0.0, 1.0), base)
    for changed in ((2.0, 0.0, 1.0), (1.0, 0.2, 1.0), (1.0, 0.0, 0.7)):
        assert not torch.allclose(told(*changed), base, rtol=1e-4), changed


def test_the_inverse_of_the_guidance_is_a_condition_and_scales_what_is_given(tiny, batch):
    x, y = batch
    net, t = tiny(guided="inverse"), torch.rand(len(x))
    told = lambda *g: net(x, t, t / 2, y, torch.tensor([g]).expand(len(x), 3))  # noqa: E731
    torch.testing.assert_close(told(1.0, 0.0, 1.0), net(x, t, t / 2, y))
    torch.testing.assert_close(told(2.0, 0.1, 0.9), told(2.0, 0.0, 1.0))  # no interval
    seen = net.guidance.inverse.register_forward_hook(
        lambda _, given, out: out + net.time(torch.zeros(1)) * (given[0][0] - 0.5)
    )
    at_half = told(2.0, 0.0, 1.0)
    seen.remove()
    torch.testing.assert_close(at_half, told(2.0, 0.0, 1.0))  # it was told 1/2
    net.guidance.inverse.outward.weight.data.zero_()
    net.guidance.inverse.outward.bias.data.zero_()
    torch.testing.assert_close(told(2.0, 0.0, 1.0), 2 * told(1.0, 0.0, 1.0))


def test_late_blocks_see_the_second_time_in_place_of_the_first(tiny, batch):
    """At r = t the network is one of t alone, with the same weights."""
    x, y = batch
    net, t = tiny(conditioning="t_then_r", late_blocks=1), torch.rand(len(x))
    plain = tiny(conditioning="t")
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x, t, t, y), plain(x, t, t, y))
    seen = []
    for part in (*net.blocks, net.final):
        part.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    net(x, t, t / 2, y)
    first, second = (silu(net.time(time) + net.label(y)) for time in (t, t / 2))
    for condition, expected in zip(seen, (first, second, second), strict=True):
        torch.testing.assert_close(condition, expected)


def test_spectral_weights_have_the_norm_1(tiny):
    net = tiny(awake=False, initialisation="spectral")
    block = net.blocks[0]
    times = (net.time.inward, net.time.outward, net.second_time.inward)
    for layer in (block.attention.qkv, block.mlp.expand, net.patches.projection, *times):
        norm = torch.linalg.matrix_norm(layer.weight.detach(), 2)
        assert float(norm) == pytest.approx(1, rel=1e-5)
        assert not layer.bias.any()
    assert not block.modulation.linear.weight.any()
    assert float(net.label.table.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_a_log_variance_of_two_times_sees_each_at_half_of_the_frequencies(tiny):
    net = tiny(log_variance=True, log_variance_times=2)
    t, r = torch.rand(2, 5)
    phase = lambda t: t[:, None] * 10_000 ** (-torch.arange(64) / 64)  # noqa: E731
    waves = torch.cat([f(phase(time)) for time in (t, r) for f in (torch.cos, torch.sin)], dim=1)
    torch.testing.assert_close(net.log_variance(t, r), net.variance.linear(waves)[:, 0])
    torch.testing.assert_close(net.log_variance(t), net.log_variance(t, t))
    with pytest.raises(ValueError, match=r"model\.log_variance_times=2"):
        tiny(log_variance=True).log_variance(t, r)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guided": "w"}, r"model\.guided must be true, false or inverse"),
        ({"log_variance": True, "log_variance_times": 3}, r"log_variance_times must be 1 or 2"),
        ({"conditioning": "t_then_r"}, r"model\.late_blocks must be 1 to 2"),
        ({"late_blocks": 1}, r"0 with others; got 1 with t_h"),
        ({"late_blocks": 1, "conditioning": "t_then_r", "second_head": 0}, "second_head; leave"),
    ],
)
def test_wrong_options_of_published_networks_are_named(tiny, options, says):
    with pytest.raises(ValueError, match=says):
        tiny(**options)


def test_what_the_network_was_not_built_for_raises_an_error_that_names_its_key(tiny, batch):
    x, y = batch
    net, t = tiny(), torch.rand(len(x))
    with pytest.raises(ValueError, match=r"model\.second_head"):
        net.heads(x, t, t, y)
    with pytest.raises(ValueError, match=r"model\.log_variance"):
        net.log_variance(t)
    with pytest.raises(ValueError, match=r"model\.guided"):
        net(x, t, t, y, torch.ones(len(x), 3))


def test_cross_attention_has_a_tangent_of_the_queries_alone(tiny, batch):
    """Keys and values of the label's tokens are constants of the time derivative."""
    seen = []

    def spy(q, k, v):
        tangents = [torch.autograd.forward_ad.unpack_dual(x).tangent for x in (q, k, v)]
        seen.append((k.shape[-2], [t is not None for t in tangents]))
        return sdpa(q, k, v)

    x, y = batch
    net, t = tiny(spy, depth=1, cross_tokens=3), torch.rand(len(x))
    net(Dual(x, torch.ones_like(x)), Dual(t, torch.ones_like(t)), t / 2, y)
    assert seen == [(16, [True] * 3), (3, [True, False, False])]


def test_attention_to_labels_and_tokens_of_labels_know_the_label(tiny, batch):
    x, y = batch
    t = torch.rand(len(x))
    for options in (EVERY["tokens"], EVERY["cross"]):
        net = tiny(**options)
        for parameter in net.label.parameters():  # what is left is the way asked for
            if options is EVERY["cross"]:
                parameter.data.zero_()
        assert not torch.allclose(net(x, t, t, y), net(x, t, t, (y + 1) % 10), rtol=1e-4)


def test_rotary_positions_make_scores_depend_on_differences_of_places():
    angles = rotary_angles(4, 24)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 24, dtype=torch.float64).expand(2, 1, 1, 18, 24)
    rotated_q, rotated_k = rotate(q, angles.double()), rotate(k, angles.double())
    torch.testing.assert_close(rotated_q[..., :2, :], q[..., :2, :])  # two tokens of a prefix
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))
    scores = (rotated_q @ rotated_k.mT)[0, 0, 2:, 2:].reshape(4, 4, 4, 4)
    torch.testing.assert_close(
        scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], rtol=1e-6, atol=1e-6
    )
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])  # the axes are told apart


def test_query_key_norm_makes_scores_independent_of_the_scale():
    norm_, (q, k) = QueryKeyNorm(8), torch.randn(2, 1, 1, 5, 8)
    a, b = norm_(q, k), norm_(100 * q, 0.1 * k)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a[0].square().mean(-1), torch.ones(1, 1, 5), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("conditioning", "changes"),
    [("t_h", (True, True)), ("t_r", (True, True)), ("h", (True, True)), ("t", (True, False))],
)
def test_conditioning_says_which_times_the_network_sees(tiny, batch, conditioning, changes):
    x, y = batch
    net = tiny(conditioning=conditioning)
    t, r = torch.full((len(x),), 0.8), torch.full((len(x),), 0.3)
    before = net(x, t, r, y)
    assert (not torch.equal(net(x, t - 0.1, r, y), before)) == changes[0]
    assert (not torch.equal(net(x, t, r - 0.1, y), before)) == changes[1]
    shifted = net(x, t - 0.1, r - 0.1, y)  # both times
    assert torch.allclose(shifted, before, rtol=1e-4, atol=1e-5) == (conditioning == "h")


def test_labels_matter_and_the_null_label_is_one_more_class(tiny, batch):
    x, y = batch
    net = tiny()
    t = torch.rand(len(x))
    null = torch.full_like(y, net.null_label)
    assert net.null_label == 10
    assert not torch.equal(net(x, t, t, y), net(x, t, t, null))


def test_patches_come_back_at_their_own_place():
    patches, final = PatchEmbedder(2, 3, width=12), FinalLayer(12, 2, 3)
    for layer in (patches, final):
        layer.projection = torch.nn.Identity()
    x = torch.randn(2, 3, 8, 8)
    tokens = patches(x)
    # The final layer normalises its tokens; with no shift and no scale that is all it changes.
    expected = (x.unfold(2, 2, 2).unfold(3, 2, 2)).movedim(1, 3).flatten(3)  # (B, 4, 4, 12)
    expected = (
        layer_norm(expected).unflatten(3, (3, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    )
    torch.nn.init.zeros_(final.modulation.linear.weight)
    torch.nn.init.zeros_(final.modulation.linear.bias)
    torch.testing.assert_close(final(tokens, torch.zeros(2, 12), rows=4), expected)


def test_norms_are_those_of_torch_without_weights():
    x = torch.randn(4, 7, 32, dtype=torch.float64)
    expected = torch.nn.functional.layer_norm(x, (32,), eps=1e-6)
    torch.testing.assert_close(layer_norm(x), expected)
    torch.testing.assert_close(rms_norm(x), torch.nn.functional.rms_norm(x, (32,), eps=1e-6))


def test_time_is_embedded_in_float32_under_bfloat16_autocast():
    embedder = TimeEmbedder(32)
    seen = {}
    embedder.inward.register_forward_pre_hook(lambda _, args: seen.update(waves=args[0]))
    t = torch.tensor([0.123456])
    with torch.autocast("cpu", torch.bfloat16):
        embedder(t)
    assert seen["waves"].dtype == torch.float32
    torch.testing.assert_close(seen["waves"][0, 0], torch.cos(t[0]), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"size": "H/2"}, "model.size"),
        ({"patch": 3}, "model.patch"),
        ({"heads": 5}, "model.heads"),
        ({"depth": 0}, "model.depth"),
        ({"conditioning": "r"}, "model.conditioning"),
        ({"dropout": 1.5}, "model.dropout"),
        ({"dropout": 1}, "model.dropout must be >= 0 and < 1"),
        ({"width": 6, "heads": 2}, "model.width"),
        ({"norm": "batch"}, "model.norm"),
        ({"mlp": "relu"}, "model.mlp"),
        ({"positions": "learned"}, "model.positions"),
        ({"width": 24, "heads": 4, "positions": "rope"}, "model.positions=rope"),
        ({"label_tokens": -1}, "model.label_tokens"),
        ({"time_tokens": 0}, "model.time_tokens"),
        ({"cross_tokens": -1}, "model.cross_tokens"),
        ({"second_head": 4}, "model.second_head"),
    ],
)
def test_a_wrong_option_raises_an_error_that_names_its_key(options, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        DiT(sdpa, image_size=8, channels=1, num_classes=10, **options)
