"""Four processes that share sequences: gradients are those of whole sequences in one process."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer
from omegaconf import OmegaConf

import jvp_flash_attention
from tests.training.spawn import spawn
from training.activation_checkpointing import checkpoint_blocks
from training.attentions import sdpa
from training.build import build_context
from training.context_parallel import ContextParallel, _backend, data_place, whole_sequences
from training.data.synthetic import Blobs
from training.models.dit import DiT
from training.module import GenerativeModule
from training.objectives.meanflow import MeanFlow
from training.objectives.tangents import Jvp
from training.objectives.tvm import TVM
from training.optimizers import adamw
from training.randomness import Draws
from training.samplers.generate import generate
from training.samplers.meanflow import MeanFlowSampler
from training.strategies import Sharded

SEED, BATCH, WORLD = 3, 3, 4
ROPE_1D = {"positions": "rope_1d", "label_tokens": 2}
# name: (kind, size), objective, options of the network, is the network sharded
CASES = {
    "two rings": (("ring", 2), "meanflow", {}, False),
    "heads of all": (("ulysses", None), "meanflow", {"positions": "rope"}, False),
    "both": (("2d", [2, 2]), "meanflow", ROPE_1D, False),
    "through the tangent": (("ring", 2), "tvm", {"cross_tokens": 2}, False),
    "sharded weights": (("ulysses", 2), "meanflow", {"second_head": 1}, True),
}


def build(name):
    """Tokens of 5 x 5 patches: no number of processes divides them."""
    context, objective, options, sharded = CASES[name]
    torch.manual_seed(SEED)
    net = DiT(jvp_flash_attention.attention, 10, 1, 4, depth=2, width=32, heads=4, **options)
    net = net if sharded else net.double()  # Lightning shards in single precision alone
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    if sharded:
        checkpoint_blocks(net, "block")
    loss = MeanFlow(Jvp("single"), data_proportion=0.5) if objective == "meanflow" else TVM()
    return net, loss, ContextParallel(*context), sharded


class Keep(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
        gradients = (p.grad for p in module.net.parameters())
        self.gradients = [None if g is None else whole(g) for g in gradients]


def work(rank, world, folder):
    results = {}
    for name in CASES:
        net, objective, context, sharded = build(name)
        keep = Keep()
        trainer = Trainer(
            accelerator="cpu",
            strategy=Sharded() if sharded else "ddp_find_unused_parameters_true",
            devices=world,
            max_steps=1,
            max_epochs=-1,
            precision="32-true" if sharded else "64-true",
            log_every_n_steps=1,
            use_distributed_sampler=False,
            logger=False,
            callbacks=[keep],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        optimizer = partial(adamw, lr=1e-3)
        module = GenerativeModule(net, objective, optimizer, SEED, context=context)
        trainer.fit(module, datamodule=Blobs(SEED, BATCH, tokens=25, channels=1, num_classes=4))
        results[name] = keep.gradients, module.rows.known["train/loss"]
        if rank == 0 and not sharded:  # the other processes draw nothing
            images = generate(net, MeanFlowSampler(), torch.arange(4), (1, 10, 10), seed=0)
            assert images.isfinite().all()
    if rank in (0, world - 1):
        torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, WORLD, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, WORLD - 1)]


def alone(name, rank, world):
    """Gradients and loss of the batch of one group, whole sequences in one process."""
    net, objective, _, sharded = build(name)
    data = Blobs(SEED, BATCH, tokens=25, channels=1, num_classes=4)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=0, accumulate_grad_batches=1, global_rank=rank, world_size=world,
        lightning_module=None,
    )  # fmt: skip
    x, y = next(iter(data.train_dataloader()))
    draws = Draws(SEED, 0, rank, world, alike=sharded)
    dtype = next(net.parameters()).dtype
    objective.setup(net)
    objective.on_fit_start(torch.empty(0, dtype=dtype))
    torch.set_default_dtype(dtype)  # as Lightning's precision does, and the draws have it
    try:
        sample = objective.sample(x.to(dtype), y, net.null_label, draws)
    finally:
        torch.set_default_dtype(torch.float32)
    loss = objective.loss(net, sample).loss
    loss.backward()
    return [p.grad for p in net.parameters()], loss.item()


@pytest.mark.parametrize("name", list(CASES))
def test_gradients_are_those_of_whole_sequences(ranks, name):
    groups = WORLD // ContextParallel(*CASES[name][0]).size(WORLD)
    tolerance = 1e-5 if CASES[name][3] else 1e-12
    gradients, losses = zip(*(alone(name, i, groups) for i in range(groups)), strict=True)
    for rank in ranks:
        found, loss = rank[name]
        assert loss == pytest.approx(sum(losses) / groups, rel=1e-6)  # logged in single precision
        for got, *parts in zip(found, *gradients, strict=True):
            if parts[0] is None:
                assert got is None or not got.any()
                continue
            exact = sum(parts) / groups
            assert float((got - exact).norm()) <= tolerance * float(exact.norm() + 1e-9)


def test_groups_see_batches_of_their_own():
    def place(rank, context):
        module = SimpleNamespace(context=context)
        return data_place(SimpleNamespace(global_rank=rank, world_size=8, lightning_module=module))

    fours = ContextParallel("ring", 4)
    assert [place(rank, fours) for rank in (0, 3, 4)] == [(0, 2), (0, 2), (1, 2)]
    assert place(5, ContextParallel("ulysses")) == (0, 1)
    assert place(5, None) == (5, 8)


def test_wrong_settings_are_one_line():
    for context, error, says in (
        (lambda: ContextParallel("rings"), ValueError, "context_parallel must be one of"),
        (lambda: ContextParallel("2d", 4), ValueError, r"two numbers \[ring, ulysses\]"),
        (lambda: ContextParallel("ring", [2, 2]), TypeError, "must be an integer or null"),
        (lambda: ContextParallel("ring", 0), ValueError, "context_size"),
        (lambda: ContextParallel("ring", 3).size(4), ValueError, "must divide the number of proc"),
        (lambda: ContextParallel("ring").start([], "cpu"), ValueError, "two processes or more"),
    ):
        with pytest.raises(error, match=says):
            context()
    config = OmegaConf.create({"context_parallel": "2d", "context_size": [2, 1]})
    context = build_context(config)
    assert context is not None
    assert context.size(4) == 2


def test_what_cannot_share_a_sequence_is_refused():
    for net, says in (
        (torch.nn.Linear(1, 1), "tokens of a DiT"),
        (DiT(sdpa, 8, 1, 4, width=32, heads=4), "this project's attention"),
    ):
        with pytest.raises(NotImplementedError, match=says):
            ContextParallel("ring").start([net], "cpu")


def test_whole_sequences_are_for_the_block_alone():
    net = DiT(sdpa, 8, 1, 4, width=32, heads=4)
    net.sequence = "shards"
    with whole_sequences(net):
        assert net.sequence is None
    assert net.sequence == "shards"


def test_what_shards_would_leave_out_of_the_attention_is_refused():
    build = lambda **given: DiT(  # noqa: E731
        partial(jvp_flash_attention.attention, **given), 4, 1, 4, depth=1, width=16, heads=2
    )
    assert _backend(build()) is None
    assert _backend(build(backend="reference")) == "reference"
    with pytest.raises(NotImplementedError, match=r"attention\.softcap"):
        _backend(build(softcap=30.0))
