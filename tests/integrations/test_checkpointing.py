"""Activation checkpointing, whole and selective, and FSDP2, as docs/integrations.md tells them: the
page's own code, its gradients against the same network without it."""

import copy
from functools import partial

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.func import jvp
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from jvp_flash_attention import attention, reference
from jvp_flash_attention.override import sdpa_override
from tests.cases import close
from tests.integrations.test_page import namespace_of

BLOCKS, WIDTH = 3, 8


class Block(nn.Module):
    def __init__(self, attend=attention) -> None:
        super().__init__()
        self.qkv, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend = attend

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        x = x + self.attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.mlp(F.gelu(x))


class Net(nn.Module):
    """A jvp a block."""

    def __init__(self, attend=attention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(attend) for _ in range(BLOCKS)).double()

    def forward(self, x, t_x, run=lambda block, x, t_x: jvp(block, (x,), (t_x,))):
        for block in self.blocks:
            x, t_x = run(block, x, t_x)
        return x, t_x


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def batch(B=2):
    torch.manual_seed(1)
    return torch.randn(2, B, 5, WIDTH, dtype=torch.float64).unbind(0)


def grads(net, *outputs):
    loss = sum(x.square().sum() for x in outputs)
    return torch.autograd.grad(loss, list(net.parameters()))


@pytest.fixture
def passes(monkeypatch):
    """Names of the passes that reach the reference, in order."""
    seen, run = [], reference.forward

    def spy(x, t, spec):
        seen.append("forward" if t is None else "forward_jvp")
        return run(x, t, spec)

    monkeypatch.setattr(reference, "forward", spy)
    return seen


PAGE = partial(namespace_of, "Checkpointing")


def test_the_override_is_on_again_while_activations_are_recomputed(passes):
    """`checkpointed` of the page, backward inside the block and after it."""
    x, _ = batch()
    block = Net(sdpa).blocks[0]
    exact = grads(block, block(x))
    checkpointed = PAGE()["checkpointed"]
    for inside in (True, False):
        passes.clear()
        with sdpa_override():
            out = checkpointed(block, x)
            got = grads(block, out) if inside else None
        got = got or grads(block, out)
        assert passes == ["forward", "forward"]  # once, and once recomputed
        for g, e in zip(got, exact, strict=True):
            close(g, e)


def test_a_jvp_a_block_is_checkpointed_with_its_tangent(passes):
    net, (x, t_x) = Net(), batch()
    exact = grads(net, *net(x, t_x))
    passes.clear()
    block_jvp = PAGE()["block_jvp"]
    outputs = net(x, t_x, block_jvp)
    assert passes == ["forward_jvp"] * BLOCKS
    for g, e in zip(grads(net, *outputs), exact, strict=True):
        close(g, e)
    assert passes == ["forward_jvp"] * 2 * BLOCKS


def test_a_list_that_looks_for_flash_attn_saves_attention(passes):
    net, (x, t_x) = Net(), batch()
    exact = grads(net, *net(x, t_x))
    passes.clear()
    outputs = net(x, t_x, PAGE()["selective"])
    for g, e in zip(grads(net, *outputs), exact, strict=True):
        close(g, e)
    assert passes == ["forward_jvp"] * BLOCKS  # nothing of attention is run again


def test_without_gradient_the_jvp_of_a_checkpointed_network_is_right():
    """The `double` mode of trainers: du/dt under no_grad, then a checkpointed forward."""
    x, t_x = batch()
    net = Net()
    run = lambda x: checkpoint(net.blocks[0], x, use_reentrant=False)  # noqa: E731
    exact = jvp(net.blocks[0], (x,), (t_x,))
    with torch.no_grad():
        for got, e in zip(jvp(run, (x,), (t_x,)), exact, strict=True):
            close(got, e)
    for got, e in zip(grads(net.blocks[0], run(x)), grads(net.blocks[0], exact[0]), strict=True):
        close(got, e)


def _sharded(rank, world, file):
    """Gradients of half a batch in each process, over sharded blocks, against the whole batch: the
    tangent as a target and differentiated."""
    torch.set_num_threads(1)
    where = {"init_method": f"file://{file}", "rank": rank, "world_size": world}
    distributed.init_process_group("gloo", **where)
    shard_blocks = namespace_of("FSDP2")["shard_blocks"]
    x, t_x = batch(world)
    alone = Net()
    mine = slice(rank, rank + 1)
    for keep in (lambda t: t.detach(), lambda t: t):
        out, t_out = alone(x, t_x)
        exact = grads(alone, out, keep(t_out))
        net = shard_blocks(copy.deepcopy(alone))
        out, t_out = net(x[mine], t_x[mine])
        (out.square().sum() + keep(t_out).square().sum()).backward()
        for p, e in zip(net.parameters(), exact, strict=True):
            close(p.grad.full_tensor() * world, e)  # FSDP takes the mean
    distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_blocks_with_a_jvp_each_have_the_gradients_of_one_process(tmp_path):
    multiprocessing.spawn(_sharded, (2, tmp_path / "rendezvous"), nprocs=2)
