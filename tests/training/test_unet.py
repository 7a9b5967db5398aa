"""The U-Net of CIFAR-10 recipes, the augmentation that it is told of, and r's own times."""

from functools import partial

import pytest
import torch

from jvp_flash_attention import attention as jvp_attention
from training.attentions import sdpa
from training.data.augment import NUMBERS, SYM6, augment, warp
from training.data.module import DataModule, TensorSource
from training.models.unet import GroupNorm, UNet
from training.objectives.meanflow import MeanFlow
from training.objectives.objective import drop_labels
from training.randomness import Draws, generator

ATTENTIONS = {"sdpa": sdpa, "reference": partial(jvp_attention, backend="reference")}


def small(attention=sdpa, **options):
    torch.manual_seed(0)
    sizes = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention_sizes": (4,)}
    net = UNet(attention, 8, 3, 10, **(sizes | {"dropout": 0.0} | options))
    for p in net.parameters():  # branches that end in 1e-5 would hide what they do
        if float(p.detach().abs().max()) < 1e-3:
            torch.nn.init.normal_(p, std=0.1)
    return net


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    t = torch.rand(6)
    return torch.randn(6, 3, 8, 8), t, t * torch.rand(6), torch.arange(6)


def test_it_has_the_published_size():
    with torch.device("meta"):
        net = UNet(sdpa, 32, 3, 10, augmentation=6)
    count = sum(p.numel() for p in net.parameters())
    assert count == pytest.approx(55.7e6, rel=0.005)  # "55M" of CIFAR-10's MeanFlow and EDM
    attending = [b for b in (*net.down, *net.middle, *net.up) if b.attention is not None]
    assert len(attending) == 4 + 1 + 1  # at 16 x 16 downwards, the middle, and once upwards


def test_a_group_norm_of_primitives_is_pytorchs():
    norm = GroupNorm(24).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 + torch.randn(2, 24, 4, 4, dtype=torch.float64)
    weight, bias = norm.weight.flatten(), norm.bias.flatten()
    expected = torch.nn.functional.group_norm(x, norm.groups, weight, bias, 1e-6)
    torch.testing.assert_close(norm(x), expected)
    assert norm.groups == 6
    assert GroupNorm(128).groups == GroupNorm(256).groups == 32


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_its_derivative_is_that_of_a_difference_and_has_a_gradient(inputs, attention):
    net = small(ATTENTIONS[attention]).double()
    z, t, r, y = (x.double() if x.is_floating_point() else x for x in inputs)
    v = torch.randn_like(z)
    u, du = torch.func.jvp(
        lambda z, t, r: net(z, t, r, y), (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r))
    )
    torch.testing.assert_close(u, net(z, t, r, y))
    e = 1e-5
    difference = (net(z + e * v, t + e, r, y) - net(z - e * v, t - e, r, y)) / (2 * e)
    torch.testing.assert_close(du, difference, rtol=1e-6, atol=1e-8)
    du.square().mean().backward()
    without = {name for name, p in net.named_parameters() if p.grad is None}
    assert without <= {"last.bias"}  # a constant


def test_it_sees_both_times_labels_where_it_should_and_the_augmentation(inputs):
    z, t, r, y = inputs
    for options, sees in (
        ({"conditioning": "t"}, False),
        ({}, True),
        ({"conditioning": "t_r"}, True),
    ):
        net = small(**options)
        assert torch.allclose(net(z, t, r, y), net(z, t, r / 2, y)) != sees
        assert torch.equal(net(z, t, r, y), net(z, t, r, y.flip(0)))
    net = small(labels=True)
    assert not torch.allclose(net(z, t, r, y), net(z, t, r, y.flip(0)))
    net = small(augmentation=6)
    told = torch.cat([y[:, None].float(), torch.zeros(6, 6)], 1)
    assert torch.equal(net(z, t, r, y), net(z, t, r, told))
    told[:, 3] = 1
    assert not torch.allclose(net(z, t, r, y), net(z, t, r, told))
    with pytest.raises(ValueError, match=r"model\.augmentation must be 6.*got 0"):
        small()(z, t, r, told)
    with pytest.raises(ValueError, match=r"model\.width must be a multiple of 4"):
        UNet(sdpa, 9, 3, 10)
    with pytest.raises(ValueError, match=r"model\.dropout must be >= 0 and < 1"):
        small(dropout=1)


