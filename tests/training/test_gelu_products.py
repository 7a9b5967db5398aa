"""Products with GELU behind them: the kernel for Hopper, compiled without one and run on one. That
all ways are the same MLP is tested in test_mlp.py.
"""

import threading

import pytest
import torch
from torch.nn import functional

from jvp_flash_attention import attention
from tests.compiling import compiling
from training.kernels import gelu_products
from training.models.dit import DiT
from training.objectives.meanflow import MeanFlow
from training.step import Step


def error(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("steps", [*range(gelu_products.LEAST, 40), 128])
def test_pauses_follow_each_other_and_the_second_warpgroup_can_begin(steps):
    pauses = gelu_products._pauses(steps)
    for each in pauses:
        assert list(each) == sorted(each)
        assert each[0] >= 1
        assert each[2] <= steps
    assert pauses[0][0] < gelu_products.LEAST  # slots of the weight, which wait for both


def test_only_what_lies_in_rows_is_served(monkeypatch):
    monkeypatch.setattr(gelu_products, "architecture", lambda device: "sm90")
    monkeypatch.setattr(gelu_products, "multiprocessors", lambda device: 1)

    class OnGpu(torch.Tensor):
        is_cuda = True

    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype).as_subclass(OnGpu)

    x, A, z = new(4, 256, 384), new(128, 384), new(4, 256, 128)
    assert gelu_products._serves(x, A, z)
    assert gelu_products._serves(x, new(384, 128), z)
    assert not gelu_products._serves(x, new(384, 128).mT, z)
    assert not gelu_products._serves(x, A, z.transpose(0, 1))
    assert not gelu_products._serves(x[:2], A, z[-2:])  # too few
    assert not gelu_products._serves(new(4, 256, 320), new(128, 320), z)
    assert not gelu_products._serves(x.half(), A.half(), z.half())
    assert not gelu_products._serves(x, A.float(), z)
    assert not gelu_products._serves(x, new(2, 64 * 384 + 1).view(-1)[1:-1].view(128, 384), z)


OFFLINE = """
import torch
from triton.runtime import driver
from tests import offline
from training.kernels import gelu_products
from training.kernels.gelu_products import launch

from training.kernels.sm90.gelu_product import STAGES_W

assert STAGES_W.value == gelu_products.LEAST
driver.set_active(offline._Driver(offline.TARGETS["sm_90"]))
new = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)
x, A, B, z = new(2, 256, 456), new(264, 456), new(456, 264), new(2, 256, 264)
for given in (
    dict(weight=A),
    dict(weight=B, sums=torch.zeros(16, 264), transposed=False),
    dict(weight=B, transposed=False),
):
    out = new(2, 256, 264)
    made = launch(x, z=z, out=out, **given)
    bases = [getattr(arg, "base", arg) for arg in made.args]
    for tensor in (x, z, out, *given.values()):  # themselves, as the cache of launches wants them
        assert isinstance(tensor, bool) or sum(base is tensor for base in bases) == 1
    found = made.compile()
    # what is compiled ahead is what is launched later
    bias, transposed = "sums" in given, given.get("transposed", True)
    ahead = gelu_products._compile(456, 264, torch.device("cpu"), bias, transposed)
    assert ahead is found
    print(*offline._inspect("gelu", found)[1:])
"""


def test_it_compiles_for_hopper():
    found = [list(map(int, line.split())) for line in compiling("-c", OFFLINE).splitlines()]
    assert len(found) == 3
    for registers, stack, shared, products, _, mixed, reused in found:
        assert registers <= 168  # of each of 384 threads at the start
        assert stack <= 16
        assert shared <= 227 * 1024
        assert products > 0
        assert (mixed, reused) == (0, 0)


