"""Prepared launches put the tensors of their own call in, and are kept only where that is safe."""

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from jvp_flash_attention.kernels import plans


class Compiled(CompiledKernel):
    """A compiled kernel that notes its arguments."""

    function, packed_metadata, run = "handle", "metadata", None

    def __init__(self, log):
        self.log, self.run = log, self.launch

    def launch(self, x, y, z, stream, function, metadata, of_launch, enter, leave, *args):
        assert (stream, function, metadata) == (11, "handle", "metadata")
        assert of_launch is enter is leave is None
        self.log.append(("planned", (x, y, z), args))

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
    monkeypatch.setattr(plans, "_plans", {})
    monkeypatch.setattr(plans, "_stream", lambda device: 11)
    kernel = Kernel()

    def call(x, y, key=("pass",)):
        def launches():
            descriptor = TensorDescriptor(y, list(y.shape), list(y.stride()), [1, 16])
            args = (x, (y, *y.stride()), descriptor, 7)
            yield plans.Launch(kernel, (3,), args, {"SWITCH": True, "num_warps": 4})
            yield plans.Launch(kernel, (0,), args, {})

        plans.run(key, (x, None, y), (), launches)
        return kernel.log[-1]

    call.log = kernel.log
    return call


def tensors():
    return torch.zeros(4, 16), torch.zeros(4, 16)


def test_the_second_call_launches_the_same_with_its_own_tensors(call):
    assert call(*tensors())[0] == "ordinary"
    x, y = tensors()
    how, grid, (X, Y, D, number, switch) = call(x, y)
    assert (how, grid, number, switch) == ("planned", (3, 1, 1), 7, True)
    assert X is x
    assert Y[0] is y
    assert Y[1:] == (16, 1)
    assert D.base is y
    assert (D.shape, D.block_shape) == ([4, 16], [1, 16])
    assert len(call.log) == 2  # an empty grid is never launched


def test_a_profiler_is_told_of_planned_launches(call):
    call(*tensors())
    hooks = knobs.runtime.launch_enter_hook

    def listen(metadata):
        pass

    hooks.add(listen)
    try:
        assert call(*tensors())[0] == "watched"
    finally:
        hooks.remove(listen)
    assert call(*tensors())[0] == "planned"


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
    assert call(x, y)[0] == "planned"


def test_one_tensor_in_two_places_is_not_kept(call):
    x, y = tensors()
    call(x, x)
    assert call(x, y)[0] == "ordinary"
    assert call(x, x)[2][0] is x  # and may use the plan of two


def test_no_tensor_is_held_alive_and_the_number_of_plans_is_bounded(call, monkeypatch):
    monkeypatch.setattr(plans, "MOST", 2)
    for n in range(1, 6):
        call(torch.zeros(n, 16), torch.zeros(n, 16))
    assert len(plans._plans) <= 2
    for kept in plans._plans.values():
        for plan in kept:
            assert not any(
                isinstance(x, (torch.Tensor, tuple, TensorDescriptor)) for x in plan.args
            )
