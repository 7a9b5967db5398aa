"""Exact statements about sCM, the TrigFlow path and its sampler."""

import math
from functools import partial

import pytest
import torch

from jvp_flash_attention import attention as jvp_attention
from tests.exact import GaussianConsistency, GaussianMeanFlow
from training.attentions import sdpa
from training.objectives.paths import expand, linear_path, trig_path, trig_velocity
from training.objectives.scm import SCM, SCMSample
from training.objectives.tangents import Jvp
from training.objectives.times import draw_angles
from training.randomness import generator
from training.samplers.consistency import ConsistencySampler
from training.samplers.generate import generate

ATTENTIONS = {
    "sdpa": sdpa,
    "jvp": jvp_attention,
    "reference": partial(jvp_attention, backend="reference"),
}
NULL = 10


def exact_sample(net, warmup=1.0, shape=(64, 3)):
    """Points at random times with the marginal velocity of the exact flow, in float64."""
    torch.manual_seed(0)
    x_t = torch.randn(shape, dtype=torch.float64)
    t = 0.1 + 1.4 * torch.rand(len(x_t), dtype=torch.float64)
    y = torch.zeros(len(x_t), dtype=torch.int64)
    w = torch.tensor(warmup, dtype=torch.float64)
    return SCMSample(x_t, net.velocity(x_t, t), t, y, y > 0, torch.tensor(NULL), w)


def gradients(net, loss):
    grads = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_at_initialisation_the_errors_are_exact(tiny, batch, draws, attention, reduce):
    net = tiny(ATTENTIONS[attention], awake=False, log_variance=True)
    objective = SCM(reduce=reduce)
    sample = objective.sample(*batch, NULL, draws)
    metrics = objective.loss(net, sample).metrics
    v = sample.dxdt.square().flatten(1)
    v = v.sum(1) if reduce == "sum" else v.mean(1)
    torch.testing.assert_close(metrics["v_loss"], v.mean(), rtol=1e-6, atol=0)
    # F = dF = 0, and before the first step the tangent's weight is 0: g = cos² t dx/dt
    expected = (sample.t.cos() ** 4 * v).mean()
    torch.testing.assert_close(metrics["error"], expected, rtol=1e-6, atol=0)
    assert metrics["dudt_rms"] == 0


@pytest.mark.parametrize("mode", ["single", "double"])
def test_the_tangent_vanishes_at_the_exact_consistency_function(mode):
    net = GaussianConsistency()
    objective = SCM(Jvp(mode), learned_variance=False)
    assert objective.loss(net, exact_sample(net)).metrics["error"] < 1e-28
    # The test sees a wrong velocity, and a consistency function of other data.
    sample = exact_sample(net)
    wrong = sample._replace(dxdt=net.velocity(sample.x_t, sample.t - 0.1))
    assert objective.loss(net, wrong).metrics["error"] > 1e-4
    assert objective.loss(GaussianConsistency(sigma=0.6), sample).metrics["error"] > 1e-4


def test_the_finite_difference_of_the_exact_solution_converges_with_second_order():
    net = GaussianConsistency()

    def error(epsilon):
        objective = SCM(Jvp("finite_difference", epsilon), learned_variance=False)
        return float(objective.loss(net, exact_sample(net)).metrics["error"])

    assert error(1e-3) < 1e-8
    assert error(1e-3) / error(5e-4) == pytest.approx(16, rel=0.01)  # of the squared error


def test_without_tangent_the_target_is_the_velocity_the_denoiser_would_have():
    net = GaussianConsistency()
    sample = exact_sample(net, warmup=0.0)
    objective = SCM(learned_variance=False, normalise=False)

    class Denoiser(torch.nn.Module):
        def forward(self, x, t, r, y):
            return net.velocity(net.sigma_data * x, t) / net.sigma_data

    assert objective.loss(Denoiser(), sample).metrics["error"] < 1e-28


