"""Weights in 16 bits: the numbers are those of autocast, and no change of a weight goes unseen."""

import copy
import gc
import re
from typing import ClassVar

import pytest
import torch
from lightning import Callback

from jvp_flash_attention import attention
from tests.compiling import compiling
from tests.training.test_training import last, train
from training import cuda_graphs
from training import step as module
from training.callbacks.non_finite_guard import NonFiniteGuard, total_norm
from training.half_weights import HalfWeights
from training.kernels import adamw
from training.kernels.adamw import AdamW
from training.kernels.inputs import INTERPRETED
from training.models.dit import DiT
from training.objectives.meanflow import MeanFlow
from training.randomness import Draws
from training.step import Step

HALF = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="gradients of their own dtype: PyTorch 2.10"
)


def step_of(halves=True, seed=0, graphs=False, compile=False):
    torch.manual_seed(seed)
    net = DiT(attention, image_size=8, channels=1, num_classes=10, depth=2, width=64, heads=2)
    for p in net.parameters():  # zeros at initialisation hide a gradient
        torch.nn.init.normal_(p, std=0.1)
    net.to(DEVICE)
    objective = MeanFlow(data_proportion=0.5)
    objective.setup(net)
    step = Step(net, objective, compile=compile, cuda_graphs=graphs)
    step.prepare()
    optimizer = AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    if halves:
        step.halves = HalfWeights.of(net, optimizer, HALF)
    return step, optimizer


class Frozen(Callback):
    """How many objects Python's collector leaves out, before each batch."""

    counts: ClassVar[list[int]] = []

    def on_train_batch_start(self, *_):
        self.counts.append(gc.get_freeze_count())


def differentiate(step, number=0):
    random = torch.Generator().manual_seed(number)
    x, y = torch.randn(4, 1, 8, 8, generator=random).to(DEVICE), torch.arange(4, device=DEVICE)
    sample = step.objective.sample(x, y, step.net.null_label, Draws(0, number, device=DEVICE))
    with torch.autocast(DEVICE.type, HALF):
        loss = step(sample).loss
    step.backward(loss)
    return loss.detach().clone()


def bits(step):
    """Gradients by name, those in 16 bits as float32."""
    return {n: p.grad.float() for n, p in step.net.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_those_of_autocast_bit_for_bit():
    (plain, _), (halved, optimizer) = step_of(halves=False), step_of()
    assert len(optimizer.copies) == 2 * 5  # modulation, qkv, projection and both of the MLP
    assert torch.equal(differentiate(plain), differentiate(halved))
    expected, found = bits(plain), bits(halved)
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for name, p in halved.net.named_parameters():
        assert p.dtype == torch.float32
        assert p.grad.dtype == (HALF if p in optimizer.copies else torch.float32), name


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)])
def test_the_update_is_that_of_pytorch(betas):
    shapes = ((70, 32), (5008,), (3,))
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    options = {"lr": 1e-2, "betas": betas, "weight_decay": 0.1, "fused": True}
    expected, optimizer = torch.optim.AdamW(theirs, **options), AdamW(ours, **options)
    copies = [optimizer.copy(p) for p in ours[:2]]  # the third has none
    for p in ours:
        p.grad_dtype = None
    for skip in (0.0, 0.0, 1.0, 0.0):
        for p, q in zip(theirs, ours, strict=True):
            gradient = torch.randn_like(p).to(HALF)
            p.grad = gradient.float()
            q.grad = gradient if q in optimizer.copies else gradient.float()
        expected.found_inf = optimizer.found_inf = torch.tensor(skip, device=DEVICE)
        before = [p.detach().clone() for p in ours]
        expected.step()
        optimizer.step()
        assert skip == 0.0 or all(map(torch.equal, ours, before))
    for p, q in zip(theirs, ours, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=2e-6)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            a, b = expected.state[p][name], optimizer.state[q][name]
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    for p, half in zip(ours, copies, strict=False):  # the interpreter cuts where a GPU rounds
        assert torch.allclose(half.float(), p, rtol=2**-7)
    state = optimizer.state_dict()
    other = AdamW([p.detach().clone().requires_grad_() for p in ours], **options)
    other.load_state_dict(state)
    assert state["state"].keys() == expected.state_dict()["state"].keys()
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


