"""The diffusion transformer: published sizes, zero initialisation, what its conditions do."""

import pytest
import torch

from training.attentions import sdpa
from training.models.dit import SIZES, DiT
from training.models.embedders import PatchEmbedder, TimeEmbedder
from training.models.layers import FinalLayer, norm


@pytest.mark.parametrize(
    ("size", "millions"), [("S/2", 33), ("B/4", 131), ("B/2", 131), ("L/2", 459), ("XL/2", 676)]
)
def test_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        net = DiT(sdpa, image_size=32, channels=4, num_classes=1000, size=size)
    count = sum(p.numel() for p in net.parameters())
    assert abs(count / 1e6 - millions) < 0.01 * millions + 0.5


def test_xl_has_head_dimension_72():
    _, _, width, heads = SIZES["XL/2"]
    assert width // heads == 72


def test_the_network_is_exactly_zero_at_initialisation(tiny, batch):
    x, y = batch
    t = torch.rand(len(x))
    assert not tiny(awake=False)(x, t, t / 2, y).any()


def test_every_parameter_receives_a_gradient(tiny, batch):
    x, y = batch
    net = tiny()
    t = torch.rand(len(x))
    net(x, t, t / 2, y).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize(
    ("conditioning", "changes"),
    [("t_h", (True, True)), ("t_r", (True, True)), ("t", (True, False))],
)
def test_conditioning_says_which_times_the_network_sees(tiny, batch, conditioning, changes):
    x, y = batch
    net = tiny(conditioning=conditioning)
    t, r = torch.full((len(x),), 0.8), torch.full((len(x),), 0.3)
    before = net(x, t, r, y)
    assert (not torch.equal(net(x, t - 0.1, r, y), before)) == changes[0]
    assert (not torch.equal(net(x, t, r - 0.1, y), before)) == changes[1]


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
    expected = norm(expected).unflatten(3, (3, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    torch.nn.init.zeros_(final.modulation.linear.weight)
    torch.nn.init.zeros_(final.modulation.linear.bias)
    torch.testing.assert_close(final(tokens, torch.zeros(2, 12), rows=4), expected)


def test_norm_is_layer_norm_without_weights():
    x = torch.randn(4, 7, 32, dtype=torch.float64)
    expected = torch.nn.functional.layer_norm(x, (32,), eps=1e-6)
    torch.testing.assert_close(norm(x), expected)


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
        ({"width": 6, "heads": 2}, "model.width"),
    ],
)
def test_a_wrong_option_raises_an_error_that_names_its_key(options, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        DiT(sdpa, image_size=8, channels=1, num_classes=10, **options)