def test_the_path_runs_from_data_to_noise_and_its_velocity_is_its_derivative():
    x, e = torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.linspace(0, math.pi / 2, 5, dtype=torch.float64)
    x_t, dxdt = trig_path(x, e, t, 0.5)
    torch.testing.assert_close(x_t[0], x[0])
    torch.testing.assert_close(x_t[-1], 0.5 * e[-1])
    derivative = torch.func.jvp(lambda t: trig_path(x, e, t, 0.5)[0], (t,), (torch.ones_like(t),))
    torch.testing.assert_close(dxdt, derivative[1])


@pytest.mark.parametrize("sigma_data", [0.5, 0.9])
def test_a_velocity_of_the_linear_path_gives_that_of_trigflow(sigma_data):
    linear, trig = GaussianMeanFlow(), GaussianConsistency(sigma_data=sigma_data)
    sample = exact_sample(trig)
    converted = trig_velocity(linear.velocity, sample.x_t, sample.t, sigma_data)
    torch.testing.assert_close(converted, sample.dxdt, rtol=1e-12, atol=1e-12)
    # and for a single pair of data and noise, whose velocity is e - x everywhere
    x, e = torch.randn(2, 64, 3, dtype=torch.float64)
    x_t, dxdt = trig_path(x, e, sample.t, sigma_data)
    s = sigma_data * sample.t.sin() / (sample.t.cos() + sigma_data * sample.t.sin())
    seen = []
    converted = trig_velocity(lambda z, s: seen.append((z, s)) or e - x, x_t, sample.t, sigma_data)
    torch.testing.assert_close(converted, dxdt)
    torch.testing.assert_close(seen[0], (linear_path(x, e, s)[0], s))


def test_distillation_of_the_exact_flow_has_no_error_at_the_exact_solution():
    student, teacher = GaussianConsistency(), GaussianMeanFlow()
    objective = SCM(teacher=lambda: teacher, learned_variance=False)
    sample = exact_sample(student)._replace(dxdt=torch.zeros(64, 3))  # not the sample's own
    with pytest.raises(RuntimeError, match=r"objective\.on_fit_start"):
        objective.loss(student, sample)
    objective.on_fit_start(torch.zeros(()))
    assert objective.loss(student, sample).metrics["error"] < 1e-28
    assert not objective.state_dict().keys() - {"_extra_state"}  # the teacher stays in its file


def test_the_teacher_is_guided_from_its_null_label():
    class Teacher(torch.nn.Module):
        def forward(self, z, t, r, y):
            return torch.where(expand(y == NULL, z), 1.0, 3.0) * torch.ones_like(z)

    objective = SCM(teacher=Teacher, teacher_guidance=2.0)
    objective.on_fit_start(torch.zeros(()))
    sample = exact_sample(GaussianConsistency())
    expected = trig_velocity(lambda z, s: 5 * torch.ones_like(z), sample.x_t, sample.t, 0.5)
    torch.testing.assert_close(objective._velocity(sample), expected)