def test_it_is_compiled_ahead_in_threads_and_awaited(monkeypatch):
    begun, done = threading.Event(), []

    def compile(*args):
        begun.wait(10)
        done.append(args)
        raise RuntimeError("said where it is compiled again")

    monkeypatch.setattr(gelu_products, "_compile", compile)
    monkeypatch.setattr(gelu_products, "architecture", lambda device: "sm90")
    gpu = torch.device("cuda", 0)
    for width, device in ((64, gpu), (768, torch.device("cpu"))):  # not served
        gelu_products.compile_ahead(width, 3072, True, device)
    assert not gelu_products._compiling
    gelu_products.compile_ahead(768, 3072, True, gpu)
    assert not done
    begun.set()
    gelu_products._await_compiler()
    assert sorted(done) == [(768, 3072, gpu, True, kind) for kind in (False, True)]
    assert not gelu_products._compiling


def test_only_a_step_in_bfloat16_compiles_ahead(monkeypatch):
    net = DiT(attention, image_size=8, channels=1, num_classes=10, depth=2, width=32, heads=2)
    asked = []
    monkeypatch.setattr("training.step.compile_blocks", lambda *a: None)
    monkeypatch.setattr("training.step.compile_ahead", lambda *kind: asked.append(kind))
    for dtype in (None, torch.float16):
        Step(net, MeanFlow(), compile=True).prepare(dtype)
    Step(net, MeanFlow()).prepare(torch.bfloat16)
    assert not asked
    Step(net, MeanFlow(), compile=True).prepare(torch.bfloat16)
    assert asked == [(32, 128, True, torch.device("cpu"))]


@pytest.fixture
def always(monkeypatch):
    """Our kernel, however little there is to do."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    monkeypatch.setattr(gelu_products, "FEWEST", 0)
    for name in ("product_times_gelu_derivative", "gelu_tangent"):
        monkeypatch.setattr(gelu_products, name, None)


def formula(z):
    return functional.gelu(z, approximate="tanh")


SHAPES = [
    *((16384, 1152, 4608), (8192, 768, 3072), (16384, 384, 1536)),
    *((1000, 456, 520), (130, 384, 8)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width", "hidden"), SHAPES)
def test_it_is_the_formula_and_its_bits_are_the_same_each_time(rows, width, hidden, always):
    torch.manual_seed(0)

    def new(*shape, by=1.0):
        return (by * torch.randn(shape, device="cuda")).bfloat16()

    x, d, z = new(rows, width), new(rows, width), new(rows, hidden)
    A, B = new(hidden, width, by=width**-0.5), new(width, hidden, by=width**-0.5)
    few = rows // 3
    product = x.double() @ A.mT.double()
    t_h = gelu_products.tangent_product(x[:few], A, z[-few:])
    derivative = torch.func.vjp(formula, z.double())[1]
    slope = torch.func.grad(lambda z: formula(z).sum())(z.double())
    assert error(t_h, slope[-few:] * product[:few]) < 2e-3
    d_z, d_a = gelu_products.gradient_product(d, B, z, True)
    (expected,) = derivative(d.double() @ B.double())
    assert error(d_z, expected) < 2e-3
    assert error(d_a, expected.sum(0)) < 1e-3
    assert gelu_products.gradient_product(d, B, z, False)[1].numel() == 0
    for _ in range(30):
        again = gelu_products.gradient_product(d, B, z, True)
        assert torch.equal(again[0], d_z)
        assert torch.equal(again[1], d_a)
        assert torch.equal(gelu_products.tangent_product(x[:few], A, z[-few:]), t_h)


@pytest.mark.gpu
@pytest.mark.parametrize("z", [float("nan"), 1e4, -1e4, 60.0, -60.0, 0.0])
def test_far_from_zero_its_slope_is_one_or_zero(z, always):
    d, B = torch.ones(256, 384, device="cuda"), torch.ones(384, 128, device="cuda")
    given = torch.full((256, 128), z, device="cuda").bfloat16()
    d_z, _ = gelu_products.gradient_product(d.bfloat16(), B.bfloat16(), given, False)
    if z != z:
        assert d_z.isnan().all()
    else:
        slope = 0.5 if z == 0 else float(z > 0)
        assert torch.equal(d_z, torch.full_like(d_z, 384 * slope))