def test_the_filter_there_and_back_changes_nothing_and_shifts_are_shifts():
    taps = torch.tensor(SYM6, dtype=torch.float64)
    for lag in (0, 2, 4, 6, 8, 10):  # orthonormal to its even shifts
        assert float(taps[lag:] @ taps[: len(taps) - lag]) == pytest.approx(
            float(lag == 0), abs=1e-10
        )
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    torch.testing.assert_close(warp(x, identity), x, rtol=1e-5, atol=1e-5)
    identity[:, 0, 2] = -2  # from two pixels to the left
    torch.testing.assert_close(warp(x, identity)[..., 2:], x[..., :-2], rtol=1e-5, atol=1e-5)
    # The filter has no exact symmetry, so that a turned image is moved by 0.4 pixels besides.
    smooth = torch.randn(2, 3, 33, 33)
    for _ in range(2):
        smooth = torch.nn.functional.avg_pool2d(smooth, 9, 1, 4)
    turned = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).repeat(2, 1, 1)
    inner = (..., slice(4, -4), slice(4, -4))
    error = (warp(smooth, turned) - smooth.rot90(1, (-2, -1)))[inner].norm()
    assert error < 0.15 * smooth[inner].norm()


@pytest.mark.parametrize("turn", [False, True])
def test_the_numbers_say_what_was_done(turn):
    x = torch.randn(400, 1, 8, 8)
    augmented, numbers = augment(x, 0.12, turn, generator(0, 0, 0, "augment"))
    assert numbers.shape == (400, NUMBERS[turn])
    mirrored = numbers[:, 0] == 1
    assert 150 < mirrored.sum() < 250
    still = (numbers[:, 1:] == 0).all(1)
    assert still.float().mean() + 0.15 > 0.8**3
    expected = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    torch.testing.assert_close(augmented[still], expected[still], rtol=1e-3, atol=1e-3)
    moved = (numbers[:, -2:] != 0).all(1)
    assert 20 < moved.sum() < 80
    assert ((augmented - expected).abs().amax((1, 2, 3))[moved] > 1e-2).all()
    again, _ = augment(x, 0.12, turn, generator(0, 0, 0, "augment"))
    assert torch.equal(augmented, again)


def test_batches_bring_the_numbers_with_their_labels_and_examples_do_not():
    x, y = torch.randn(40, 1, 8, 8).clamp(-1, 1), torch.arange(40) % 10
    source = TensorSource(x, y)
    data = DataModule(0, 8, source, source, (1, 8, 8), 10, augment=0.5)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 1, 8, 8)
    assert labels.shape == (8, 7)
    assert set(labels[:, 0].tolist()) <= set(range(10))
    assert labels[:, 1:].any()
    assert data.examples("train")[1].shape == (40,)
    with pytest.raises(ValueError, match=r"data\.flip must be false with data\.augment"):
        DataModule(0, 8, source, source, (1, 8, 8), 10, augment=0.5, flip=True)
    kept, dropped = drop_labels(labels, 0.8, 10, generator(0, 0, 0, "labels"))
    assert torch.equal(kept[:, 1:], labels[:, 1:])
    assert torch.equal(kept[:, 0], torch.where(dropped, 10, labels[:, 0]))
    assert 0 < dropped.sum() < 8
    objective = MeanFlow(reduce="mean")
    sample = objective.sample(images, labels, 10, Draws(0))
    torch.manual_seed(0)
    net = UNet(sdpa, 8, 1, 10, 8, (1,), 1, (), augmentation=6, dropout=0.0)
    objective.loss(net, sample).loss.backward()
    assert net.augment.weight.grad.any()


def test_r_has_a_distribution_of_its_own():
    x, y = torch.zeros(40_000, 1, 1, 1), torch.zeros(40_000, dtype=torch.int64)
    objective = MeanFlow(data_proportion=0, time_mean=2.0, time_std=0.1, r_mean=-4.0, r_std=0.5)
    sample = objective.sample(x, y, 10, Draws(0))
    for times, mean, std in ((sample.t, 2, 0.1), (sample.r, -4, 0.5)):
        logit = torch.logit(times.double())
        assert abs(logit.mean() - mean) < 0.02
        assert abs(logit.std() - std) < 0.02