COMPILED = """
import torch
import triton.language as tl
from triton.runtime import driver
from jvp_flash_attention.kernels.launch_cache import Launch
from tests import offline
from training.kernels import adamw

driver.set_active(offline._Driver(offline.TARGETS["sm_90"]))
table, owners = torch.zeros(7, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
args = (table, owners, torch.zeros(()), *[0.1] * 8)
options = {"HALF": tl.bfloat16, "BLOCK": adamw.BLOCK, "num_warps": adamw.WARPS}
print(Launch(adamw._adamw, (1,), args, options).compile().asm["ptx"])
"""


@pytest.mark.slow
def test_the_update_reads_and_writes_16_bytes_at_a_time():
    """Its addresses come from a table, of which a compiler knows nothing: it takes 9.1 ms for 6.3
    of DiT-XL/2's weights otherwise.
    """
    printed = compiling("-c", COMPILED)
    whole = adamw.BLOCK // (32 * adamw.WARPS) // 4  # of a tensor of float32
    found = re.findall(r"(?:ld|st)\.global[\w.]*v4\.[bf]32", printed)
    assert len(found) == (3 + 3) * whole + (1 + 1) * whole // 2
    assert not re.search(r"(?:ld|st)\.global[\w.]*b16", printed)


def test_a_weight_that_something_else_changes_is_copied_anew():
    step, optimizer = step_of()
    differentiate(step)
    optimizer.step()
    other, _ = step_of(halves=False, seed=1)
    step.net.load_state_dict(other.net.state_dict())
    optimizer.zero_grad()
    assert torch.equal(differentiate(step), differentiate(other))
    for weight, half in optimizer.copies.items():
        assert torch.equal(half, weight.to(HALF))
    # and a copy of the network knows nothing of all this
    assert all(p.dtype == torch.float32 for p in copy.deepcopy(step.net).parameters())


def test_gradients_that_were_not_cleared_raise():
    """They would be added in 16 bits."""
    step, _ = step_of()
    differentiate(step)
    with pytest.raises(RuntimeError, match="zero_grad"):
        differentiate(step, 1)


def test_an_error_gives_the_weights_back():
    step, _ = step_of()
    before = list(step.net.parameters())
    with pytest.raises(ValueError, match="inside 10"), step.halves.instead():
        raise ValueError(f"inside {sum(p.dtype == HALF for p in step.net.parameters())}")
    assert all(a is b for a, b in zip(before, step.net.parameters(), strict=True))


def test_they_are_for_one_process_fused_adamw_and_no_sum_of_gradients():
    step, optimizer = step_of(halves=False)
    step.halve(optimizer, HALF)
    assert step.halves is None  # not compiled
    step.compile = True
    for reason in ("accumulate", "exchange", "optimizer", "dtype", "passes"):
        step.accumulate = 2 if reason == "accumulate" else 1
        step.objective.one_pass = reason != "passes"
        step.exchange = object() if reason == "exchange" else None
        others = torch.optim.AdamW(step.net.parameters(), fused=True)
        step.halve(
            others if reason == "optimizer" else optimizer, None if reason == "dtype" else HALF
        )
        assert step.halves is None, reason
    for options in ({"fused": False}, {"half_weights": False}):
        other = AdamW(step.net.parameters(), **({"fused": True} | options))
        assert HalfWeights.of(step.net, other, HALF) is None, options
    step.objective.one_pass = True
    step.halve(optimizer, HALF)
    assert step.halves is not None
    differentiate(step)
    copied = copy.deepcopy(optimizer)  # of other weights
    assert not copied.copies
    assert optimizer.copies
    step.halve(optimizer, None)
    assert step.halves is None


