"""What changes the arithmetic and must not change the result: precision, recomputing, clipping."""

import copy

import lightning as L
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision

from training.activation_checkpointing import checkpoint_blocks
from training.attentions import sdpa
from training.callbacks.non_finite_guard import NonFiniteGuard
from training.data.digits import Digits
from training.models.layers import Block
from training.module import GenerativeModule
from training.objectives.flow_matching import FlowMatching
from training.objectives.meanflow import MeanFlow
from training.objectives.tangents import Jvp
from training.optimizers import adamw


class Record(Callback):
    """Errors of every step, and the gradient as the optimizer receives it."""

    def __init__(self):
        self.errors, self.norms = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.errors.append(float(outputs["metrics"]["error"]))

    def on_before_zero_grad(self, trainer, module, optimizer):
        grads = [p.grad for p in module.net.parameters() if p.grad is not None]
        if grads:
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))


def train(net, objective, *callbacks, steps=4, **options):
    L.seed_everything(0, verbose=False)
    record = Record()
    module = GenerativeModule(
        net,
        objective,
        lambda p, n: adamw(p, n, lr=1e-2, fused="plugins" not in options),
        seed=0,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[record, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, datamodule=Digits(seed=0, batch_size=16))
    return record


@pytest.mark.parametrize("mode", ["single", "double"])
def test_bfloat16_changes_errors_and_derivatives_by_little(tiny, mode):
    net, objective = tiny(), MeanFlow(Jvp(mode))
    exact = train(copy.deepcopy(net), objective)
    rounded = train(copy.deepcopy(net), objective, precision="bf16-mixed")
    assert rounded.errors != exact.errors
    assert rounded.errors == pytest.approx(exact.errors, rel=0.02)


def test_the_time_derivative_survives_bfloat16(tiny, batch):
    """The time is embedded in float32; in bfloat16 the derivative is off by tens of percent."""
    net = tiny()
    (z, y), t = batch, torch.linspace(0.05, 0.95, 12)

    def derivative():
        return torch.func.jvp(lambda t: net(z, t, t / 2, y), (t,), (torch.ones_like(t),))[1]

    exact = derivative()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = derivative().float()
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.03


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_around_a_jvp_counts_for_the_inputs_of_sdpa_alone(compiled):
    """PyTorch casts again inside: a value 3e-3 off, and on a GPU a backward that raises."""
    q, k, v, *tangents = torch.randn(6, 1, 2, 9, 8)
    leaf = q.clone().requires_grad_()

    def step(q, k, v, *tangents):
        return torch.func.jvp(sdpa, (q, k, v), tangents)

    halves = [x.bfloat16() for x in (q, k, v, *tangents)]
    exact = step(*halves)
    if compiled:
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, t_out = step(leaf, k, v, *tangents)
    assert torch.equal(out, exact[0])
    assert torch.equal(t_out, exact[1])
    (gradient,) = torch.autograd.grad(out.float().sum() + t_out.float().sum(), leaf)
    assert gradient.any()


def test_float16_scales_the_loss_and_skips_what_overflows(tiny):
    """A scale that overflows is halved until it fits; the guard sees unscaled gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    net, guard = tiny(), NonFiniteGuard(patience=30)
    before = copy.deepcopy(net)
    record = train(net, MeanFlow(), guard, steps=20, plugins=[plugin])
    assert 0 < guard.skipped < 15
    assert scaler.get_scale() < 2.0**26
    assert all(torch.isfinite(p).all() for p in net.parameters())
    exact = train(before, MeanFlow(), NonFiniteGuard(), steps=2)
    assert record.errors[0] == pytest.approx(exact.errors[0], rel=0.02)
    assert max(record.norms) < 100 * exact.norms[0]  # unscaled


def calls(net):
    """Counts how often blocks are computed with gradients enabled."""
    count = [0]

    def note(*_):
        count[0] += torch.is_grad_enabled()

    for module in net.modules():
        if isinstance(module, Block):
            module.attention.qkv.register_forward_hook(note)
    return count


@pytest.mark.parametrize("objective", [MeanFlow(Jvp("double")), FlowMatching()], ids=["mf", "fm"])
def test_recomputed_blocks_give_the_same_gradients(tiny, batch, draws, objective):
    kept = tiny(dropout=0.2)
    recomputed = copy.deepcopy(kept)
    names = list(kept.state_dict())
    checkpoint_blocks(recomputed, "block")
    assert list(recomputed.state_dict()) == names
    recomputed = copy.deepcopy(recomputed)  # as the averages do it
    grads, counts = [], []
    for net in (kept, recomputed):
        count = calls(net)
        torch.manual_seed(0)
        loss, _ = objective.loss(net, objective.sample(*batch, net.null_label, draws))[:2]
        forward = count[0]
        loss.backward()
        counts.append((forward, count[0] - forward))
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert counts[0] == (counts[1][0], 0)
    assert counts[1][1] == counts[1][0] > 0  # every block once more


def test_recomputing_needs_blocks():
    with pytest.raises(NotImplementedError, match="Linear has none"):
        checkpoint_blocks(torch.nn.Linear(1, 1), "block")


def test_clipping_bounds_the_gradient_and_accumulation_adds_up(tiny):
    net = tiny()
    free = train(copy.deepcopy(net), MeanFlow(p=0), steps=2)
    clipped = train(copy.deepcopy(net), MeanFlow(p=0), steps=2, gradient_clip_val=0.5)
    assert min(free.norms) > 1
    assert clipped.norms == pytest.approx([0.5] * len(clipped.norms))
    accumulated = train(net, MeanFlow(p=0), steps=2, accumulate_grad_batches=3)
    assert len(accumulated.errors) == 6
    assert len(set(accumulated.errors)) == 6  # every part has its own draws
