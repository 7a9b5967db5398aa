"""What is watched while a network trains: errors by time, speed, divergence."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jvp_flash_attention import attention as jvp_attention
from training.activation_checkpointing import checkpoint_blocks
from training.attentions import sdpa
from training.callbacks.divergence import Divergence
from training.callbacks.loss_by_timestep import LossByTimestep
from training.callbacks.non_finite_guard import Diverged
from training.callbacks.progress import RichProgress
from training.callbacks.throughput import Throughput
from training.metrics.flops import step_flops
from training.models.dit import DiT
from training.objectives.flow_matching import FlowMatching
from training.objectives.meanflow import MeanFlow
from training.objectives.scm import SCM
from training.objectives.tangents import Jvp


class Fake:
    """As much of a trainer and a module as the callbacks see."""

    def __init__(self, log_every=1, accumulate=1, net=None, objective=None):
        self.trainer = SimpleNamespace(
            accumulate_grad_batches=accumulate,
            global_step=0,
            lightning_module=None,
            global_rank=0,
            log_every_n_steps=log_every,
            max_steps=20,
            world_size=1,
            precision="32-true",
        )
        self.logged = {}
        self.module = SimpleNamespace(
            rows=SimpleNamespace(
                record=lambda name, value: self.logged.__setitem__(name, float(value))
            ),
            net=net,
            objective=objective,
            device=torch.device("cpu"),
        )

    def end(self, callback, outputs=None, batch=None, batch_idx=0):
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.trainer.global_step += 1
        callback.on_train_batch_end(self.trainer, self.module, outputs, batch, batch_idx)


def test_errors_are_averaged_by_time_over_the_steps_since_the_last_row():
    by_timestep, fake = LossByTimestep(number=2), Fake(log_every=2)
    fake.end(by_timestep, {"errors": torch.tensor([1.0, 3.0]), "times": torch.tensor([0.1, 0.6])})
    assert fake.logged == {}
    fake.end(by_timestep, {"errors": torch.tensor([5.0, 7.0]), "times": torch.tensor([0.49, 1.0])})
    assert fake.logged == {"error_t/0.00-0.50": 3, "error_t/0.50-1.00": 5}
    fake.logged.clear()
    for _ in range(2):  # the first two are forgotten; an empty bucket does not repeat its last
        fake.end(by_timestep, {"errors": torch.tensor([9.0]), "times": torch.tensor([0.2])})
    assert fake.logged == {
        "error_t/0.00-0.50": 9,
        "error_t/0.50-1.00": pytest.approx(float("nan"), nan_ok=True),
    }
    fake.logged.clear()
    for missing in ({"errors": None, "times": None}, {"errors": torch.ones(1), "times": None}):
        fake.end(by_timestep, missing)
    assert fake.logged == {}


@pytest.mark.parametrize("objective", [MeanFlow(), FlowMatching()], ids=["mf", "fm"])
def test_objectives_give_the_errors_whose_mean_they_log(tiny, batch, draws, objective):
    net = tiny()
    terms = objective.loss(net, objective.sample(*batch, net.null_label, draws))
    assert terms.errors.shape == (12,)
    assert not terms.errors.requires_grad
    torch.testing.assert_close(terms.errors.mean(), terms.metrics["error"])


def test_an_exploding_error_ends_the_run():
    divergence, fake = Divergence(factor=10, window=4), Fake()

    def steps(*errors):
        for error in errors:
            fake.end(divergence, {"means": {"error": torch.tensor(error)}})

    steps(5.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0, 1000.0)  # a single outlier is nothing
    steps(9.0, 9.0, 9.0, 9.0)
    resumed = Divergence(factor=10, window=4)
    resumed.load_state_dict(divergence.state_dict())
    for callback in (divergence, resumed):
        divergence = callback
        with pytest.raises(Diverged, match=r"11 times its best, at step \d+; lower optimizer\.lr"):
            steps(11.0, 11.0, 11.0, float("nan"))


def test_the_time_of_a_step_lasts_until_the_next_one_and_forgets_the_warmup(tiny):
    fake = Fake(accumulate=2, net=tiny(), objective=MeanFlow())
    callback = Throughput(window=10, warmup=1, peak_tflops=0.5)
    batch = torch.zeros(6, 1, 8, 8), torch.zeros(6).long()
    for pause in (0.2, 0.01, 0.01, 0.05, 0.01):  # half of it in each batch
        for i in range(2):
            callback.on_train_batch_start(fake.trainer, fake.module, batch, i)
            time.sleep(pause / 2)
            fake.end(callback, None, batch, i)
            time.sleep(0.02)  # between batches and steps: averages, logging, waiting for data
    logged = fake.logged
    assert 50 <= logged["perf/step_ms_p10"] <= logged["perf/step_ms"] < logged["perf/step_ms_p90"]
    assert 75 < logged["perf/step_ms_p90"] < 150  # 50 + 40, less an interpolation; not 200
    seconds = logged["perf/step_ms"] / 1000
    assert logged["perf/samples_per_s"] == pytest.approx(12 / seconds)
    useful = 2 * step_flops(fake.module.net, MeanFlow(), *batch)
    assert logged["perf/tflops"] == pytest.approx(useful / seconds / 1e12)
    assert logged["perf/mfu"] == pytest.approx(logged["perf/tflops"] / 0.5)


def flops(objective, attention=sdpa, batch=8, prepare=lambda net: None, **options):
    settings = {"image_size": 8, "channels": 1, "num_classes": 10, "width": 128, "depth": 2}
    with torch.device("meta"):
        net = DiT(attention, **(settings | options))
    prepare(net)
    return step_flops(net, objective, torch.zeros(batch, 1, 8, 8), torch.zeros(batch))


def test_useful_operations_are_counted_as_on_paper():
    """Forward: twice the weights of a layer for each token (or image) that it sees, and 4 N² W for
    the attention of a block; its gradient costs twice that; neither first layer needs one of its
    input.
    """
    n, w, depth, batch, classes = 16, 128, 2, 8, 10
    tokens = depth * (4 + 2 * 4) * w * w + 2 * 4 * w  # qkv, projection, perceptron; patches in, out
    images = depth * 6 * w * w + 2 * w * w + 2 * (256 * w + w * w)  # modulations, two times
    forward = 2 * (n * tokens + images) + depth * 4 * n * n * w
    inputs = 2 * (n * 4 * w + 2 * 256 * w)
    assert flops(FlowMatching(), num_classes=classes) == batch * (3 * forward - inputs)


def test_useful_operations_do_not_depend_on_how_they_are_computed():
    single = flops(MeanFlow(Jvp("single")))
    assert flops(MeanFlow(Jvp("double"))) == single
    assert flops(MeanFlow(), attention=jvp_attention) == single
    assert (
        flops(MeanFlow(Jvp("double")), prepare=lambda net: checkpoint_blocks(net, "block"))
        == single
    )
    assert flops(MeanFlow(), batch=16) == 2 * single
    assert flops(MeanFlow(data_proportion=1.0)) == flops(FlowMatching())
    ratio = flops(MeanFlow(data_proportion=0.0)) / flops(FlowMatching())
    assert 4 / 3 < ratio < 1.5  # a tangent is one forward more, in the attention two


@pytest.mark.parametrize("attention", [sdpa, jvp_attention])
def test_the_forward_of_a_teacher_is_useful_too(attention):
    teacher = DiT(attention, image_size=8, channels=1, num_classes=10, width=64, depth=1).eval()
    student = SCM(learned_variance=False, teacher=lambda: teacher)
    student.on_fit_start(torch.zeros(()))
    x, t = torch.zeros(8, 1, 8, 8), torch.zeros(8)
    teacher.blocks[0].attention.attention = sdpa
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        teacher(x, t, t, t.long())
    teacher.blocks[0].attention.attention = attention
    assert flops(student) == flops(SCM(learned_variance=False)) + forward.get_total_flops()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compilation_is_announced(capsys, compiled):
    fake, progress = Fake(), RichProgress()
    fake.module.step = SimpleNamespace(compile=compiled, cuda_graphs=False)
    progress.on_train_start(fake.trainer, fake.module)
    progress.disable()
    progress.on_train_start(fake.trainer, fake.module)
    printed = capsys.readouterr().out
    assert printed.count("compiling a block") == compiled
    assert printed.count("training: 20 steps, a line every 2") == 1


def test_an_objective_that_cannot_be_counted_trains_on(tiny):
    class Odd(MeanFlow):
        def loss(self, net, sample):
            raise RuntimeError("no meta function")

    fake = Fake(net=tiny(), objective=Odd())
    callback = Throughput()
    batch = torch.zeros(6, 1, 8, 8), torch.zeros(6).long()
    with pytest.warns(UserWarning, match="perf/tflops is not logged.*Odd.*no meta function"):
        callback.on_train_batch_start(fake.trainer, fake.module, batch, 0)
    fake.end(callback, None, batch)
    callback.on_train_batch_start(fake.trainer, fake.module, batch, 1)
    fake.end(callback, None, batch)
    assert "perf/step_ms" in fake.logged
    assert "perf/tflops" not in fake.logged


def test_counting_leaves_the_network_as_it_was(tiny):
    net = tiny()
    net.other = nn.Linear(1, 1)
    checkpoint_blocks(net, "block")
    before = [(type(m), getattr(m, "attention", None)) for m in net.modules()]
    step_flops(net, MeanFlow(Jvp("double")), torch.zeros(4, 1, 8, 8), torch.zeros(4))
    assert [(type(m), getattr(m, "attention", None)) for m in net.modules()] == before
    assert {p.device.type for p in net.parameters()} == {"cpu"}
