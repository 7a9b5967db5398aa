"""Cached launches put the tensors of their own call in, and are kept only where that is safe."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from jvp_flash_attention.kernels import launch_cache

ROOT = Path(__file__).parents[1]


class Compiled(CompiledKernel):
    """A compiled kernel that notes its arguments."""

    function, packed_metadata, run, module = "handle", "metadata", None, None

    def __init__(self, log):
        self.log, self.run = log, self.launch

    def launch(self, x, y, z, stream, function, metadata, of_launch, enter, leave, *args):
        assert (stream, function, metadata) == (None, "handle", "metadata")
        assert of_launch is enter is leave is None
        self.log.append(("cached", (x, y, z), args))

    def __getitem__(self, grid):
        return lambda *args, stream: self.log.append(("watched", grid, args))


class Kernel:
    """Takes X, Y, D, number, SWITCH; notes ordinary launches and compiles."""

    arg_names = ("X", "Y", "D", "number", "SWITCH")

    def __init__(self):
        self.log = []

    def __getitem__(self, grid):
        def launch(*args, **switches):
            self.log.append(("ordinary", grid, args))
            return Compiled(self.log)

        return launch


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setattr(launch_cache, "_entries", {})
    kernel = Kernel()

    def call(x, y, key=("pass",)):
        def launches():
            descriptor = TensorDescriptor(y, list(y.shape), list(y.stride()), [1, 16])
            args = (x, (y, *y.stride()), descriptor, 7)
            yield launch_cache.Launch(kernel, (3,), args, {"SWITCH": True, "num_warps": 4})
            yield launch_cache.Launch(kernel, (0,), args, {})

        given = (x, None, y)
        of = launch_cache.key(key, given)
        if launch_cache.replay(of, given) is None:
            launch_cache.record(of, given, given, (), launches)
        return kernel.log[-1]

    call.log = kernel.log
    return call


def tensors():
    return torch.zeros(4, 16), torch.zeros(4, 16)


def test_the_second_call_launches_the_same_with_its_own_tensors(call):
    assert call(*tensors())[0] == "ordinary"
    x, y = tensors()
    how, grid, (X, Y, D, number, switch) = call(x, y)
    assert (how, grid, number, switch) == ("cached", (3, 1, 1), 7, True)
    assert (x.data_ptr(), (y.data_ptr(), 16, 1)) == (X, Y)
    assert D.base is y
    assert (D.shape, D.block_shape) == ([4, 16], [1, 16])
    assert len(call.log) == 2  # an empty grid is never launched


def test_a_profiler_is_told_of_cached_launches(call):
    call(*tensors())
    hooks = knobs.runtime.launch_enter_hook

    def listen(metadata):
        pass

    hooks.add(listen)
    try:
        assert call(*tensors())[0] == "watched"
    finally:
        hooks.remove(listen)
    assert call(*tensors())[0] == "cached"


def test_another_signature_or_key_is_prepared_anew(call):
    x, y = tensors()
    call(x, y)
    odd = torch.zeros(4 * 32 + 2)[2:]
    for other in (
        (x, torch.zeros(5, 16)),
        (x, torch.zeros(4, 32)[:, :16]),
        (x.half(), y),
        (odd[:64].view(4, 16), y),  # 8 bytes off
    ):
        assert call(*other)[0] == "ordinary"
    assert call(x, y, key=("another",))[0] == "ordinary"
    assert call(x, y)[0] == "cached"


def test_another_device_is_another_signature(call, monkeypatch):
    x, y = tensors()
    call(x, y)
    devices = {id(x): -1, id(y): 0}
    monkeypatch.setattr(torch.Tensor, "get_device", lambda t: devices[id(t)])
    assert call(x, y)[0] == "ordinary"
    assert call(x, y)[0] == "cached"


def test_one_tensor_in_two_places_is_not_kept(call):
    x, y = tensors()
    call(x, x)
    assert call(x, y)[0] == "ordinary"
    assert call(x, x)[2][0] == x.data_ptr()  # and may use the entry of two


def test_no_tensor_is_held_alive_and_the_number_of_entries_is_bounded(call, monkeypatch):
    monkeypatch.setattr(launch_cache, "MOST", 2)
    for n in range(1, 6):
        call(torch.zeros(n, 16), torch.zeros(n, 16))
    assert len(launch_cache._entries) <= 2
    for kept in launch_cache._entries.values():
        for plan in kept.launches:
            assert not any(
                isinstance(x, (torch.Tensor, tuple, TensorDescriptor)) for x in plan.args
            )


def test_an_instrumented_kernel_is_not_kept(call, monkeypatch):
    instrumented = type("run", (), {"profile_scratch_size": 8})()
    monkeypatch.setattr(Compiled, "__init__", lambda self, log: vars(self).update(run=instrumented))
    assert call(*tensors())[0] == "ordinary"
    assert call(*tensors())[0] == "ordinary"


def test_the_cache_can_be_switched_off_and_on(call, monkeypatch):
    monkeypatch.setattr(launch_cache, "_enabled", True)
    call(*tensors())
    launch_cache.enable(False)
    assert [call(*tensors())[0] for _ in range(2)] == ["ordinary"] * 2
    launch_cache.enable()
    assert [call(*tensors())[0] for _ in range(2)] == ["ordinary", "cached"]


def test_a_forked_process_begins_without_entries(call):
    call(*tensors())
    pid = os.fork()
    if pid == 0:
        os._exit(len(launch_cache._entries))
    assert os.waitpid(pid, 0)[1] == 0
    assert launch_cache._entries


def test_threads_share_entries(call):
    made = [tensors() for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: call(*pair), made))
    assert len(call.log) == len(made)
    launched = {args[0] if how == "cached" else args[0].data_ptr() for how, _, args in call.log}
    assert launched == {x.data_ptr() for x, _ in made}


UNKNOWN = """
import os, sys, traceback
import torch
import triton  # once, and not for every change

def check(change):
    exec(change)
    from jvp_flash_attention import attention_jvp
    from jvp_flash_attention.kernels import launch_cache
    assert not launch_cache.KNOWN
    q, t = torch.randn(2, 1, 1, 5, 8)
    for _ in range(2):
        out, t_out = attention_jvp(q, q, q, t, None, t, backend="triton")
        exact = attention_jvp(q, q, q, t, None, t, backend="reference")
        torch.testing.assert_close((out, t_out), exact)
    launch_cache.enable()
    assert not launch_cache._enabled and not launch_cache._entries

for change in sys.argv[1:]:
    if not os.fork():
        status = 1
        try:
            check(change)
            status = 0
        except BaseException:
            print(change, traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_without_a_name_or_a_known_version_of_triton_nothing_is_cached():
    changes = [
        "triton.__version__ = '3.99.0'",
        "import triton.compiler; del triton.compiler.CompiledKernel",
        "from triton import knobs; del type(knobs.runtime).launch_enter_hook",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = [sys.executable, "-c", UNKNOWN, *changes]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "0", "0"], done.stderr[-4000:]
