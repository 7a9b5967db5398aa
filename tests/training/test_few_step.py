"""Exact statements about iMF, TVM, α-Flow and shortcut models."""

from functools import partial

import pytest
import torch

from jvp_flash_attention import attention as jvp_attention
from tests.exact import GaussianMeanFlow, doubled, points, slope
from training.attentions import sdpa
from training.objectives.alphaflow import AlphaFlow, AlphaFlowSample
from training.objectives.imf import IMF, IMFSample
from training.objectives.meanflow import MeanFlow, MeanFlowSample
from training.objectives.shortcut import Shortcut, ShortcutSample
from training.objectives.tangents import CONSTANT, MODES, Jvp
from training.objectives.teachers import AveragedTeacher
from training.objectives.times import Times
from training.objectives.tvm import TVM, TVMSample
from training.randomness import Draws, generator

ATTENTIONS = {
    "sdpa": sdpa,
    "jvp": jvp_attention,
    "reference": partial(jvp_attention, backend="reference"),
}
NULL = 10
HEADS = {"guided": True, "second_head": 1}


def gradients(net, loss):
    grads = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_at_initialisation_the_errors_are_exact(tiny, batch, draws, attention, reduce):
    net = tiny(ATTENTIONS[attention], awake=False, **HEADS)
    # u = du/dt = 0, of the teacher too: what remains of each error
    remains = {
        IMF(reduce=reduce): lambda v: v.mean(),
        TVM(reduce=reduce): lambda v: v.mean(),
        AlphaFlow(reduce=reduce, clip=None): lambda v: v.mean(),  # α = 1
        Shortcut(reduce=reduce, consistency_share=0.25): lambda v: v[3:].sum() / len(v),
    }
    for objective, expected in remains.items():
        objective.setup(net)
        sample = objective.sample(*batch, NULL, draws)
        pair = getattr(sample, "pair", sample)
        v = pair.v.square().flatten(1)
        v = v.sum(1) if reduce == "sum" else v.mean(1)
        metrics = objective.loss(net, sample).metrics
        torch.testing.assert_close(metrics["error"], expected(v), rtol=1e-6, atol=0)
        here = v if isinstance(objective, TVM) else v[pair.t == pair.r]
        torch.testing.assert_close(metrics["v_loss"], here.mean(), rtol=1e-6, atol=0)


def imf_sample(net, z, t, r, y, v=None):
    v = net.velocity(z, t) if v is None else v
    told = torch.tensor([[1.0, 0.0, 1.0]], dtype=z.dtype).expand(len(z), 3)
    equal = int((t == r).sum())
    return IMFSample(z, v, t, r, y, y > 0, torch.tensor(NULL), told, y, equal)


@pytest.mark.parametrize("mode", ["single", "double"])
def test_imf_has_no_error_at_the_exact_solution(mode):
    net, (z, t, r, y) = GaussianMeanFlow(), points()
    objective = IMF(Jvp(mode), data_proportion=0.25, guidance_max=1, p=0)
    r = torch.cat([t[:16], r[16:]])
    metrics = objective.loss(net, imf_sample(net, z, t, r, y)).metrics
    assert metrics["error"] < 1e-28
    assert metrics["head_error"] < 1e-28
    wrong = imf_sample(net, z, t, r, y, net.velocity(z, t - 0.1))
    assert objective.loss(net, wrong).metrics["error"] > 1e-4


def test_imf_differentiates_along_its_own_velocity_not_the_samples(tiny, batch, draws):
    """Of two samples with the same z, t, r, y, V is the same whatever their v."""
    net = tiny(**HEADS)
    objective = IMF(data_proportion=0, guidance_max=1, p=0)
    sample = objective.sample(*batch, NULL, draws)
    other = sample._replace(v=sample.v + 1)
    a, b = objective.loss(net, sample), objective.loss(net, other)
    assert a.metrics["dudt_rms"] == b.metrics["dudt_rms"] > 0
    # so that the loss is quadratic in v: its gradient's difference is linear in the shift
    third = objective.loss(net, sample._replace(v=sample.v + 2))
    grads = [gradients(net, terms.loss) for terms in (a, b, third)]
    assert relative(grads[2] - grads[1], grads[1] - grads[0]) < 1e-4


