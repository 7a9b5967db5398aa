"""Exact statements about self-distilled flow maps, distilled MeanFlow and DMF."""

from functools import partial

import pytest
import torch

from jvp_flash_attention import attention as jvp_attention
from tests.exact import GaussianMeanFlow, doubled, points, slope
from training.attentions import sdpa
from training.objectives.dmf import DMF, DMFSample
from training.objectives.flow_map import KINDS, FlowMap, FlowMapSample
from training.objectives.meanflow import MeanFlow, MeanFlowSample
from training.objectives.meanflow_distillation import MeanFlowDistillation
from training.objectives.paths import expand
from training.objectives.tangents import CONSTANT, MODES, Jvp
from training.randomness import Draws

ATTENTIONS = {
    "sdpa": sdpa,
    "jvp": jvp_attention,
    "reference": partial(jvp_attention, backend="reference"),
}
NULL = 10
MAPS = [(kind, "full") for kind in KINDS] + [("eulerian", "convex")]
TIGHT = 1e-28  # of a mean square, in float64


def started(objective):
    objective.on_fit_start(torch.zeros((), dtype=torch.float64))
    return objective


def map_sample(net):
    z, t, r, y = points()
    split = torch.rand(len(t), dtype=torch.float64)
    return FlowMapSample(z, net.velocity(z, t), t, r, split, y, 0)


def meanflow_sample(v):
    z, t, r, y = points()
    return MeanFlowSample(z, v.expand_as(z), t, r, y, y > 0, torch.tensor(NULL), 0)


def dmf_sample(net, v=None):
    z, t, r, y = points()
    z_flow, t_flow = z.flip(0), t.flip(0)
    v = net.velocity if v is None else v
    flow = (z_flow, v(z_flow, t_flow), t_flow)
    return DMFSample(z, v(z, t), t, r, *flow, y, y > 0, torch.tensor(NULL))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "stop"), MAPS)
def test_every_kind_of_self_distillation_has_no_error_at_the_exact_flow_map(kind, stop, mode):
    net = GaussianMeanFlow()
    objective = FlowMap(Jvp(mode, 1e-4), kind, stop, data_proportion=0)
    small = TIGHT if mode != "finite_difference" or kind == "progressive" else 1e-13
    assert objective.loss(net, map_sample(net)).metrics["error"] < small

    class Wrong(GaussianMeanFlow):  # the right velocity, another jump
        def forward(self, z, t, r, y, *_):
            return super().forward(z, t, r, y) + 0.3 * expand(t - r, z) * z

    assert objective.loss(Wrong(), map_sample(net)).metrics["map_error"] > 1e-4


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_at_initialisation_the_errors_are_exact(tiny, batch, draws, attention):
    net = tiny(ATTENTIONS[attention], awake=False)
    for kind in KINDS:
        objective = FlowMap(kind=kind, data_proportion=0.75)
        sample = objective.sample(*batch, NULL, draws)
        flow = sample.v.square().flatten(1).mean(1)[:9].mean()
        metrics = objective.loss(net, sample).metrics
        torch.testing.assert_close(metrics["v_loss"], flow, rtol=1e-6, atol=0)
        assert metrics["map_error"] == 0  # of a map that goes nowhere with velocity 0
    objective = DMF()
    sample = objective.sample(*batch, NULL, draws)
    terms = objective.loss(net, sample)
    expected = (sample.v.square().flatten(1).mean(1), sample.v_flow.square().flatten(1).mean(1))
    torch.testing.assert_close(terms.metrics["error"], expected[0].mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.metrics["flow_error"], expected[1].mean(), rtol=1e-6, atol=0)
    cauchy = sum((part + 0.01).log().mean() for part in expected) / 2
    torch.testing.assert_close(terms.loss, cauchy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_lagrangian_distillation_differentiates_through_the_tangent(tiny, batch, draws, attention):
    """The gradient is that of the loss as a function of the weights, velocity and arrival fixed."""
    net = tiny(ATTENTIONS[attention]).double()
    z, _, t, r, _, y, _ = sample = doubled(FlowMap(data_proportion=0).sample(*batch, NULL, draws))
    with torch.no_grad():
        fixed = net(z + expand(r - t, z) * net(z, t, r, y), r, r, y)

    class Fixed(torch.nn.Module):
        def forward(self, z, t, r, y):
            return net(z, t, r, y) if torch.is_grad_enabled() else fixed

    loss = lambda: FlowMap(data_proportion=0).loss(Fixed(), sample).loss  # noqa: E731
    exact, expected = slope(loss, list(net.parameters()))
    assert exact == pytest.approx(expected, rel=1e-5)
    constant = FlowMap(Jvp("single"), data_proportion=0).loss(Fixed(), sample).loss
    assert float((constant - loss()).detach()) == pytest.approx(0, abs=1e-12)
    grads = torch.autograd.grad(constant, list(net.parameters()), materialize_grads=True)
    whole = torch.autograd.grad(loss(), list(net.parameters()), materialize_grads=True)
    assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(grads, whole, strict=True))


