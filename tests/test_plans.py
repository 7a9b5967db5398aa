"""Prepared launches put the tensors of their own call in, and are kept only where that is safe."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from jvp_flash_attention.kernels import plans, recorder

nvidia = pytest.importorskip("triton.backends.nvidia.driver")


class Compiled(CompiledKernel):
    """A compiled kernel that notes its arguments."""

    function, packed_metadata, run, module = "handle", "metadata", None, None

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
    monkeypatch.setattr(plans, "_ready", {})
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
    assert (x.data_ptr(), (y.data_ptr(), 16, 1)) == (X, Y)
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


def test_another_device_is_another_signature(call, monkeypatch):
    x, y = tensors()
    call(x, y)
    devices = {id(x): -1, id(y): 0}
    monkeypatch.setattr(torch.Tensor, "get_device", lambda t: devices[id(t)])
    assert call(x, y)[0] == "ordinary"
    assert call(x, y)[0] == "planned"


def test_one_tensor_in_two_places_is_not_kept(call):
    x, y = tensors()
    call(x, x)
    assert call(x, y)[0] == "ordinary"
    assert call(x, x)[2][0] == x.data_ptr()  # and may use the plan of two


def test_no_tensor_is_held_alive_and_the_number_of_plans_is_bounded(call, monkeypatch):
    monkeypatch.setattr(plans, "MOST", 2)
    for n in range(1, 6):
        call(torch.zeros(n, 16), torch.zeros(n, 16))
    assert len(plans._plans) <= 2
    for kept in plans._plans.values():
        for plan in kept.plans:
            assert not any(
                isinstance(x, (torch.Tensor, tuple, TensorDescriptor)) for x in plan.args
            )


class Encoder:
    """Stands for the driver: counts the descriptors it encodes."""

    def __init__(self):
        self.made = []

    def encode(self, address, *_):
        self.made.append(address)
        return ("descriptor", address)

    fill_tma_descriptor = fill_tma_descriptor_tiled = encode


@pytest.fixture
def launcher(monkeypatch):
    """Triton's own launcher of a kernel with one descriptor, above a C function that takes note."""
    encoder, launched = Encoder(), []
    active = SimpleNamespace(utils=encoder)
    monkeypatch.setattr("triton.runtime.driver._active", active, raising=False)
    monkeypatch.setattr("triton.runtime.driver._default", active, raising=False)
    pointers = {0: "*fp32", 1: ("*fp32", "i32", "i32"), 2: "tensordesc<fp32[1, 16]>"}
    signature = {**pointers, 3: "i32", 4: "constexpr"}
    meta = {"swizzle": 3, "elem_size": 4, "elem_type": 8, "block_size": [1, 16]}
    meta["fp4_padded"] = False

    def c_function(*args):
        launched.append(args)

    run = object.__new__(nvidia.CudaLauncher)
    scratch = {"global_scratch_size": 0, "global_scratch_align": 1}
    scratch |= {"profile_scratch_size": 0, "profile_scratch_align": 1}
    run.__dict__.update(
        **scratch, num_ctas=1, launch_cooperative_grid=False, launch_pdl=False,
        arg_annotations=(), kernel_signature=b"", gsan_enabled=False,
        launch=nvidia.wrap_handle_tensordesc(c_function, signature, [meta]),
    )  # fmt: skip
    return SimpleNamespace(run=run, encoder=encoder, launched=launched)


@pytest.fixture
def recorded(call, launcher, monkeypatch):
    """`call` with a kernel that Triton's own launcher starts; gives what the C function got."""
    monkeypatch.setattr(Compiled, "launch", launcher.run)

    def recorded(x, y, stream=11):
        monkeypatch.setattr(plans, "_stream", lambda device: stream)
        before = len(launcher.launched)
        call(x, y)
        assert len(launcher.launched) - before == (0 if call.log[-1][0] == "watched" else 1)
        return launcher.launched[-1]

    call(*tensors())
    return recorded


