"""Every objective against its paper's formula, written anew here, sample by sample: at batch sizes
where a rounded share would be another one, over two processes, with labels that were dropped.
"""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from training.callbacks.ema import EMA
from training.objectives.alphaflow import AlphaFlow
from training.objectives.dmf import DMF
from training.objectives.flow_map import FlowMap
from training.objectives.imf import IMF
from training.objectives.meanflow import MeanFlow
from training.objectives.scm import SCM
from training.objectives.shortcut import Shortcut
from training.objectives.teachers import AveragedTeacher
from training.objectives.tvm import TVM
from training.randomness import Draws

SIZES = [1, 2, 5, 10]
STEPS = [(0, 0, 1), (1, 0, 2), (1, 1, 2), (2, 0, 2)]  # number, rank, processes
NULL = 10


class Field(nn.Module):
    """u(z, t, r, y), smooth in all of them, with a second head that is told the guidance; what it
    was asked is recorded.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.w = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64) / 2)
        self.label = nn.Parameter(torch.randn(NULL + 1, 4, generator=generator).double())
        self.evaluated = 0

    def heads(self, z, t, r, y, guidance=None):
        self.evaluated += len(z)
        t, r = t[:, None], r[:, None]
        x = z.flatten(1) @ self.w + self.label[y]
        g = 0 if guidance is None else (guidance @ guidance.new_tensor([0.1, 0.2, 0.3]))[:, None]
        u = torch.sin(x + t + 2 * r + g) * (1 + t * r)
        v = torch.cos(x - t + r + g)
        return u.view_as(z), v.view_as(z)

    def forward(self, z, t, r, y, *told):
        return self.heads(z, t, r, y, *told)[0]

    def log_variance(self, t, r):
        return torch.sin(2 * t - r) * self.w.sum()


def batch(n, rank=0):
    generator = torch.Generator().manual_seed(n + 100 * rank)
    x = torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % NULL


def drawn(objective, n, number=0, rank=0, world_size=1):
    """A sample in float64."""
    sample = objective.sample(*batch(n, rank), NULL, Draws(3, number, rank, world_size))
    double = lambda v: v.double() if torch.is_tensor(v) and v.is_floating_point() else v  # noqa: E731
    if hasattr(sample, "pair"):
        return sample._replace(
            pair=sample.pair._make(map(double, sample.pair)), alpha=sample.alpha.double()
        )
    return sample._make(map(double, sample))


def rows(sample):
    """One by one: a name -> the value of that sample."""
    n = len(sample.t)
    for i in range(n):
        yield {
            name: v[i : i + 1] if torch.is_tensor(v) and v.ndim and len(v) == n else v
            for name, v in sample._asdict().items()
        }


def dot(net, z, t, r, y, tangent, *told):
    """u, and du/dt along (tangent, 1, 0): a difference of high order in float64."""
    head = lambda z, t: net.heads(z, t, r, y, *told)[0].detach()  # noqa: E731
    h, total = 1e-3, 0.0
    for weight, k in ((4 / 5, 1), (-1 / 5, 2), (4 / 105, 3), (-1 / 280, 4)):
        up, down = head(z + k * h * tangent, t + k * h), head(z - k * h * tangent, t - k * h)
        total = total + weight * (up - down) / h
    return net.heads(z, t, r, y, *told)[0], total


def gradient(loss, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def agrees(objective, net, sample, expected, tolerance=1e-9):
    """Loss and gradient of the objective are those of the mean of the expected ones."""
    loss = objective.loss(net, sample).loss
    expected = torch.stack(expected).mean()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        gradient(loss, net), gradient(expected, net), rtol=10 * tolerance, atol=10 * tolerance
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.1, 0.125, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_a_share_is_exact_over_batches_processes_and_accumulation(share, n):
    for world_size in (1, 2, 3):
        counts = [
            Draws(0, number, rank, world_size).count(share, n)
            for number in range(40)
            for rank in range(world_size)
        ]
        mean = Fraction(str(share)) * n
        assert set(counts) <= {math.floor(mean), math.ceil(mean)}  # two at most
        for k in range(1, len(counts) + 1):  # any run of them from the beginning
            assert abs(sum(counts[:k]) - k * mean) < 1
        assert sum(counts[: 8 * 5]) == 40 * mean or (40 * mean).denominator > 1
    for number in range(40):  # processes with shards of one network
        counts = {Draws(0, number, rank, 3, alike=True).count(share, n) for rank in range(3)}
        assert counts == {Draws(0, number).count(share, n)}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_with_r_equal_to_t_come_first_and_have_their_share(n, world_size):
    kinds = [
        MeanFlow(data_proportion=0.75),
        AlphaFlow(data_proportion=0.25),
        IMF(data_proportion=0.5),
    ]
    for objective in [*kinds, FlowMap(data_proportion=0.75)]:
        found = 0
        for number in range(4):
            for rank in range(world_size):
                sample = drawn(objective, n, number, rank, world_size)
                sample = getattr(sample, "pair", sample)
                equal = sample.t == sample.r
                assert equal[: sample.equal].all()
                assert not equal[sample.equal :].any()
                found += sample.equal
        assert found == objective.data_proportion * n * 4 * world_size
    jumps = [drawn(Shortcut(), n, number, r, 2).jumps for number in range(4) for r in (0, 1)]
    assert sum(jumps) == 0.125 * n * 8


@pytest.mark.parametrize("kind", [MeanFlow, IMF])
def test_dropped_labels_are_rows_with_r_equal_to_t(kind):
    count = 0
    for share, dropout, beyond in ((0.5, 0.1, 0), (0.5, 0.5, 0), (0.5, 0.75, 0.5), (0.0, 0.1, 0.1)):
        dropped, others = [], []
        for number in range(60):
            sample = drawn(kind(data_proportion=share, label_dropout=dropout), 25, number)
            count += sample.equal
            assert (sample.y[sample.dropped] == NULL).all()
            assert (sample.y[~sample.dropped] < NULL).all()
            dropped += sample.dropped.tolist()
            others += sample.dropped[sample.equal :].tolist()
        assert sum(dropped) / len(dropped) == pytest.approx(dropout, abs=0.04)
        assert sum(others) / len(others) == pytest.approx(beyond, abs=0.05)
        assert beyond or not any(others)
    assert count


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("guided", [False, True])
def test_meanflow_is_its_formula(n, guided):
    options = {"omega": 0.2, "kappa": 0.92, "guidance_end": 0.8} if guided else {}
    objective, net = MeanFlow(data_proportion=0.25, label_dropout=0.4, **options), Field()
    for step in STEPS:
        sample, expected = drawn(objective, n, *step), []
        for row in rows(sample):
            z, v, t, r, y = (row[name] for name in ("z", "v", "t", "r", "y"))
            v_g = v
            if guided and t <= 0.8 and not row["dropped"]:
                null = torch.full_like(y, NULL)
                v_g = 0.2 * v + (1 - 0.2 - 0.92) * net(z, t, t, null) + 0.92 * net(z, t, t, y)
            v_g = v_g.detach()
            u, dudt = dot(net, z, t, r, y, v_g)
            error = (u - (v_g - (t - r) * dudt)).square().sum()
            expected.append(error / (error.detach() + 1e-2))
        agrees(objective, net, sample, expected)


@pytest.mark.parametrize("n", SIZES)
def test_two_processes_have_the_loss_of_the_joint_rows(n):
    objective, net = MeanFlow(data_proportion=0.75, p=0, label_dropout=0), Field()
    per_rank, joint = [], []
    for number in (0, 1):
        for rank in (0, 1):
            sample = drawn(objective, n, number, rank, 2)
            per_rank.append(objective.loss(net, sample).loss)
            for row in rows(sample):
                z, v, t, r, y = (row[name] for name in ("z", "v", "t", "r", "y"))
                u, dudt = dot(net, z, t, r, y, v)
                joint.append((u - (v - (t - r) * dudt)).square().sum())
    agree = torch.stack(per_rank).mean(), torch.stack(joint).mean()
    torch.testing.assert_close(*agree, rtol=1e-9, atol=1e-9)
    equal = sum(drawn(objective, n, k, r, 2).equal for k in (0, 1) for r in (0, 1))
    assert equal == 3 * n  # three quarters of 4 n, batch size 1 included


@pytest.mark.parametrize("n", SIZES)
def test_imf_is_its_formula_and_its_tangent_uses_the_label_that_was_dropped(n):
    objective, net = IMF(data_proportion=0.25, label_dropout=0.8), Field()  # more than have r = t
    for step in STEPS:
        sample, expected = drawn(objective, n, *step), []
        for row in rows(sample):
            z, v, t, r, y = (row[name] for name in ("z", "v", "t", "r", "y"))
            w, start, end = row["guidance"][0]
            w = w if start <= t <= end else torch.ones_like(w)
            told = torch.stack([w, 0 * w, 0 * w + 1])[None]
            v_c = net.heads(z, t, t, row["label"], told)[1].detach()
            plain = torch.stack([0 * w + 1, 0 * w, 0 * w + 1])[None]
            v_u = net.heads(z, t, t, torch.full_like(y, NULL), plain)[1].detach()
            v_g = v if row["dropped"] else v + (1 - 1 / w) * (v_c - v_u)
            u, dudt = dot(net, z, t, r, y, v_c, row["guidance"])
            compound = (u + (t - r) * dudt - v_g).square().sum()
            head = (net.heads(z, t, r, y, row["guidance"])[1] - v_g).square().sum()
            expected.append(sum(e / (e.detach() + 1e-2) for e in (compound, head)))
        agrees(objective, net, sample, expected)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_dmf_is_its_formula(n, learned):
    options = {"omega": 0.6, "guidance_end": 0.7, "label_dropout": 0.4}
    objective, net = DMF(learned_variance=learned, **options), Field()

    def guided(z, v, t, y, dropped):
        if t > 0.7 or dropped:
            return v
        null = torch.full_like(y, NULL)
        return (v + 0.6 * (net(z, t, t, y) - net(z, t, t, null))).detach()

    def cauchy(error, t, r):
        s = net.log_variance(t, r)[0] if learned else error.new_zeros(())
        return torch.log(error / s.exp() + 0.01) + s

    for step in STEPS:
        sample, expected = drawn(objective, n, *step), []
        for row in rows(sample):
            z, v, t, r, y, dropped = (row[k] for k in ("z", "v", "t", "r", "y", "dropped"))
            target = guided(z, v, t, y, dropped)
            u, dudt = dot(net, z, t, r, y, target)
            error = cauchy((u + (t - r) * dudt - target).square().mean(), t, r)
            z, v, t = (row[f"{name}_flow"] for name in ("z", "v", "t"))
            flow = (net(z, t, t, y) - guided(z, v, t, y, dropped)).square().mean()
            expected.append((error + cauchy(flow, t, t)) / 2)
        agrees(objective, net, sample, expected)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["lagrangian", "eulerian", "progressive"])
@pytest.mark.parametrize("n", SIZES)
def test_flow_maps_are_their_formulas(n, kind, learned):
    objective = FlowMap(kind=kind, data_proportion=0.25, learned_variance=learned, reduce="sum")
    net = Field()
    for step in STEPS:
        sample, expected = drawn(objective, n, *step), []
        for row in rows(sample):
            z, v, t, r, split, y = (row[k] for k in ("z", "v", "t", "r", "split", "y"))
            one, length = torch.ones_like(t), r - t
            u = net(z, t, r, y)
            if r == t:
                residual = u - v
            elif kind == "lagrangian":
                dudr = torch.func.jvp(lambda r: net(z, t, r, y), (r,), (one,))[1]  # noqa: B023
                residual = u + length * dudr - net(z + length * u, r, r, y).detach()
            elif kind == "eulerian":
                own = net(z, t, t, y).detach()
                dudt = torch.func.jvp(lambda t: net(z, t, r, y), (t,), (one,))[1]  # noqa: B023
                along = torch.func.jvp(lambda z: net(z, t, r, y), (z,), (own,))[1].detach()  # noqa: B023
                residual = own - u + length * (dudt + along)
            else:
                s = t + split * length
                first = net(z, t, s, y)
                second = net(z + (s - t) * first, s, r, y)
                residual = u - (split * first + (1 - split) * second).detach()
            s = net.log_variance(t, r)[0] if learned else t.new_zeros(())
            expected.append(residual.square().sum() / s.exp() + s)
        agrees(objective, net, sample, expected)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_tvm_divides_only_labels_that_were_kept_by_omega_squared(n, told):
    objective, net = TVM(omega=2.0, told=told, label_dropout=0.5), Field()
    objective.setup(net)
    ema = objective.teacher.net
    for step in STEPS:
        sample, expected = drawn(objective, n, *step), []
        for row in rows(sample):
            z, t, s, y, v = (row[name] for name in ("z", "t", "s", "y", "v"))
            omega = 1.0 if row["dropped"] else 2.0
            one, w = (z.new_tensor([[x, 0.0, 1.0]]) for x in (1, omega))
            one, w = ((one,), (w,)) if told else ((), ())
            u, duds = torch.func.jvp(lambda s: net(z, t, s, y, *w), (s,), (torch.ones_like(s),))  # noqa: B023
            arrival = (z + (s - t) * u).detach()
            terminal = (u + (s - t) * duds - ema(arrival, s, s, y, *w).detach()).square().mean()
            s, z = row["s_flow"], row["z_flow"]
            null = ema(z, s, s, torch.full_like(y, NULL), *one).detach()
            flow = (net(z, s, s, y, *w) - (omega * v + (1 - omega) * null)).square().mean()
            expected.append((terminal + flow) / omega**2)
        agrees(objective, net, sample, expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("steps", "alpha"), [(0, 1.0), (450, None), (999, 0.0)])
def test_alphaflow_is_its_formula(n, steps, alpha):
    options = {"omega": 0.2, "kappa": 0.92, "guidance_end": 0.75}
    objective = AlphaFlow(data_proportion=0.5, label_dropout=0.5, clip=1.5, **options)
    objective.steps, net = steps, Field()
    for step in STEPS:
        sample, expected = drawn(objective, n, *step), []
        alpha = float(sample.alpha) if alpha is None else alpha
        assert float(sample.alpha) == pytest.approx(alpha)
        pair = sample.pair
        assert not (pair.dropped & (pair.t > 0.75)).any()  # dropped where it is guided
        for row in rows(pair):
            z, v, t, r, y = (row[name] for name in ("z", "v", "t", "r", "y"))
            v_g = v
            if t <= 0.75:  # with the label that was dropped: kappa's part is unconditional too
                null = torch.full_like(y, NULL)
                v_g = 0.2 * v + (1 - 0.2 - 0.92) * net(z, t, t, null) + 0.92 * net(z, t, t, y)
            v_g = v_g.detach()
            weight = 1.0
            if r == t:
                u, target = net(z, t, r, y), v_g
            elif alpha == 0:
                u, dudt = dot(net, z, t, r, y, v_g)
                target = v_g - (t - r) * dudt
            else:
                step = alpha * (t - r)
                average = net(z - step * v_g, t - step, r, y).detach()
                target = (step * v_g + (t - step - r) * average) / (t - r)
                u, target, weight = net(z, t, r, y), target.clamp(-1.5, 1.5), alpha
            error = (u - target).square().mean()
            expected.append(weight * error / (error.detach() + 1e-3))
        agrees(objective, net, sample, expected)


def test_alphaflow_pays_one_forward_at_alpha_1_and_nothing_for_rows_of_flow_matching():
    net, objective = Field(), AlphaFlow(data_proportion=0.5, label_dropout=0)
    for steps, forwards in ((0, 1.0), (500, 1.5)):
        objective.steps, net.evaluated = steps, 0
        objective.loss(net, drawn(objective, 10))
        assert net.evaluated == forwards * 10


@pytest.mark.parametrize("n", [*SIZES, 16])
@pytest.mark.parametrize("clip", [4.0, 0.3])
def test_shortcut_is_its_formula_with_what_is_clipped(n, clip):
    objective, net = Shortcut(consistency_share=0.25, clip=clip, label_dropout=0.5), Field()
    objective.setup(net)
    ema, jumped = objective.teacher.net, 0
    for number, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
        sample, expected = drawn(objective, n, number, rank, 2), []
        for i, row in enumerate(rows(sample)):
            z, v, t, r, y = (row[name] for name in ("z", "v", "t", "r", "y"))
            target = v
            if i < sample.jumps:
                jumped += 1
                assert y < NULL  # a jump keeps its label
                d = (t - r) / 2
                seen = d if d > 1.5 / 128 else 0 * d
                first = ema(z, t, t - seen, y)
                second = ema((z - d * first).clamp(-clip, clip), t - d, t - d - seen, y)
                target = ((first + second) / 2).clamp(-clip, clip).detach()
            expected.append((net(z, t, r, y) - target).square().mean())
        agrees(objective, net, sample, expected)
    assert jumped == n


@pytest.mark.parametrize("form", ["scm", "rcm"])
@pytest.mark.parametrize("n", SIZES)
def test_scm_has_both_forms_of_the_warm_up(n, form):
    options = {"warmup_steps": 10, "warmup_form": form, "learned_variance": False}
    objective, net = SCM(label_dropout=0, **options), Field()
    for steps, w in ((0, 0.0), (4, 0.4), (10, 1.0)):
        objective.steps = steps
        sample, expected = drawn(objective, n, 0, 1, 2), []
        for row in rows(sample):
            x_t, dxdt, t, y = (row[name] for name in ("x_t", "dxdt", "t", "y"))
            cos, sin, sigma = t.cos(), t.sin(), 0.5
            tangents = (cos * sin * dxdt / sigma, cos * sin)
            F, dF = torch.func.jvp(lambda x, t: net(x, t, t, y), (x_t / sigma, t), tangents)  # noqa: B023
            size = cos if form == "scm" else (1 - (w * sin) ** 2).sqrt()
            carried = w * (cos * sin * x_t + sigma * dF)
            if form == "rcm":
                carried = w * cos * sin * x_t + sigma * dF
            g = (-cos * size * (sigma * F - dxdt) - carried).detach()
            g = g / (g.square().mean().sqrt() + 0.1)
            expected.append((F - F.detach() - g).square().mean())
        agrees(objective, net, sample, expected)


@pytest.mark.parametrize("n", SIZES)
def test_v_loss_is_one_thing_for_all_objectives(n):
    """‖u(z, t, t) - v‖² of the samples with r = t, v their own; NaN where there is none."""
    guidance = {"omega": 0.2, "kappa": 0.92}
    for objective in (
        MeanFlow(data_proportion=0.5, reduce="mean", **guidance),
        AlphaFlow(data_proportion=0.5, **guidance),
        IMF(data_proportion=0.5, reduce="mean"),
        FlowMap(data_proportion=0.5),
        Shortcut(consistency_share=0.5),
    ):
        net = Field()
        objective.setup(net)
        for number in (0, 1):
            sample = drawn(objective, n, number)
            terms, sample = objective.loss(net, sample), getattr(sample, "pair", sample)
            same = sample.t == sample.r
            told = [sample.guidance[same]] if hasattr(sample, "guidance") else []
            z, t, y = (part[same] for part in (sample.z, sample.t, sample.y))
            expected = (net.heads(z, t, t, y, *told)[0] - sample.v[same]).square().mean()
            torch.testing.assert_close(terms.metrics["v_loss"], expected, equal_nan=True)


def test_averages_have_a_warm_up_only_where_it_is_asked_for():
    assert [EMA(0.99, warmup=False).beta("0.99", n) for n in (1, 100)] == [0.99, 0.99]
    assert EMA(0.99).beta("0.99", 1) == 2 / 11
    net = nn.Linear(1, 1, bias=False)
    for warmup, decay in ((False, 0.9), (True, 2 / 11)):
        teacher = AveragedTeacher(net, 0.9, warmup)
        before = net.weight.detach().clone()
        with torch.no_grad():
            net.weight += 1
        teacher.follow(net)
        torch.testing.assert_close(teacher.net.weight, before + 1 - decay)