def test_modes_single_and_double_give_the_same_loss_and_gradients(tiny, batch, draws):
    net = tiny(log_variance=True, conditioning="t", dropout=0.2).train()
    results = []
    for mode in ("single", "double"):
        objective = SCM(Jvp(mode), warmup_steps=0)
        torch.manual_seed(2)
        loss = objective.loss(net, objective.sample(*batch, NULL, draws)).loss
        results.append((loss, gradients(net, loss)))
    (loss_a, grad_a), (loss_b, grad_b) = results
    assert relative(loss_a, loss_b) < 2e-7
    assert relative(grad_a, grad_b) < 2e-7


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_gradient_is_the_normalised_tangent_pulled_back(tiny, batch, draws, reduce):
    """-2 λ/e^s g/(‖g‖ + c) is the cotangent of F, for the prior weight 1 / (σ tan t)."""
    net = tiny(log_variance=True, conditioning="t").double()
    objective = SCM(warmup_steps=0, prior_weight="tan", reduce=reduce)
    x, y = batch
    sample = objective.sample(x, y, NULL, draws)
    sample = SCMSample(*(a.double() if a.is_floating_point() else a for a in sample))
    x_t, dxdt, t, y, *_ = sample
    cos, sin, sigma = expand(t.cos(), x_t), expand(t.sin(), x_t), 0.5
    F, dF = torch.func.jvp(
        lambda x, t: net(x, t, t, y),
        (x_t / sigma, t),
        (cos * sin * dxdt / sigma, t.cos() * t.sin()),
    )
    g = (-(cos**2) * (sigma * F - dxdt) - cos * sin * x_t - sigma * dF).detach()
    count = g[0].numel() if reduce == "mean" else 1
    size = g.flatten(1).norm(dim=1) / math.sqrt(count)
    weight = 1 / (sigma * t.tan()) / net.log_variance(t).exp().detach()
    cotangent = -2 * expand(weight / (size + 0.1), g) * g / (count * len(g))
    names = [n for n, _ in net.named_parameters() if not n.startswith("variance")]
    trunk = [net.get_parameter(n) for n in names]
    by_hand = torch.autograd.grad((F * cotangent).sum(), trunk, materialize_grads=True)
    loss = torch.autograd.grad(objective.loss(net, sample).loss, trunk, materialize_grads=True)
    for name, a, b in zip(names, loss, by_hand, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_the_log_variance_is_learned_towards_the_logarithm_of_the_weighted_error():
    """Where the loss is stationary in s, e^s is the weighted error."""
    net = GaussianConsistency()
    sample, wrong = exact_sample(net), GaussianConsistency(sigma=0.6)
    objective = SCM(learned_variance=False)
    error = objective.loss(wrong, sample).loss
    s = error.log().clone().requires_grad_()
    wrong.log_variance = lambda t: s.expand_as(t)
    loss = SCM().loss(wrong, sample).loss
    assert abs(float(torch.autograd.grad(loss, s)[0])) < 1e-6


@pytest.mark.parametrize(
    ("denoiser_steps", "warmup_steps", "expected"),
    [
        (0, 4, [0, 0.25, 0.5, 0.75, 1, 1]),
        (3, 2, [0, 0, 0, 0, 0.5, 1]),
        (2, 0, [0, 0, 1, 1, 1, 1]),
    ],
)
def test_the_tangent_warms_up_after_the_denoiser_and_checkpoints_remember_the_steps(
    tiny, batch, draws, denoiser_steps, warmup_steps, expected
):
    net = tiny(log_variance=True)
    build = lambda: SCM(denoiser_steps=denoiser_steps, warmup_steps=warmup_steps)  # noqa: E731
    objective, resumed = build(), build()
    weights = []
    for _ in range(6):
        sample = objective.sample(*batch, NULL, draws)
        weights.append(float(sample.warmup))
        assert float(objective.loss(net, sample).metrics["tangent_weight"]) == weights[-1]
        objective.after_step(torch.nn.Identity())
    assert weights == expected
    resumed.load_state_dict(objective.state_dict())
    assert resumed.steps == 6


def test_below_the_anchor_the_target_is_that_of_the_denoiser(tiny, batch, draws):
    net, times = tiny(conditioning="t").double(), torch.tensor([0.1, 0.3, 0.5, 1.2])
    x, y = (part[:4] for part in batch)
    sample = SCM(warmup_steps=0).sample(x, y, NULL, draws)._replace(t=times)
    sample = SCMSample(*(a.double() if a.is_floating_point() else a for a in sample))

    def errors(anchor, w):
        objective = SCM(anchor=anchor, learned_variance=False)
        return objective.loss(net, sample._replace(warmup=sample.warmup.new_tensor(w))).errors

    denoiser, consistency = errors(0.0, 0.0), errors(0.0, 1.0)
    assert (denoiser != consistency).all()
    for anchor, below in ((0.2, 1), (sample.t[2].item(), 2), (math.pi / 2, 4)):
        expected = torch.cat([denoiser[:below], consistency[below:]])
        torch.testing.assert_close(errors(anchor, 1.0), expected, rtol=0, atol=0)


class AnchoredConsistency(GaussianConsistency):
    """f is the denoiser up to t_a; a later point has the f of its path's point at t_a."""

    def __init__(self, anchor):
        super().__init__()
        self.anchor = anchor

    def forward(self, x, t, r, y):
        x_t, end = self.sigma_data * x, torch.full_like(t, self.anchor)
        cos, sin = expand(t.cos(), x), expand(t.sin(), x)
        spread = expand(self.spread(end) / self.spread(t), x)
        x_a = math.cos(self.anchor) * self.mu + spread * (x_t - cos * self.mu)
        f = math.cos(self.anchor) * x_a - math.sin(self.anchor) * self.velocity(x_a, end)
        denoiser = self.velocity(x_t, t) / self.sigma_data
        return torch.where(
            expand(t < self.anchor, x), denoiser, (cos * x_t - f) / (sin * self.sigma_data)
        )


def test_a_denoiser_below_the_anchor_and_constant_above_it_has_no_error():
    anchor = 0.4
    net = AnchoredConsistency(anchor)
    sample, objective = exact_sample(net), SCM(anchor=anchor, learned_variance=False)
    assert (sample.t < anchor).any()
    assert objective.loss(net, sample).metrics["error"] < 1e-28
    assert SCM(learned_variance=False).loss(net, sample).metrics["error"] > 1e-4


def test_angles_are_the_arctangent_of_a_lognormal():
    t = draw_angles(100_000, -1.0, 1.4, 0.5, generator(0, 0, 0, "times"))
    assert (t > 0).all()
    assert (t <= math.pi / 2).all()
    tau = (t.double().tan() * 0.5).log()
    assert abs(tau.mean() + 1) < 0.02
    assert abs(tau.std() - 1.4) < 0.02


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_the_exact_consistency_function_samples_the_data_with_any_number_of_steps(nfe):
    sampler = ConsistencySampler(0.5, nfe, start=math.pi / 2)
    torch.manual_seed(0)
    noises = torch.randn(1 + sampler.noises, 20_000, 1, dtype=torch.float64)
    y = torch.zeros(20_000, dtype=torch.int64)
    x = sampler(GaussianConsistency(), noises[0], y, *noises[1:])
    assert abs(x.mean() - 0.7) < 0.01
    assert abs(x.std() - 0.4) < 0.01
    if nfe == 1:
        torch.testing.assert_close(x, 0.7 + 0.4 * noises[0])


def test_renewed_noise_is_repeatable_and_does_not_depend_on_the_chunk(tiny):
    net, y = tiny(), torch.arange(20) % 10
    sampler = ConsistencySampler(0.5, 3)
    images = [generate(net, sampler, y, (1, 8, 8), seed=3, chunk=c) for c in (20, 7)]
    torch.testing.assert_close(*images)
    assert not torch.equal(images[0], generate(net, sampler, y, (1, 8, 8), seed=4))


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: SCM(Jvp("tangent_grad")), "objective.jvp.mode"),
        (lambda: SCM(sigma_data=0), "objective.sigma_data"),
        (lambda: SCM(time_std=0), "objective.time_std"),
        (lambda: SCM(denoiser_steps=-1), "objective.denoiser_steps"),
        (lambda: SCM(warmup_steps=-1), "objective.warmup_steps"),
        (lambda: SCM(anchor=1.6), "objective.anchor"),
        (lambda: SCM(reduce="max"), "objective.reduce"),
        (lambda: SCM(c=0), "objective.c"),
        (lambda: SCM(prior_weight="cos"), "objective.prior_weight"),
        (lambda: SCM(label_dropout=2), "objective.label_dropout"),
        (lambda: SCM(teacher_guidance=-1), "objective.teacher_guidance"),
        (lambda: ConsistencySampler(0.5, 0), "sampler.nfe"),
        (lambda: ConsistencySampler(0.5, start=2.0), "sampler.start"),
        (lambda: ConsistencySampler(0.5, again=1.57), "sampler.again"),
        (lambda: ConsistencySampler(-1), "sampler.sigma_data"),
    ],
)
def test_a_wrong_flag_raises_an_error_that_names_its_key(build, key):
    with pytest.raises((ValueError, TypeError), match=key.replace(".", r"\.")):
        build()
