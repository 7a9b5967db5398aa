"""Sharded networks: each step is that of one process on the joint batch."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from tests.training.spawn import spawn
from training.activation_checkpointing import checkpoint_blocks
from training.attentions import sdpa
from training.models.dit import DiT
from training.models.layers import Block
from training.objectives.imf import IMF
from training.objectives.meanflow import MeanFlow
from training.objectives.scm import SCM
from training.objectives.tangents import Jvp
from training.objectives.tvm import TVM
from training.randomness import Draws
from training.sharding import beside, copy_whole, exchanged, shard, units, weights_of, whole
from training.step import compile_blocks, teachers

B, SEED = 4, 3  # examples of a process
NETS = {"imf": {"guided": True, "second_head": 1, "depth": 3}, "scm": {"log_variance": True}}
OBJECTIVES = {
    "meanflow": lambda: MeanFlow(Jvp("single"), data_proportion=0.5, omega=2.0, kappa=0.5),
    "double": lambda: MeanFlow(Jvp("double"), data_proportion=0.5),
    "tvm": lambda: TVM(omega=2.0),
    "imf": lambda: IMF(Jvp("single")),
    "scm": lambda: SCM(Jvp("single")),
}

# All with two processes; with four, where a hybrid mesh has two dimensions, the one with a teacher.
CASES = [*((2, name) for name in OBJECTIVES), (4, "tvm")]
VARIANTS = (
    ("fsdp", "meanflow recomputed"),
    ("fsdp", "scm compiled"),
    ("fsdp", "imf in units"),
    ("hybrid", "tvm in units"),
)
SLOW = ("fsdp", "tvm compiled")


def build(name):
    torch.manual_seed(SEED)
    net = DiT(sdpa, 8, 1, 10, **{"depth": 2, "width": 32} | NETS.get(name, {})).double()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    objective = OBJECTIVES[name]()
    objective.setup(net)
    return net, objective


def samples(name, n):
    """n times B of them, drawn by each rank."""
    for rank in range(n):
        draws = Draws(SEED, 0, rank, n, alike=True)
        x = torch.rand(B, 1, 8, 8, generator=draws("images"), dtype=torch.float64)
        sample = OBJECTIVES[name]().sample(x, torch.arange(B), 10, draws)
        double = lambda a: a.double() if a.is_floating_point() else a  # noqa: E731
        yield tree_map_only(torch.Tensor, double, sample)


class Loss(torch.nn.Module):
    """What DDP wraps."""

    def __init__(self, net, objective):
        super().__init__()
        self.net, self.objective = net, objective

    def forward(self, sample):
        return self.objective.loss(self.net, sample).loss


def gradients(net):
    return {n: whole(p.grad).clone() for n, p in net.named_parameters() if p.grad is not None}


def work(rank, world, folder, slow):
    distributed.init_process_group("gloo")
    meshes = {"fsdp": (world,), "hybrid": (world, 1) if world == 2 else (2, world // 2)}
    results = {}
    for name in (name for processes, name in CASES if processes == world):
        sample = list(samples(name, world))[rank]
        net, objective = build(name)
        ddp = DistributedDataParallel(Loss(net, objective))
        ddp(sample).backward()
        results[name, "ddp"] = gradients(net)
        for kind, shape in meshes.items():
            names = ("replicate", "shard")[-len(shape) :]
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for variant in ("", " recomputed", " compiled", " in units"):
                chosen = (SLOW,) if slow else VARIANTS
                if variant and (world > 2 or (kind, name + variant) not in chosen):
                    continue
                net, objective = build(name)
                if variant == " recomputed":
                    checkpoint_blocks(net, "block")
                if rank:  # only the first process has weights
                    net.to("meta"), objective.to("meta")
                for part in (net, *teachers(objective)):
                    shard(part, mesh, least=2**40 if variant == " in units" else 0)
                    if variant == " compiled":
                        compile_blocks(part, backend="aot_eager")
                Loss(net, objective)(sample).backward()
                results[name, kind + variant] = gradients(net)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


MORE = [pytest.param(more, marks=pytest.mark.slow) for more in (4, "slow")]


@pytest.fixture(scope="module", params=[2, *MORE])
def ranks(request, tmp_path_factory):
    folder, slow = tmp_path_factory.mktemp("ranks"), request.param == "slow"
    world = 2 if slow else request.param
    spawn(work, world, str(folder), slow)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def test_gradients_are_those_of_one_process_on_all_batches(ranks):
    """One test, so that no second worker starts the processes anew."""
    for name in (name for processes, name in CASES if processes == len(ranks)):
        net, objective = build(name)
        losses = [objective.loss(net, sample).loss for sample in samples(name, len(ranks))]
        torch.stack(losses).mean().backward()
        expected = gradients(net)
        kinds = [kind for of, kind in ranks[0] if of == name]
        assert {"ddp", "fsdp", "hybrid"} <= set(kinds)
        for rank in ranks:
            for kind in kinds:
                found = rank[name, kind]
                assert found.keys() == expected.keys()
                for weight, gradient in expected.items():
                    error = (found[weight] - gradient).norm() / (gradient.norm() + 1e-300)
                    assert error < 1e-12, (name, kind, weight, float(error))
                    alone = rank[name, kind.removesuffix(" in units")]
                    assert torch.equal(found[weight], alone[weight])
        for weight, gradient in expected.items():
            assert gradient.any(), (name, weight)


def test_units_are_consecutive_blocks_that_a_second_head_does_not_leave_half_way():
    def sizes(least, **options):
        net = DiT(sdpa, 8, 1, 10, width=32, **options)
        blocks = [m for m in net.modules() if isinstance(m, Block)]
        assert [block for unit in units(net, least) for block in unit] == blocks
        return [len(unit) for unit in units(net, least)]

    block = weights_of(DiT(sdpa, 8, 1, 10, depth=1, width=32).blocks)
    assert sizes(0, depth=5) == [1, 1, 1, 1, 1]
    assert sizes(block, depth=5) == [1, 1, 1, 1, 1]
    assert sizes(block + 1, depth=5) == [2, 2, 1]
    assert sizes(2**40, depth=5) == [5]
    assert sizes(2**40, depth=5, second_head=2) == [3, 2, 2]
    assert sizes(2**40, depth=5, second_head=0) == [5]


@pytest.fixture
def mesh():
    """Of this process alone."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def rounded_step(net):
    """Gradients of a step under autocast, and the dtypes of times, sinusoids and their tangents."""
    z, t, seen = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), torch.tensor([0.3, 0.8]), []

    def look(module, arguments, output=None):
        seen.extend(x.dtype for x in (*arguments[0][:2], *(output or ())[:2]))

    net.time.register_forward_pre_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = (z, t, t / 2, torch.arange(2))
        u, du = Jvp("single")(net, inputs, (torch.ones_like(z), torch.ones_like(t), None, None))
        (u - 1 + du).square().mean().backward()
    return [u.detach(), du, *gradients(net).values()], set(seen)


