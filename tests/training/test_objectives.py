"""Exact statements about flow matching and MeanFlow."""

from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map_only

from jvp_flash_attention import attention as jvp_attention
from tests.exact import GaussianMeanFlow
from training.attentions import sdpa
from training.objectives.flow_matching import FlowMatching
from training.objectives.meanflow import MeanFlow, MeanFlowSample
from training.objectives.paths import expand, linear_path
from training.objectives.tangents import CONSTANT, MODES, Jvp
from training.objectives.times import Times
from training.objectives.weighting import adaptive_weight
from training.randomness import generator

ATTENTIONS = {
    "sdpa": sdpa,
    "jvp": jvp_attention,
    "reference": partial(jvp_attention, backend="reference"),
}
NULL = 10
EXACT = ("single", "double")  # modes with the same numbers


def gradients(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_at_initialisation_both_errors_are_exactly_the_squared_velocity(
    tiny, batch, draws, attention, reduce
):
    net = tiny(ATTENTIONS[attention], awake=False)
    for objective in (FlowMatching(reduce=reduce), MeanFlow(reduce=reduce, data_proportion=0.5)):
        sample = objective.sample(*batch, NULL, draws)
        v = sample.v.flatten(1).square()
        expected = (v.sum(1) if reduce == "sum" else v.mean(1)).mean()
        error = objective.loss(net, sample).metrics["error"]
        torch.testing.assert_close(error, expected, rtol=1e-6, atol=0)


def test_at_initialisation_du_dt_is_exactly_zero(tiny, batch, draws):
    objective = MeanFlow(data_proportion=0)
    metrics = objective.loss(tiny(awake=False), objective.sample(*batch, NULL, draws)).metrics
    assert metrics["dudt_rms"] == 0
    assert metrics["tangent_norm"] == 0


@pytest.mark.parametrize("mode", EXACT)
def test_closed_form_gaussian_meanflow_has_no_error_to_float64_round_off(mode):
    torch.manual_seed(0)
    net = GaussianMeanFlow()
    z = torch.randn(64, 3, dtype=torch.float64)
    t = 0.3 + 0.7 * torch.rand(64, dtype=torch.float64)
    r = t * torch.rand(64, dtype=torch.float64) * 0.9
    y = torch.zeros(64, dtype=torch.int64)
    sample = MeanFlowSample(z, net.velocity(z, t), t, r, y, y > 0, torch.tensor(NULL), 0)
    objective = MeanFlow(Jvp(mode), data_proportion=0, p=0, reduce="mean")
    assert objective.loss(net, sample).metrics["error"] < 1e-28
    # The test sees a wrong time: the same network is not the average velocity of another interval.
    wrong = sample._replace(v=net.velocity(z, t - 0.1))
    assert objective.loss(net, wrong).metrics["error"] > 1e-4


def test_the_finite_difference_of_the_closed_form_converges_with_second_order():
    torch.manual_seed(0)
    net = GaussianMeanFlow()
    z = torch.randn(64, 3, dtype=torch.float64)
    t = 0.3 + 0.6 * torch.rand(64, dtype=torch.float64)
    y = torch.zeros(64, dtype=torch.int64)
    sample = MeanFlowSample(z, net.velocity(z, t), t, t / 2, y, y > 0, torch.tensor(NULL), 0)

    def error(epsilon):
        jvp = Jvp("finite_difference", epsilon)
        objective = MeanFlow(jvp, data_proportion=0, p=0, reduce="mean")
        return float(objective.loss(net, sample).metrics["error"])

    assert error(5e-3) < 1e-8
    assert error(1e-3) / error(5e-4) == pytest.approx(16, rel=0.01)  # of the squared error


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_the_derivative_and_only_tangent_grad_has_its_gradient(mode):
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x, t_x = torch.randn(2, 5, dtype=torch.float64)
    y, t_y, aux = Jvp(mode).with_aux(lambda x: (torch.sin(w * x), w * x), (x,), (t_x,))
    derivative = w * torch.cos(w * x) * t_x
    torch.testing.assert_close(t_y, derivative, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(y, torch.sin(w * x))
    torch.testing.assert_close(torch.autograd.grad(aux.sum(), w, retain_graph=True)[0], x.sum())
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), w, retain_graph=True)[0], (x * torch.cos(w * x)).sum()
    )
    assert t_y.requires_grad == (mode == "tangent_grad")
    if mode == "tangent_grad":
        expected = torch.autograd.grad(derivative.sum(), w)[0]
        torch.testing.assert_close(torch.autograd.grad(t_y.sum(), w)[0], expected)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_modes_single_and_double_give_the_same_loss_and_gradients(tiny, batch, draws, dropout):
    net = tiny(dropout=dropout).train()
    results = []
    for mode in EXACT:
        objective = MeanFlow(Jvp(mode), data_proportion=0.25, p=0)
        torch.manual_seed(2)
        loss = objective.loss(net, objective.sample(*batch, NULL, draws)).loss
        results.append((loss, flat(gradients(net, loss))))
    (loss_a, grad_a), (loss_b, grad_b) = results
    assert relative(loss_a, loss_b) < 2e-7
    assert relative(grad_a, grad_b) < 2e-7