@pytest.mark.parametrize("stop", ["full", "convex"])
def test_eulerian_distillation_differentiates_through_what_it_does_not_hold(
    tiny, batch, draws, stop
):
    net = tiny().double()
    z, _, t, r, _, y, _ = sample = doubled(FlowMap(data_proportion=0).sample(*batch, NULL, draws))
    step = expand(r - t, z)
    with torch.no_grad():
        v = net(z, t, t, y)
        along = torch.func.jvp(lambda z: net(z, t, r, y), (z,), (v,))[1]

    def residual():  # as a function of the weights, by hand
        tangents = (v if stop == "convex" else torch.zeros_like(v), torch.ones_like(t))
        u, dudt = torch.func.jvp(lambda z, t: net(z, t, r, y), (z, t), tangents)
        return v - u + step * (dudt if stop == "convex" else dudt + along)

    objective = FlowMap(kind="eulerian", stop_gradient=stop, data_proportion=0)
    loss = objective.loss(net, sample).loss
    by_hand = residual().square().mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=0)
    parameters = list(net.parameters())
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    expected = torch.autograd.grad(by_hand, parameters, materialize_grads=True)
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-14)


def test_a_progressive_target_is_two_jumps_of_the_network_that_meet():
    net = GaussianMeanFlow(sigma=0.5)
    sample = map_sample(net)
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, z, t, r, y):
            seen.append((t, r))
            return net(z, t, r, y)

    FlowMap(kind="progressive", data_proportion=0).loss(Recorder(), sample)
    (t, s), (s_again, r), whole = seen
    torch.testing.assert_close(s, sample.t - sample.split * (sample.t - sample.r))
    assert torch.equal(s, s_again)
    assert torch.equal(torch.stack([t, r]), torch.stack([sample.t, sample.r]))
    assert torch.equal(torch.stack(whole), torch.stack([sample.t, sample.r]))
    x, y = torch.zeros(100, 1, 1, 1), torch.zeros(100, dtype=torch.int64)
    midpoint = FlowMap(kind="progressive", split="midpoint")
    assert (midpoint.sample(x, y, NULL, Draws(0)).split == 0.5).all()


def test_times_of_a_flow_map_are_uniform_on_the_diagonal_and_on_the_triangle():
    x, y = torch.zeros(40_000, 1, 1, 1), torch.zeros(40_000, dtype=torch.int64)
    _, _, t, r, split, *_ = FlowMap(data_proportion=0.5).sample(x, y, NULL, Draws(0))
    assert torch.equal(t[:20_000], r[:20_000])
    assert (r[20_000:] < t[20_000:]).all()
    means = {1 / 2: t[:20_000], 2 / 3: t[20_000:], 1 / 3: r[20_000:]}
    for mean, times in [*means.items(), (1 / 2, split)]:
        assert abs(times.mean() - mean) < 0.01


@pytest.mark.parametrize("mode", MODES)
def test_a_distilled_meanflow_has_no_error_at_its_teachers_average_velocity(mode):
    net, small = GaussianMeanFlow(), 1e-13 if mode == "finite_difference" else TIGHT
    sample = meanflow_sample(torch.zeros(1, dtype=torch.float64))  # its own v is not asked
    with pytest.raises(RuntimeError, match=r"objective\.on_fit_start"):
        MeanFlowDistillation(lambda: net).loss(net, sample)
    for share in (0, 0.25):
        distillation = MeanFlowDistillation(
            lambda: net, Jvp(mode, 1e-4), data_proportion=share, p=0
        )
        n = round(share * len(sample.t))
        equal = sample._replace(r=torch.cat([sample.t[:n], sample.r[n:]]), equal=n)
        assert started(distillation).loss(net, equal).metrics["error"] < small
        assert not distillation.state_dict()  # the teacher stays in its file
        other = MeanFlowDistillation(
            lambda: GaussianMeanFlow(sigma=0.6), Jvp(mode), data_proportion=share, p=0
        )
        assert started(other).loss(net, equal).metrics["error"] > 1e-4