def test_imf_guidance_mixes_velocities_of_the_second_head(tiny, batch, draws):
    net = tiny(**HEADS)
    objective = IMF(data_proportion=0.25, label_dropout=0.4)
    sample = objective.sample(*batch, NULL, draws)
    z, v, t, _, _, dropped, _, guidance, label, _ = sample
    w, start, end = guidance.unbind(1)
    assert (start[:3] == 0).all()
    assert (end[:3] == 1).all()
    assert ((w >= 1) & (w <= 8)).all()
    acts = (t >= start) & (t <= end)
    assert acts.any()
    assert not acts.all()
    v_g, tangent = objective._guided_velocity(net, sample)
    for i in range(len(z)):
        scale = w[i] if acts[i] else torch.tensor(1.0)
        told = torch.tensor([[scale, 0, 1], [1, 0, 1]])
        twice = (a[i : i + 1].expand(2, *a.shape[1:]) for a in (z, t, t))
        labels = torch.tensor([label[i], NULL])
        conditional, null = net.heads(*twice, labels, told)[1]
        torch.testing.assert_close(tangent[i], conditional, rtol=1e-4, atol=1e-5)
        mixed = v[i] if dropped[i] else v[i] + (1 - 1 / scale) * (conditional - null)
        torch.testing.assert_close(v_g[i], mixed, rtol=1e-4, atol=1e-5)
    assert dropped.any()


def test_imf_guidance_scales_have_a_density_proportional_to_their_inverse():
    x, y = torch.zeros(20_000, 1, 1, 1), torch.zeros(20_000, dtype=torch.int64)
    w = IMF(guidance_max=8).sample(x, y, NULL, Draws(0)).guidance[:, 0]
    shares = w.log() / torch.tensor(8.0).log()  # uniform
    assert abs(shares.mean() - 0.5) < 0.01
    assert abs(shares.var() - 1 / 12) < 0.002


def tvm_sample(net, v=None):
    z, t, s, y = points()
    v = net.velocity(z, t) if v is None else v
    return TVMSample(z, t, s, z, t, v, y, y > 0, torch.tensor(NULL), torch.ones(len(z), 3))


@pytest.mark.parametrize("mode", MODES)
def test_tvm_has_no_error_at_the_exact_solution(mode):
    net = GaussianMeanFlow()
    objective = TVM(Jvp(mode, epsilon=1e-4))
    objective.setup(net)
    metrics = objective.loss(net, tvm_sample(net)).metrics
    assert metrics["error"] < (1e-13 if mode == "finite_difference" else 1e-28)
    # The test sees a teacher with another velocity.
    objective.setup(GaussianMeanFlow(sigma=0.5))
    assert objective.loss(net, tvm_sample(net)).metrics["terminal_error"] > 1e-4


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_tvm_differentiates_through_the_tangent(tiny, batch, draws, attention):
    """The gradient is that of the loss as a function of the weights, teacher and arrival fixed."""
    net = tiny(ATTENTIONS[attention]).double()
    objective = TVM()
    objective.setup(net)
    sample = doubled(objective.sample(*batch, NULL, draws))
    z, t, s, y = sample.z, sample.t, sample.s, sample.y
    with torch.no_grad():
        arrival = z + (s - t)[:, None, None, None] * net(z, t, s, y)
        target = objective.teacher(arrival, s, s, y)
        fixed = lambda *_: target  # noqa: E731
    objective.teacher = torch.nn.Module()
    objective.teacher.forward = fixed
    exact, expected = slope(lambda: objective.loss(net, sample).loss, list(net.parameters()))
    assert exact == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", CONSTANT)
def test_tvm_without_the_gradient_of_its_tangent_is_another_objective(tiny, batch, draws, mode):
    net = tiny()
    results = []
    for m in ("tangent_grad", mode):
        objective = TVM(Jvp(m))
        objective.setup(net)
        loss = objective.loss(net, objective.sample(*batch, NULL, draws)).loss
        results.append((loss, gradients(net, loss)))
    (loss_a, grad_a), (loss_b, grad_b) = results
    assert relative(loss_b, loss_a) < (1e-4 if mode == "finite_difference" else 2e-7)
    assert relative(grad_b, grad_a) > 1e-4  # 1e-7 is round-off


def test_tvm_guidance_moves_the_velocity_of_kept_labels_away_from_the_null(tiny, batch, draws):
    net = tiny()
    objective = TVM(omega=2.0, label_dropout=0.5)
    objective.setup(net)
    sample = objective.sample(*batch, NULL, draws)
    null = net(sample.z_flow, sample.s_flow, sample.s_flow, torch.full_like(sample.y, NULL))
    v_g = objective._guided_velocity(sample)
    assert 0 < sample.dropped.sum() < len(null)
    torch.testing.assert_close(
        v_g, torch.where(sample.dropped[:, None, None, None], sample.v, 2 * sample.v - null)
    )


