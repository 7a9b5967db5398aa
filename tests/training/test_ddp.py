"""Two processes: gradients are those of one process on both batches together."""

import functools
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer
from torch.nn.parallel import DistributedDataParallel

from tests.training.spawn import spawn
from training.activation_checkpointing import checkpoint_blocks
from training.attentions import sdpa
from training.data.digits import Digits
from training.distributed import SummedGradients
from training.models.dit import DiT
from training.module import GenerativeModule
from training.objectives.meanflow import MeanFlow
from training.objectives.tangents import Jvp
from training.optimizers import adamw
from training.randomness import Draws
from training.step import Step
from training.strategies import Replicated

BATCH, SEED = 12, 3
# name: mode, are the blocks recomputed, are gradients exchanged inside of the step's graph; that
# step is its first one, which is not recorded yet
SETTINGS = {
    "single": ("single", False, False),
    "double": ("double", True, False),
    "recorded": ("single", False, True),
}


def build(name):
    mode, recomputed, _ = SETTINGS[name]
    torch.manual_seed(SEED)
    net = DiT(sdpa, image_size=8, channels=1, num_classes=10, depth=2, width=32)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    if recomputed:
        checkpoint_blocks(net, "block")
    return net, MeanFlow(Jvp(mode), data_proportion=0.5)


class KeepGradients(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = [p.grad.clone() for p in module.net.parameters()]
        self.wrapped = isinstance(trainer.strategy.model, DistributedDataParallel)


def counts(module):
    """Samples with a derivative, of batches of several sizes."""
    x, y = module.trainer.datamodule.train
    samples = [module.sample((x[:size], y[:size]), 0) for size in (1, 3, 5, 7, 9)]
    return [int((s.r < s.t).sum()) for s in samples]


class Mixed(torch.nn.Module):
    """Weights of two dtypes, and one that no loss reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        linear = functools.partial(torch.nn.Linear, dtype=torch.float64)
        self.first, self.last, self.unused = linear(3, 5), linear(7, 2), linear(2, 2)
        self.middle = torch.nn.Linear(5, 7)

    def forward(self, x):
        middle = self.middle(self.first(x).tanh().float()).double()
        return self.last(middle.tanh()).square().mean()


def exchanged_in(parts, rank):
    """How many exchanges began in the backward pass, and the gradients after them all."""
    net = Mixed()
    gradients = SummedGradients(net, parts)
    (net(rows()[rank]) / gradients.size).backward()
    begun = len(gradients.begun)
    gradients.wait()
    return begun, [p.grad for p in net.parameters()]


def rows():
    torch.manual_seed(SEED)
    return torch.randn(2, 4, 3, dtype=torch.float64)


def work(rank, world, folder):
    results = {}
    for name, (_, _, graphs) in SETTINGS.items():
        keep = KeepGradients()
        trainer = Trainer(
            accelerator="cpu",
            strategy=Replicated() if graphs else "ddp",
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
        net, objective = build(name)
        adam = functools.partial(adamw, lr=1e-3)
        module = GenerativeModule(net, objective, adam, SEED, cuda_graphs=graphs)
        trainer.fit(module, datamodule=Digits(SEED, BATCH))
        weights = [p.detach() for p in net.parameters()]
        assert keep.wrapped != graphs
        assert not module.step.recorded  # a graph would keep the connection of the processes open
        if graphs:  # all processes replay the same kinds of steps, whatever the share of a batch
            results["alike"] = counts(module)
            module.step.exchange = None
            results["unlike"] = counts(module)
        results[name] = keep.gradients, weights, module.rows.known["train/error"]
    results["parts"] = [exchanged_in(parts, rank) for parts in (1, 8, 50)]
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def alone(name, rank):
    """Gradients and error of one rank's batch without any other process."""
    net, objective = build(name)
    data = Digits(SEED, BATCH)
    batch = next(iter(data.order(0, rank, 2)))
    x, y = data.read("train", batch)
    draws = Draws(SEED, 0, rank, 2)
    terms = objective.loss(net, objective.sample(x, y, net.null_label, draws))
    terms.loss.backward()
    return [p.grad for p in net.parameters()], float(terms.metrics["error"])


def test_a_mean_that_is_there_is_neither_summed_again_nor_lost():
    net = torch.nn.Linear(2, 1)
    step = Step(net, torch.nn.Module())
    step.exchange = SimpleNamespace(size=2, wait=lambda: None)
    net.bias.grad = torch.ones(1)
    for times in (1, 2):
        step.backward(4 * net.weight.sum())  # not of the bias
        assert torch.equal(net.weight.grad, torch.full((1, 2), 2.0 * times))
        assert torch.equal(net.bias.grad, torch.ones(1))


def test_a_graph_that_exchanges_is_of_the_same_kind_in_every_process(ranks):
    first, second = ranks
    assert first["alike"] == second["alike"]
    assert first["unlike"] != second["unlike"]  # together they have the exact share


def test_gradients_are_summed_in_any_number_of_parts(ranks):
    net = Mixed()
    torch.stack([net(x) for x in rows()]).mean().backward()
    for rank in ranks:
        begun, found = zip(*rank["parts"], strict=True)
        assert begun[0] < begun[1] < begun[2] == 6  # of six weights with a gradient
        for gradients in found:
            for got, p in zip(gradients, net.parameters(), strict=True):
                assert (got is None) == (p.grad is None)
                if got is not None:
                    torch.testing.assert_close(got, p.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_two_processes_have_the_gradients_of_one_on_the_joint_batch(ranks, name):
    (first, e0), (second, e1) = alone(name, 0), alone(name, 1)
    for rank in ranks:
        gradients, _, error = rank[name]
        for got, a, b in zip(gradients, first, second, strict=True):
            torch.testing.assert_close(got, (a + b) / 2, rtol=1e-4, atol=1e-6)
        assert error == pytest.approx((e0 + e1) / 2)
    apart = [float((a - b).norm() / (a + b).norm()) for a, b in zip(first, second, strict=True)]
    assert min(apart) > 1e-2  # unsynchronised gradients would be seen
    for a, b in zip(*(rank[name][1] for rank in ranks), strict=True):
        assert torch.equal(a, b)
