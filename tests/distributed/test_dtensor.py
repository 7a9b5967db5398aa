"""Two processes: attention of DTensors, sharded by batch, by heads or otherwise, is that of whole
tensors, with every derivative; by batch and heads nothing is gathered.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import local_map
from torch.func import jvp

from jvp_flash_attention import attention, attention_jvp
from tests.training.spawn import spawn

SIZE, ROOT = 2, Path(__file__).parents[2]
MESH = """
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from jvp_flash_attention import attention
distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
mesh = init_device_mesh("cpu", (4, 2))
def make(heads):
    x = torch.randn(1, heads // 2, 5, 16)
    return DTensor.from_local(x, mesh, [Shard(0), Shard(1)], run_check=False)
for heads in (8, 2):
    with CommDebugMode() as sent:
        out = attention(make(8), make(heads), make(heads), enable_gqa=True)
    print(sent.get_total_counts(), out.placements == (Shard(0), Shard(1)))
"""
# (heads of keys, mask's shape, sharding of q, of k and v, of the mask)
CASES = {
    "batch": (4, None, 0, 0, None),
    "heads": (4, None, 1, 1, None),
    "grouped heads": (2, (1, 4, 5, 7), 1, 1, 1),
    "one head of keys": (1, (2, 1, 1, 7), 1, None, None),
    "a mask of all": (4, (5, 7), 0, 0, None),
    "a mask by batch": (4, (2, 1, 5, 7), 0, 0, 0),
    "lengths": (4, None, 2, 2, None),  # gathered
    "heads that do not divide": (3, None, 1, 1, None),
}


def problem(name):
    Hk, mask, *dims = CASES[name]
    H = 3 if Hk == 3 else 4
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    shapes = [(2, H, 5, 6), (2, Hk, 7, 6), (2, Hk, 7, 3), *([mask] if mask else [])]
    dims = [dims[0], dims[1], dims[1], dims[2]]
    return [draw(*s) for s in shapes], [draw(*s) for s in shapes], dims


def results(x, t):
    """Value and gradients, then both outputs of the explicit form and gradients through them."""
    more = {"enable_gqa": True}
    mask, t_mask = (x[3], t[3]) if len(x) > 3 else (None, None)
    out = attention(*x[:3], mask, **more)
    plain = torch.autograd.grad((out * out).sum(), x)
    pair = attention_jvp(*x[:3], *t[:3], mask, t_attn_mask=t_mask, **more)
    both = torch.autograd.grad((pair[0] * pair[1]).sum(), [*x, *t])
    return [out, *plain, *pair, *both]


def by_local_map(x, t, place):
    """A jvp of local tensors: PyTorch makes no dual number of a DTensor."""
    q, k, v, t_q, t_k, t_v = [*x[:3], *t[:3]]
    tangent = lambda *x: jvp(attention, x[:3], x[3:])  # noqa: E731
    places = [[place]] * 6
    return local_map(tangent, ([place], [place]), places, device_mesh=q.device_mesh)(
        q, k, v, t_q, t_k, t_v
    )


def work(rank, size, folder):
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    found = {}
    for name in CASES:
        x, t, dims = problem(name)
        whole, t_whole = ([y.requires_grad_() for y in each] for each in (x, t))
        exact = results(whole, t_whole)

        def share(y, dim):
            place = Replicate() if dim is None else Shard(dim)
            return distribute_tensor(y.detach(), mesh, [place]).requires_grad_()

        x = [share(y, dim) for y, dim in zip(x, dims, strict=False)]
        t = [share(y, dim) for y, dim in zip(t, dims, strict=False)]
        got = results(x, t)
        assert all(isinstance(y, DTensor) for y in got)
        worst = max(
            float((a.full_tensor() - e).abs().max()) for a, e in zip(got, exact, strict=True)
        )
        if name == "batch":
            pairs = zip(by_local_map(x, t, Shard(0)), results(whole, t_whole)[4:6], strict=True)
            worst = max(worst, *(float((a.full_tensor() - e).abs().max()) for a, e in pairs))
        with CommDebugMode() as sent:
            attention(*x, enable_gqa=True)
        found[name] = worst, sent.get_total_counts(), str(got[0].placements)
    try:
        attention(*x[:3], dropout_p=0.5)
        found["dropout"] = "nothing was raised"
    except NotImplementedError as error:
        found["dropout"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtensor")
    spawn(work, SIZE, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


@pytest.mark.parametrize("name", CASES)
def test_a_dtensor_has_the_values_and_gradients_of_the_whole(processes, name):
    for error, sent, placements in (found[name] for found in processes):
        assert error < 1e-12
        if name != "lengths":
            assert sent == 0
            assert placements == f"(Shard(dim={CASES[name][2]}),)"
        else:
            assert sent > 0


def test_dropout_is_refused(processes):
    assert all("DTensors has no dropout" in found["dropout"] for found in processes)


def test_on_a_mesh_of_batch_and_heads_groups_of_heads_stay_where_they_are():
    done = subprocess.run([sys.executable, "-c", MESH], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split("\n")[:2] == ["0 True"] * 2, done.stderr