def test_gaps_are_distributed_as_asked_and_the_earlier_time_is_truncated():
    times, gap = Times("logit_normal", -0.4, 1.0), Times("logit_normal", -0.8, 1.0)
    t, s = times.draw_gaps(100_000, gap, generator(0, 0, 0, "times"))
    assert ((s > 0) & (s < t) & (t <= 1)).all()
    logits = torch.logit((t - s).double())
    assert abs(logits.mean() + 0.8) < 0.02
    assert abs(logits.std() - 1) < 0.02
    limit = torch.full((100_000,), 0.3)
    below = times.draw_below(limit, generator(0, 0, 0, "times"))
    free = times.draw(400_000, generator=generator(1, 0, 0, "times"))
    free = free[free < 0.3]
    assert below.max() < 0.3
    for quantile in (0.1, 0.5, 0.9):
        torch.testing.assert_close(
            below.quantile(quantile), free.quantile(quantile), rtol=0.02, atol=0
        )
    uniform = Times("uniform").draw_below(limit, generator(0, 0, 0, "times"))
    assert abs(uniform.mean() - 0.15) < 0.002


def alpha_sample(net, alpha, v=None):
    z, t, r, y = points()
    v = net.velocity(z, t) if v is None else v
    pair = MeanFlowSample(z, v, t, r, y, y > 0, torch.tensor(NULL), 0)
    stage = {0.0: "mean", 1.0: "flow"}.get(alpha, "between")
    return AlphaFlowSample(pair, torch.tensor(alpha, dtype=torch.float64), stage)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.01, 0.0])
def test_alphaflow_has_no_error_where_the_flow_is_straight(alpha):
    """A single data point: every step along the velocity stays on the path, for every α."""
    net = GaussianMeanFlow(sigma=0.0)
    objective = AlphaFlow(data_proportion=0, p=0, clip=None)
    assert objective.loss(net, alpha_sample(net, alpha)).metrics["error"] < 1e-28
    wrong = alpha_sample(net, alpha, v=torch.zeros(64, 3, dtype=torch.float64))
    assert objective.loss(net, wrong).metrics["error"] > 1e-6


def test_alphaflow_tends_to_the_meanflow_identity_with_alpha():
    """The target's error at the exact solution is of second order in α: its square of fourth."""
    net, objective = GaussianMeanFlow(), AlphaFlow(data_proportion=0, p=0, clip=None)
    error = lambda alpha: float(objective.loss(net, alpha_sample(net, alpha)).metrics["error"])  # noqa: E731
    assert error(0.02) / error(0.01) == pytest.approx(16, rel=0.05)
    assert error(0.0) < 1e-28


def test_alphaflow_ends_as_meanflow_and_begins_as_flow_matching(tiny, batch, draws):
    net = tiny()
    alphaflow, meanflow = (
        AlphaFlow(c=1e-2, clip=None),
        MeanFlow(data_proportion=0.25, reduce="mean"),
    )
    sample = alphaflow.sample(*batch, NULL, draws)
    assert sample.alpha == 1
    z, v, t, r, y, *_ = sample.pair
    error = (net(z, t, r, y) - v).square().flatten(1).mean(1)
    expected = (error / (error.detach() + 1e-2)).mean()
    loss = alphaflow.loss(net, sample).loss
    assert relative(gradients(net, loss), gradients(net, expected)) < 1e-6
    alphaflow.steps = 1000
    sample = alphaflow.sample(*batch, NULL, draws)
    assert sample.alpha == 0
    a, b = alphaflow.loss(net, sample).loss, meanflow.loss(net, sample.pair).loss
    assert torch.equal(a, b)
    assert torch.equal(gradients(net, a), gradients(net, b))


def test_alpha_falls_as_a_sigmoid_between_its_steps():
    objective = AlphaFlow(start=100, end=300, gamma=25, clamp=0.005)
    alphas = []
    for k in range(400):
        objective.steps = k
        alphas.append(objective.alpha)
    assert alphas == sorted(alphas, reverse=True)
    assert alphas[100] == 1
    assert alphas[200] == 0.5
    assert alphas[300] == 0
    middle = torch.tensor(alphas[170:231])
    k = torch.arange(170, 231)
    torch.testing.assert_close(middle, torch.sigmoid(-25 * ((k - 100) / 200 - 0.5)))


@pytest.mark.parametrize(
    "build",
    [
        lambda mode: IMF(Jvp(mode), data_proportion=0.25, p=0),
        lambda mode: AlphaFlow(Jvp(mode), p=0),
    ],
)
def test_modes_single_and_double_give_the_same_loss_and_gradients(tiny, batch, draws, build):
    net = tiny(dropout=0.2, **HEADS).train()
    results = []
    for mode in ("single", "double"):
        objective = build(mode)
        objective.steps = 1000
        torch.manual_seed(2)
        loss = objective.loss(net, objective.sample(*batch, NULL, draws)).loss
        results.append((loss, gradients(net, loss)))
    (loss_a, grad_a), (loss_b, grad_b) = results
    assert relative(loss_a, loss_b) < 2e-7
    assert relative(grad_a, grad_b) < 2e-7


