"""Four processes: value, tangent and all gradients of sharded sequences are dense attention's."""

import re

import pytest
import torch

from tests.distributed import workers
from tests.training.spawn import spawn as start

EXACT = 1e-12  # float64, O(1) numbers


def spawn(work, size, folder, *arguments):
    """What each of `size` processes found."""
    start(work, size, str(folder), *arguments)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawn(workers.work, workers.SIZE, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", workers.calls())
def test_shards_of_sequences_give_dense_attention(processes, name):
    for rank, found in enumerate(processes):
        assert isinstance(found[name], dict), f"process {rank}: {found[name]}"
        assert {"out", "t_out", "d_q", "d_k", "d_v"} < found[name].keys()
        bad = {what: error for what, error in found[name].items() if not error <= EXACT}
        assert not bad, f"process {rank}"


@pytest.mark.parametrize("mesh", workers.SECOND_ORDER)
def test_second_derivatives_are_those_of_dense_attention(processes, mesh):
    for rank, found in enumerate(processes):
        found = found[f"second order {mesh}"]
        assert isinstance(found, dict), f"process {rank}: {found}"
        assert len(found) == (7 if mesh.startswith("ring") else 6)
        bad = {what: error for what, error in found.items() if not error <= EXACT}
        assert not bad, f"process {rank}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uneven", r"ValueError: ring_attention.* called alike on all processes.*lengths"),
        ("uneven ulysses", r"ValueError: ulysses_attention.* alike on all processes.*lengths"),
        ("flags", r"ValueError: ring_attention.* called alike on all processes.*causal"),
        ("scale", r"ValueError: ulysses_attention.* called alike on all processes.*scale"),
        ("causal cross", r"ValueError: .*is_causal needs queries and keys of one length"),
        ("layout", r"ValueError: .*query must hold 4 of 16 rows in the layout 'zigzag', got 3"),
        ("dropout", r"NotImplementedError: .* no dropout, got dropout_p=0.1"),
        ("floating mask", r"NotImplementedError: .* bool attn_mask of the keys, got torch.float32"),
        ("mask with rows", r"NotImplementedError: .* of the keys, got \(4, 4\)"),
        ("whole mask", r"ValueError: .* sharded with the keys, \(..., 4\), got \(16,\)"),
        ("heads", r"ValueError: .* heads divisible by its 4 processes, got 3"),
        ("vmap", r"NotImplementedError: ulysses_attention has no vmap"),
        ("jvp of jvp", r"NotImplementedError: jvp of a jvp"),
        ("mesh", r"ValueError: .* needs a mesh with 2 dimensions, got 1"),
        ("kind", r"ValueError: kind must be one of .*, got 'star'"),
        ("ulysses zigzag", r"ValueError: .* needs the layout 'contiguous', got 'zigzag'"),
        ("unshard", r"NotImplementedError: unshard has no derivative"),
    ],
)
def test_what_cannot_be_is_said_on_every_process(processes, name, message):
    for found in processes:
        assert re.match(message, found["failures"][name]), found["failures"][name]


@pytest.mark.compile
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # this one checks strides
)
def test_compiled_steps_have_the_gradients_of_eager_ones(tmp_path, backend):
    for found in spawn(workers.work_compiled, 2, tmp_path, backend):
        assert isinstance(found, dict), found
        for function in ("ring_attention", "ulysses_attention"):
            assert "context_parallel_attention(mesh, kind)" in found.pop(function)
        assert len(found) == 4
        assert max(found.values()) <= EXACT, found