def test_a_recorded_call_is_the_one_that_tritons_launcher_makes(recorded, launcher):
    x, y = tensors()
    first = recorded(x, y)
    descriptor = TensorDescriptor(y, list(y.shape), list(y.stride()), [1, 16])
    args = (x.data_ptr(), (y.data_ptr(), 16, 1), descriptor, 7, True)
    launcher.run(3, 1, 1, 11, "handle", "metadata", None, None, None, *args)
    assert launcher.launched[-1] == first
    assert any(("descriptor", y.data_ptr()) in (part, *_flat(part)) for part in first)


def _flat(x):
    return [y for part in x for y in (part, *_flat(part))] if isinstance(x, (tuple, list)) else []


def test_the_same_addresses_again_need_no_descriptor(recorded, launcher):
    x, y = tensors()
    first = recorded(x, y)
    made = len(launcher.encoder.made)
    assert recorded(x, y) == first
    assert len(launcher.encoder.made) == made
    other = torch.zeros(4, 16)
    assert recorded(x, other) != first
    assert launcher.encoder.made[made:] == [other.data_ptr()]
    assert recorded(x, y) == first


def test_another_stream_is_another_call(recorded):
    x, y = tensors()
    assert 11 in recorded(x, y)
    assert 12 in recorded(x, y, stream=12)
    assert 11 in recorded(x, y)


def test_a_profiler_is_told_of_recorded_calls_too(recorded, call):
    x, y = tensors()
    recorded(x, y)
    hooks = knobs.runtime.launch_enter_hook

    def listen(metadata):
        pass

    hooks.add(listen)
    try:
        assert call(x, y)[0] == "watched"
    finally:
        hooks.remove(listen)


def test_recorded_calls_hold_no_tensor(recorded):
    recorded(*tensors())
    for calls in plans._ready.values():
        for part in _flat(calls):
            assert not isinstance(part, (torch.Tensor, TensorDescriptor))


@pytest.mark.usefixtures("recorded")
def test_recorded_calls_are_bounded_over_all_signatures(call, monkeypatch):
    monkeypatch.setattr(plans, "READY", 3)
    sizes = [n for n in range(1, 6) for _ in range(4)]
    alive = [(torch.zeros(n, 16), torch.zeros(n, 16)) for n in sizes]
    for x, y in alive:
        call(x, y)
        assert len(plans._ready) <= 3
    assert plans._ready


def test_calls_of_forgotten_launches_are_never_made(recorded, call, launcher):
    x, y = tensors()
    recorded(x, y)
    plans._plans.clear()
    made = len(launcher.encoder.made)
    assert call(x, y)[0] == "ordinary"
    recorded(x, y)
    assert len(launcher.encoder.made) == made + 1


def test_a_launcher_that_makes_no_call_repeats_none(recorded, call, launcher, monkeypatch):
    alive = [tensors(), tensors()]
    recorded(*alive[0])
    made, before = len(launcher.launched), dict(plans._ready)
    monkeypatch.setattr(nvidia.CudaLauncher, "__call__", lambda *args: None)
    call(*alive[1])
    assert len(launcher.launched) == made
    assert plans._ready == before


def test_an_instrumented_kernel_is_not_kept(call, launcher, monkeypatch):
    monkeypatch.setattr(Compiled, "launch", launcher.run)
    launcher.run.profile_scratch_size = 8
    assert call(*tensors())[0] == "ordinary"
    assert call(*tensors())[0] == "ordinary"
    assert not launcher.launched


@pytest.mark.parametrize("name", ["global_scratch_size", "profile_scratch_size", "gsan_enabled"])
def test_a_launch_with_memory_of_its_own_is_not_recorded(launcher, name):
    assert recorder.recorder(launcher.run) is not None
    setattr(launcher.run, name, 8)
    assert recorder.recorder(launcher.run) is None


def test_an_unknown_launcher_is_not_recorded(launcher):
    launcher.run.launch = lambda *args: None
    assert recorder.recorder(launcher.run) is None
    assert recorder.recorder(lambda *args: None) is None