def test_two_exact_shortcuts_are_one_exact_shortcut():
    net, (z, t, r, y) = GaussianMeanFlow(), points()
    objective = Shortcut(consistency_share=0.5, clip=None)
    objective.setup(net)
    r = torch.cat([t[:32] - 0.25, t[32:]])
    sample = ShortcutSample(z, net.velocity(z, t), t, r, y, 32)
    assert objective.loss(net, sample).metrics["error"] < 1e-28
    objective.setup(GaussianMeanFlow(sigma=0.5))
    assert objective.loss(net, sample).metrics["consistency_error"] > 1e-4


def test_the_shortest_shortcuts_are_taken_along_the_velocity():
    net, (z, t, _, y) = GaussianMeanFlow(), points()
    objective = Shortcut(consistency_share=1, denoise_timesteps=8)
    objective.setup(net)
    seen = []
    objective.teacher.net.forward = lambda z, t, r, y: seen.append(t - r) or z
    for jump, expected in ((1 / 4, 0), (1 / 2, 1 / 4), (1, 1 / 2)):
        objective._two_jumps(z, t, t - jump, y)
        for length in seen[-2:]:
            torch.testing.assert_close(length, torch.full_like(t, expected))


def test_shortcuts_fit_between_one_and_zero(batch):
    x, y = torch.zeros(4000, 1, 1, 1), torch.zeros(4000, dtype=torch.int64)
    objective = Shortcut(consistency_share=0.5, denoise_timesteps=8)
    sample = objective.sample(x, y, NULL, Draws(0))
    t, r = sample.t[:2000], sample.r[:2000]
    count = (1 / (t - r)).round()
    assert set(count.tolist()) == {1, 2, 4}
    assert min((count == n).sum() for n in (1, 2, 4)) > 600
    torch.testing.assert_close(t * count, (t * count).round())
    assert r.min() == 0
    assert t.max() == 1
    assert torch.equal(sample.t[2000:], sample.r[2000:])


def test_a_teacher_follows_the_weights_and_has_no_gradient_nor_dropout(tiny, batch):
    net = tiny(dropout=0.5)
    teacher = AveragedTeacher(net, decay=0.5)
    before = [p.clone() for p in net.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    for n in (1, 2):
        teacher.follow(net)
        beta = min(0.5, (1 + n) / (10 + n))
        before = [beta * a + (1 - beta) * p for a, p in zip(before, net.parameters(), strict=True)]
    for a, b in zip(teacher.net.parameters(), before, strict=True):
        torch.testing.assert_close(a, b)
    x, y = batch
    t = torch.rand(len(x))
    teacher.train()
    out = teacher(x, t, t, y)
    assert torch.equal(out, teacher(x, t, t, y))
    assert not out.requires_grad
    again = AveragedTeacher(net, decay=0.5)
    again.load_state_dict(teacher.state_dict())
    assert again.updates == 2


def test_an_objective_with_a_teacher_says_that_it_wants_to_be_attached(tiny, batch, draws):
    for objective in (TVM(), Shortcut()):
        with pytest.raises(RuntimeError, match=r"objective\.setup"):
            objective.loss(tiny(), objective.sample(*batch, NULL, draws))


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: IMF(Jvp("tangent_grad")), "objective.jvp.mode"),
        (lambda: IMF(guidance_max=0.5), "objective.guidance_max"),
        (lambda: IMF(p=-1), "objective.p"),
        (lambda: IMF(c=0), "objective.c"),
        (lambda: IMF(data_proportion=2), "objective.data_proportion"),
        (lambda: TVM(gap_std=0), "objective.gap_std"),
        (lambda: TVM(gap_sampler="beta"), "objective.gap_sampler"),
        (lambda: TVM(teacher_decay=2), "objective.teacher_decay"),
        (lambda: TVM(omega=0), "objective.omega"),
        (lambda: AlphaFlow(Jvp("tangent_grad")), "objective.jvp.mode"),
        (lambda: AlphaFlow(start=10, end=10), "objective.end"),
        (lambda: AlphaFlow(gamma=0), "objective.gamma"),
        (lambda: AlphaFlow(clamp=0.6), "objective.clamp"),
        (lambda: Shortcut(denoise_timesteps=3), "objective.denoise_timesteps"),
        (lambda: Shortcut(denoise_timesteps=1), "objective.denoise_timesteps"),
        (lambda: Shortcut(consistency_share=2), "objective.consistency_share"),
        (lambda: Shortcut(teacher_decay=-1), "objective.teacher_decay"),
    ],
)
def test_a_wrong_flag_raises_an_error_that_names_its_key(build, key):
    with pytest.raises((ValueError, TypeError), match=key.replace(".", r"\.")):
        build()