@pytest.mark.parametrize("mode", EXACT)
def test_the_tangent_is_a_constant_of_the_loss(tiny, batch, draws, mode):
    net = tiny()
    objective = MeanFlow(Jvp(mode), data_proportion=0, p=0)
    sample = objective.sample(*batch, NULL, draws)
    z, v, t, r, y, *_ = sample
    f = lambda z, t, r: net(z, t, r, y)  # noqa: E731
    u, dudt = torch.func.jvp(f, (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
    target = (v - expand(t - r, v) * dudt).detach()
    by_hand = (u - target).square().flatten(1).sum(1).mean()
    loss = objective.loss(net, sample).loss
    assert relative(loss, by_hand) < 1e-6
    assert relative(flat(gradients(net, loss)), flat(gradients(net, by_hand))) < 1e-6


def test_leaving_out_the_derivative_where_r_equals_t_changes_nothing(tiny, batch, draws):
    net = tiny()
    objective = MeanFlow(data_proportion=0.5, p=0.5)
    sample = objective.sample(*batch, NULL, draws)
    assert (sample.r == sample.t).sum() == 6
    everywhere = sample._replace(equal=0)  # the derivative of all, also where t - r = 0
    a, b = objective.loss(net, sample), objective.loss(net, everywhere)
    assert relative(a.loss, b.loss) < 1e-6
    assert relative(flat(gradients(net, a.loss)), flat(gradients(net, b.loss))) < 1e-5


@pytest.mark.parametrize("mode", CONSTANT)
@pytest.mark.parametrize("attention", ["jvp", "reference"])
def test_loss_and_gradients_do_not_depend_on_the_attention(tiny, batch, draws, attention, mode):
    objective = MeanFlow(Jvp(mode), data_proportion=0.25, p=0)
    sample = tree_map_only(
        torch.Tensor,
        lambda a: a.double() if a.is_floating_point() else a,
        objective.sample(*batch, NULL, draws),
    )
    losses, grads = [], []
    for function in (sdpa, ATTENTIONS[attention]):
        net = tiny(function).double()
        loss = objective.loss(net, sample).loss
        losses.append(loss)
        grads.append(flat(gradients(net, loss)))
    assert relative(losses[1], losses[0]) < 1e-12
    assert relative(grads[1], grads[0]) < 1e-11


def test_guidance_mixes_three_velocities_inside_its_interval_and_for_kept_labels(
    tiny, batch, draws
):
    net = tiny()
    objective = MeanFlow(
        omega=0.2, kappa=0.9, guidance_start=0.2, guidance_end=0.6, label_dropout=0.5, p=0
    )
    sample = objective.sample(*batch, NULL, draws)
    z, v, t, _, y, dropped, null, _ = sample
    v_g = objective._guided_velocity(net, sample)
    mixed = (
        0.2 * v + (1 - 0.2 - 0.9) * net(z, t, t, torch.full_like(y, NULL)) + 0.9 * net(z, t, t, y)
    )
    guided = (t >= 0.2) & (t <= 0.6) & ~dropped
    assert 0 < guided.sum() < len(t)
    assert (y[dropped] == null).all()
    torch.testing.assert_close(v_g[guided], mixed[guided], rtol=1e-5, atol=1e-6)
    assert torch.equal(v_g[~guided], v[~guided])
    assert not v_g.requires_grad


def test_adaptive_weight_is_one_over_error_plus_c_to_the_p():
    error = torch.tensor([1.0, 3.0], requires_grad=True)
    weight = adaptive_weight(error, p=0.75, c=1e-3)
    torch.testing.assert_close(weight, torch.tensor([1.001**-0.75, 3.001**-0.75]))
    assert not weight.requires_grad
    assert torch.equal(adaptive_weight(error, p=0, c=1e-2), torch.ones(2))


def test_linear_path_runs_from_data_to_noise_with_constant_velocity():
    x, e = torch.randn(2, 5, 3, dtype=torch.float64)
    for t, expected in ((0.0, x), (1.0, e)):
        z, v = linear_path(x, e, torch.full((5,), t, dtype=torch.float64))
        assert torch.equal(z, expected)
        assert torch.equal(v, e - x)


def test_time_pairs_are_ordered_equal_for_the_share_and_distributed_as_asked():
    times = Times("logit_normal", -0.4, 1.0)
    t, r = times.draw_pairs(20_000, 5_000, generator(0, 0, 0, "times"))
    assert (t >= r).all()
    assert (t[:5000] == r[:5000]).all()
    assert (t[5000:] > r[5000:]).all()
    normal = torch.logit(times.draw(100_000, generator=generator(0, 0, 0, "times")))
    assert abs(normal.mean() + 0.4) < 0.02
    assert abs(normal.std() - 1) < 0.02
    uniform = Times("uniform").draw(100_000, generator=generator(0, 0, 0, "times"))
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(uniform.var() - 1 / 12) < 0.001


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: MeanFlow(p=-1), "objective.p"),
        (lambda: MeanFlow(c=0), "objective.c"),
        (lambda: MeanFlow(p="one"), "objective.p"),
        (lambda: MeanFlow(reduce="max"), "objective.reduce"),
        (lambda: MeanFlow(data_proportion=1.5), "objective.data_proportion"),
        (lambda: MeanFlow(guidance_start=0.5, guidance_end=0.2), "objective.guidance_end"),
        (lambda: MeanFlow(time_sampler="beta"), "objective.time_sampler"),
        (lambda: MeanFlow(time_std=0), "objective.time_std"),
        (lambda: MeanFlow(label_dropout=2), "objective.label_dropout"),
        (lambda: FlowMatching(reduce=None), "objective.reduce"),
        (lambda: Jvp("triple"), "objective.jvp.mode"),
        (lambda: Jvp(epsilon=0), "objective.jvp.epsilon"),
        (lambda: MeanFlow(Jvp("tangent_grad")), "objective.jvp.mode"),
    ],
)
def test_a_wrong_flag_raises_an_error_that_names_its_key(build, key):
    with pytest.raises((ValueError, TypeError), match=key.replace(".", r"\.")):
        build()
