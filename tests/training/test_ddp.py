"""Two processes: gradients are those of one process on both batches together."""

import functools

import pytest
import torch
from lightning import Callback, Trainer

from tests.training.ranks import spawn
from training.activation_checkpointing import checkpoint_blocks
from training.attentions import sdpa
from training.data.digits import Digits
from training.models.dit import DiT
from training.module import GenerativeModule
from training.objectives.meanflow import MeanFlow
from training.objectives.tangents import Jvp
from training.optimizers import adamw
from training.randomness import Draws

BATCH, SEED = 12, 3
SETTINGS = {"single": False, "double": True}  # mode: are the blocks recomputed


def build(mode):
    torch.manual_seed(SEED)
    net = DiT(sdpa, image_size=8, channels=1, num_classes=10, depth=2, width=32)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    if SETTINGS[mode]:
        checkpoint_blocks(net, "block")
    return net, MeanFlow(Jvp(mode), equal_share=0.5)


class KeepGradients(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = [p.grad.clone() for p in module.net.parameters()]


def work(rank, world, folder):
    results = {}
    for mode in SETTINGS:
        keep = KeepGradients()
        trainer = Trainer(
            accelerator="cpu",
            strategy="ddp",
            devices=2,
            max_steps=1,
            max_epochs=-1,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            logger=False,
            callbacks=[keep],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        net, objective = build(mode)
        module = GenerativeModule(net, objective, functools.partial(adamw, lr=1e-3), SEED)
        trainer.fit(module, datamodule=Digits(SEED, BATCH))
        weights = [p.detach() for p in net.parameters()]
        results[mode] = keep.gradients, weights, float(trainer.callback_metrics["train/error"])
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def alone(mode, rank):
    """Gradients and error of one rank's batch without any other process."""
    net, objective = build(mode)
    data = Digits(SEED, BATCH)
    batch = next(iter(data.order(0, rank, 2)))
    x, y = data.read("train", batch)
    draws = Draws(SEED, 0, rank, 2)
    terms = objective.loss(net, objective.draw(x, y, net.null_label, draws))
    terms.loss.backward()
    return [p.grad for p in net.parameters()], float(terms.metrics["error"])


@pytest.mark.parametrize("mode", list(SETTINGS))
def test_two_processes_have_the_gradients_of_one_on_the_joint_batch(ranks, mode):
    (first, e0), (second, e1) = alone(mode, 0), alone(mode, 1)
    for rank in ranks:
        gradients, _, error = rank[mode]
        for got, a, b in zip(gradients, first, second, strict=True):
            torch.testing.assert_close(got, (a + b) / 2, rtol=1e-4, atol=1e-6)
        assert error == pytest.approx((e0 + e1) / 2)
    apart = [float((a - b).norm() / (a + b).norm()) for a, b in zip(first, second, strict=True)]
    assert min(apart) > 1e-2  # unsynchronised gradients would be seen
    for a, b in zip(*(rank[mode][1] for rank in ranks), strict=True):
        assert torch.equal(a, b)