def test_the_norm_of_narrow_gradients_is_not_rounded():
    torch.manual_seed(0)
    gradients = [torch.randn(300).to(HALF), torch.randn(70), torch.randn(5, 5).to(HALF)]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    assert float(total_norm(gradients)) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="on a CPU, by Triton's interpreter")
def test_a_run_keeps_them_and_continues_exactly(tmp_path, monkeypatch):
    """Also from a checkpoint of a run without them; the numbers of both are alike."""
    monkeypatch.setattr(module, "compile_blocks", lambda *_: None)
    # Triton's interpreter cuts float32 to 16 bits, a GPU rounds: every step copies anew
    monkeypatch.setattr(AdamW, "_written", lambda *_: None)
    options = {"precision": "bf16-mixed", "attention": attention, "compile": True, "max_steps": 6}
    found, halve = [], Step.halve

    def halved(self, *given):
        halve(self, *given)
        found.append(self.halves)

    monkeypatch.setattr(Step, "halve", halved)
    callbacks = lambda path: [NonFiniteGuard(), last(path), Frozen()]  # noqa: E731
    whole, one = train(tmp_path, 6, *callbacks(tmp_path / "a"), **options)
    assert found[-1] is not None
    assert Frozen.counts[:3] == [0, 0, 0]
    assert min(Frozen.counts[3:]) > 10_000  # which no collection looks at
    assert gc.get_freeze_count() == 0
    assert one.step.halves is None  # released
    assert {p.grad.dtype for p in one.net.parameters() if p.grad is not None} <= {
        HALF,
        torch.float32,
    }
    for kept in (True, False):
        path = tmp_path / str(kept)
        with monkeypatch.context() as context:
            if not kept:
                context.setattr(Step, "halve", lambda *_: None)
            first, _ = train(tmp_path, 3, *callbacks(path), **options)
        checkpoint = path / "checkpoints" / "last.ckpt"
        rest, other = train(tmp_path, 6, *callbacks(path), resume=checkpoint, **options)
        assert first + rest == (whole if kept else pytest.approx(whole, rel=1e-4))
        for p, q in zip(one.net.parameters(), other.net.parameters(), strict=True):
            assert torch.equal(p, q) if kept else torch.allclose(p, q, atol=1e-4)


@pytest.mark.gpu
def test_a_recorded_step_has_the_same_gradients(monkeypatch):
    finish, replaced = cuda_graphs.finish, []
    monkeypatch.setattr(cuda_graphs, "finish", lambda graph: replaced.append(finish(graph)))
    plain, _ = step_of(halves=False)
    graphs, _ = step_of(compile=True, graphs=True)
    for number in range(4):
        differentiate(plain, number), differentiate(graphs, number)
        assert len(replaced) == min(number, 1)
        for name, expected in bits(plain).items():
            found = bits(graphs)[name]
            assert (found - expected).norm() <= 0.05 * expected.norm(), name
        for step in (plain, graphs):
            step.net.zero_grad()


@pytest.mark.gpu
def test_small_clears_of_a_graph_are_kernels_and_clear():
    driver = pytest.importorskip("cuda.bindings.driver")
    counter, large = torch.ones(8, device="cuda"), torch.ones(4096, device="cuda")
    graph = cuda_graphs.new_graph()
    with torch.cuda.graph(graph):
        counter += 1
        stream = torch.cuda.current_stream().cuda_stream
        for x in (counter[:4], counter[2:6], large):
            (status,) = driver.cuMemsetD32Async(x.data_ptr(), 0, len(x), stream)
            assert not int(status)
        counter += 1
    assert cuda_graphs.finish(graph) == 2
    graph.replay()
    graph.replay()
    assert counter.tolist() == [1.0] * 6 + [5.0] * 2  # 1, and 2 a replay
    assert not large.any()