def test_half_precision_is_that_of_autocast_and_times_stay_float32(mesh):
    net = build("meanflow")[0].float()
    other, _ = build("meanflow")
    shard(other.float(), mesh, torch.bfloat16)
    (expected, _), (found, dtypes) = rounded_step(net), rounded_step(other)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    assert dtypes == {torch.float32}


def test_a_fused_optimizer_skips_a_step_of_shards(mesh):
    net, _ = build("meanflow")
    shard(net, mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    before = [whole(p.detach()).clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    first = next(net.parameters())
    for found in (1.0, 0.0):
        optimizer.found_inf = beside(torch.tensor(found), first)
        optimizer.step()
        now = [whole(p.detach()) for p in net.parameters()]
        assert [torch.equal(a, b) for a, b in zip(before, now, strict=True)] == [
            found == 1.0
        ] * len(now)


def test_weights_are_exchanged_and_come_back_and_a_copy_is_whole(mesh):
    net, _ = build("meanflow")
    plain = {name: p.detach().clone() for name, p in net.named_parameters()}
    shard(net, mesh)
    others = {name: p.detach() + 1 for name, p in net.named_parameters()}
    z, t, y = torch.ones(1, 1, 8, 8).double(), torch.ones(1).double(), torch.zeros(1, dtype=int)
    with torch.no_grad():
        own = net(z, t, t, y)
        with exchanged(net, others):
            changed = net(z, t, t, y)
        assert torch.equal(net(z, t, t, y), own)
    assert not torch.equal(changed, own)
    copied = copy_whole(net, net.modules(), {id(p): plain[n] for n, p in net.named_parameters()})
    assert type(copied) is DiT
    assert not any("FSDP" in type(module).__name__ for module in copied.modules())
    with torch.no_grad():
        assert torch.equal(copied(z, t, t, y), own)