@pytest.mark.parametrize("mode", ["single", "tangent_grad"])
def test_a_distilled_meanflow_is_meanflow_along_the_teachers_velocity(tiny, batch, draws, mode):
    net, teacher = tiny().double(), tiny(width=64).double()
    objective = MeanFlowDistillation(lambda: teacher, Jvp(mode), data_proportion=0.25)
    started(objective)
    sample = doubled(objective.sample(*batch, NULL, draws))
    z, _, t, _, y, *_ = sample
    v = teacher(z, t, t, y).detach()
    parameters = list(net.parameters())
    loss = lambda: objective.loss(net, sample).loss  # noqa: E731
    grads = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    if mode == "single":
        expected = MeanFlow(data_proportion=0.25).loss(net, sample._replace(v=v)).loss
        expected = torch.autograd.grad(expected, parameters, materialize_grads=True)
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-14)
    else:
        objective.p = 0  # of a weight that is constant
        exact, difference = slope(loss, parameters)
        assert exact == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_dmf_has_no_error_at_the_exact_flow_map(mode):
    net, small = GaussianMeanFlow(), 1e-13 if mode == "finite_difference" else TIGHT
    zero = lambda z, t: torch.zeros_like(z)  # noqa: E731
    taught = started(DMF(Jvp(mode, 1e-4), lambda: net))
    metrics = taught.loss(net, dmf_sample(net, zero)).metrics
    assert metrics["error"] < small
    assert metrics["flow_error"] < TIGHT
    if mode in CONSTANT:
        objective = DMF(Jvp(mode, 1e-4))
        assert objective.loss(net, dmf_sample(net)).metrics["error"] < small
        wrong = dmf_sample(net, lambda z, t: net.velocity(z, t - 0.1))
        assert objective.loss(net, wrong).metrics["error"] > 1e-4


def test_guidance_acts_inside_the_interval_on_labels_that_were_kept(tiny, batch, draws):
    net, teacher = tiny(), tiny(width=64)
    objective = DMF(omega=0.6, guidance_end=0.7, label_dropout=0.4)
    sample = objective.sample(*batch, NULL, draws)
    z, v, t, *_, y, dropped, null = sample
    inside = (t <= 0.7)[:, None, None, None]
    kept = ~dropped[:, None, None, None]
    assert 0 < inside.sum() < len(t)
    assert 0 < kept.sum() < len(t)
    gap = net(z, t, t, y) - net(z, t, t, torch.full_like(y, NULL))
    v_g = objective._guided_velocity(net, z, v, t, y, dropped, null)
    torch.testing.assert_close(v_g, torch.where(inside & kept, v + 0.6 * gap, v))
    distillation = DMF(None, lambda: teacher, teacher_guidance=2.0, guidance_end=0.7)
    distillation.on_fit_start(torch.zeros(()))
    conditional = teacher(z, t, t, y)
    unconditional = teacher(z, t, t, torch.full_like(y, NULL))
    v_g = distillation._guided_velocity(net, z, v, t, y, dropped, null)
    expected = torch.where(inside, 2 * conditional - unconditional, conditional)
    torch.testing.assert_close(v_g, expected)
    torch.testing.assert_close(v_g[dropped], unconditional[dropped])


def test_times_of_dmf_come_from_three_distributions():
    x, y = torch.zeros(40_000, 1, 1, 1), torch.zeros(40_000, dtype=torch.int64)
    objective = DMF(flow_mean=-1.0, flow_std=0.5, t_mean=2.0, t_std=0.1, r_mean=-2.0, r_std=0.2)
    sample = objective.sample(x, y, NULL, Draws(0))
    for times, mean, std in ((sample.t_flow, -1, 0.5), (sample.t, 2, 0.1), (sample.r, -2, 0.2)):
        logit = torch.logit(times.double())
        assert abs(logit.mean() - mean) < 0.02
        assert abs(logit.std() - std) < 0.02


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: FlowMap(kind="semigroup"), "objective.kind"),
        (lambda: FlowMap(stop_gradient="none"), "objective.stop_gradient"),
        (lambda: FlowMap(split="thirds"), "objective.split"),
        (lambda: FlowMap(data_proportion=2), "objective.data_proportion"),
        (lambda: FlowMap(reduce="max"), "objective.reduce"),
        (lambda: MeanFlowDistillation(lambda: None, omega=2.0), "objective.omega"),
        (lambda: MeanFlowDistillation(lambda: None, teacher_guidance=-1), "teacher_guidance"),
        (lambda: DMF(Jvp("tangent_grad")), "objective.jvp.mode"),
        (lambda: DMF(omega=-1), "objective.omega"),
        (lambda: DMF(omega=1, label_dropout=0), "objective.label_dropout"),
        (lambda: DMF(teacher=lambda: None, omega=1), "objective.omega"),
        (lambda: DMF(c=0), "objective.c"),
    ],
)
def test_a_wrong_flag_raises_an_error_that_names_its_key(build, key):
    with pytest.raises((ValueError, TypeError), match=key.replace(".", r"\.")):
        build()
