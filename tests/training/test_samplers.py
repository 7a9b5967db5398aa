"""Samplers on velocities whose flow is known."""

import pytest
import torch

from training.objectives.paths import expand
from training.samplers.flow import FlowSampler
from training.samplers.generate import balanced_labels, generate
from training.samplers.meanflow import MeanFlowSampler, ShortcutSampler


class LinearFlow:
    """dz/dt = z: z_0 = z_1 / e. Average velocity over [r, t]: z (1 - exp(r - t)) / (t - r)."""

    null_label = 10

    def __call__(self, z, t, r, y):
        h = expand(t - r, z)
        return torch.where(h == 0, z, z * (1 - torch.exp(-h)) / h.clamp_min(1e-9))


NOISE = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 1, 2, 2)
LABELS = torch.zeros(3, dtype=torch.int64)
EXACT = NOISE / torch.e


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_an_exact_average_velocity_is_sampled_exactly_with_any_number_of_steps(nfe):
    z = MeanFlowSampler(nfe)(LinearFlow(), NOISE, LABELS)
    torch.testing.assert_close(z, EXACT, rtol=1e-6, atol=1e-6)


def test_jumps_go_through_the_times_asked_for():
    seen = []

    def net(z, t, r, y):
        seen.append((float(t[0]), float(r[0])))
        return LinearFlow()(z, t, r, y)

    z = MeanFlowSampler(3, times=[0.75, 0.25])(net, NOISE, LABELS)
    assert seen == [(1, 0.75), (0.75, 0.25), (0.25, 0)]
    torch.testing.assert_close(z, EXACT, rtol=1e-6, atol=1e-6)
    seen.clear()
    ShortcutSampler(4)(net, NOISE, LABELS)
    assert seen == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]


def test_guidance_is_told_to_a_network_that_has_it_as_a_condition():
    told = []
    net = lambda z, t, r, y, *guidance: told.append(guidance) or z  # noqa: E731
    MeanFlowSampler(1)(net, NOISE, LABELS)
    MeanFlowSampler(1, None, 2.0, 0.25, 0.75)(net, NOISE, LABELS)
    assert told[0] == ()
    expected = torch.tensor([[2.0, 0.25, 0.75]] * 3, dtype=torch.float64)
    assert torch.equal(told[1][0], expected)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_with_their_order(method, order):
    def error(nfe):
        return float((FlowSampler(method, nfe)(LinearFlow(), NOISE, LABELS) - EXACT).norm())

    assert error(200) < error(100) / 2 ** (order - 0.1)


def test_guidance_extrapolates_from_the_null_label():
    def net(z, t, r, y):
        return (y == 10).to(z)[:, None, None, None] * torch.ones_like(z)  # 1 for null, else 0

    net.null_label = 10
    z = FlowSampler("euler", 4, guidance=3.0)(net, NOISE, LABELS)
    torch.testing.assert_close(z, NOISE + 2)  # v = 1 + 3 (0 - 1) = -2


def test_generation_is_repeatable_and_does_not_depend_on_the_chunk(tiny):
    net, y = tiny(), balanced_labels(20, 10)
    assert y.bincount().tolist() == [2] * 10
    images = [generate(net, MeanFlowSampler(2), y, (1, 8, 8), seed=3, chunk=c) for c in (20, 7)]
    assert images[0].shape == (20, 1, 8, 8)
    torch.testing.assert_close(*images)
    assert net.training  # as it was before


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: MeanFlowSampler(0), "sampler.nfe"),
        (lambda: MeanFlowSampler(2, times=[0.5, 0.2]), "sampler.times"),
        (lambda: MeanFlowSampler(3, times=[0.2, 0.5]), "sampler.times"),
        (lambda: MeanFlowSampler(guidance=0.5), "sampler.guidance"),
        (lambda: MeanFlowSampler(guidance_start=0.5, guidance_end=0.2), "sampler.guidance_end"),
        (lambda: ShortcutSampler(3), "sampler.nfe"),
        (lambda: FlowSampler("rk4"), "sampler.method"),
        (lambda: FlowSampler("heun", 3), "sampler.nfe"),
        (lambda: FlowSampler(guidance=-1), "sampler.guidance"),
    ],
)
def test_a_wrong_option_raises_an_error_that_names_its_key(build, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        build()
