"""Training through Lightning: continuing exactly, averaging, guarding, compiling, logging."""

import copy
import csv
import io
import itertools
import json
import resource
import signal
import sys
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from rich.console import Console

from jvp_flash_attention import attention as jvp_attention
from training.attentions import sdpa
from training.background_checkpoints import BackgroundCheckpointIO
from training.callbacks.checkpoint import Interrupted, LastCheckpoint, interrupted_once, remedy
from training.callbacks.divergence import Divergence
from training.callbacks.ema import EMA, choose
from training.callbacks.loss_by_timestep import LossByTimestep
from training.callbacks.non_finite_guard import Diverged, NonFiniteGuard
from training.callbacks.progress import RichProgress
from training.callbacks.summary import Summary, strict_json
from training.callbacks.throughput import Throughput
from training.checkpoints import AtomicCheckpointIO, find_checkpoint, load_checkpoint, refuse_used
from training.data.digits import Digits
from training.distributed import Later
from training.loggers import wandb as loggers
from training.loggers.csv import CSVFile
from training.models.dit import DiT
from training.module import GenerativeModule
from training.objectives.meanflow import MeanFlow
from training.optimizers import adamw
from training.rows import Rows


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["metrics"]["error"])  # not read: that waits for a GPU


def train(folder, steps, *callbacks, resume=None, max_steps=None, optimizer=None, **options):
    """The losses and the module of a short run; ``max_steps`` is the length of its schedule."""
    losses, data = Losses(), Digits(seed=3, batch_size=16)
    settings = {"depth": 1, "width": 32, "dropout": options.pop("dropout", 0.1)}
    L.seed_everything(3, verbose=False)
    net = DiT(options.pop("attention", sdpa), image_size=8, channels=1, num_classes=10, **settings)
    compile = options.pop("compile", False)
    schedule = lambda p, _: (optimizer or adamw)(  # noqa: E731
        p, max_steps or steps, lr=1e-2, schedule="cosine", warmup_steps=2
    )
    module = GenerativeModule(net, MeanFlow(data_proportion=0.5, p=0.5), schedule, 3, compile)
    trainer = Trainer(
        accelerator=options.pop("accelerator", "cpu"),
        max_steps=steps,
        max_epochs=-1,
        logger=options.pop("logger", False),
        callbacks=[losses, EMA(), *callbacks],
        plugins=[BackgroundCheckpointIO()],
        enable_progress_bar=any(isinstance(c, RichProgress) for c in callbacks),
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, LastCheckpoint) for c in callbacks),
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return [float(value) for value in losses.values], module


def last(folder, **options):
    return LastCheckpoint(folder / "checkpoints", **options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_continues_exactly(tmp_path, accumulate):
    options = {"max_steps": 8, "accumulate_grad_batches": accumulate}
    whole, module = train(tmp_path, 8, last(tmp_path / "whole"), **options)
    first, _ = train(tmp_path, 5, last(tmp_path), **options)
    path = find_checkpoint("last", tmp_path)
    second, resumed = train(tmp_path, 8, last(tmp_path), resume=path, **options)
    assert first + second == whole
    for name, weight in module.net.named_parameters():
        assert torch.equal(weight, resumed.net.get_parameter(name)), name
    a, b = (load_checkpoint(p / "checkpoints/last.ckpt") for p in (tmp_path / "whole", tmp_path))
    assert a["ema"]["updates"] == b["ema"]["updates"] == 8
    assert a["ema"]["averages"].keys() == {"0.9999"}
    for name, weight in a["ema"]["averages"]["0.9999"].items():
        assert torch.equal(weight, b["ema"]["averages"]["0.9999"][name]), name


def test_a_run_resumed_from_the_middle_of_a_killed_one_continues_exactly(tmp_path):
    class Killed(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 5:
                raise SystemExit("power cut")  # no error: nobody is asked

    whole, _ = train(tmp_path, 8)
    with pytest.raises(SystemExit, match="power cut"):
        train(tmp_path, 8, last(tmp_path, every_n_steps=3), Killed())
    again, _ = train(tmp_path, 8, resume=find_checkpoint("last", tmp_path))
    assert again == whole[3:]


def test_a_step_of_several_batches_has_their_mean_loss(tmp_path):
    class Batches(Callback):
        """Loss and error of every batch, undivided."""

        def __init__(self):
            self.losses, self.errors = [], []

        def on_train_batch_end(self, trainer, module, outputs, *_):
            self.losses.append(4 * float(outputs["loss"]))
            self.errors.append(float(outputs["metrics"]["error"]))

    seen, logger = Batches(), CSVFile(tmp_path)
    summary = Summary(tmp_path, window=2)
    progress = RichProgress()
    progress.console = Console(file=io.StringIO(), width=200)
    options = {"logger": logger, "log_every_n_steps": 1, "accumulate_grad_batches": 4}
    train(tmp_path, 3, seen, summary, progress, **options)
    assert len(seen.losses) == 12
    losses, errors = (np.array(v).reshape(3, 4).mean(1) for v in (seen.losses, seen.errors))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/loss"]) for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [float(row["train/error"]) for row in rows] == pytest.approx(errors, rel=1e-5)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary.history) == 2  # steps, not batches
    assert written["loss"] == pytest.approx(losses[1:].mean(), rel=1e-5)
    assert written["error"] == pytest.approx(errors[1:].mean(), rel=1e-5)
    lines = [line for line in progress.console.file.getvalue().splitlines() if "/3 " in line]
    assert [line.split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    for line, loss in zip(lines, losses, strict=True):
        assert f"loss {loss:.4f}" in line


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    started = []

    def init(**given):
        started.append(given)
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    wandb = SimpleNamespace(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(loggers, "find_spec", lambda name: name)
    monkeypatch.setattr(loggers, "WandbLogger", lambda experiment: experiment)
    for offline in (True, True, False):
        loggers.wandb_logger(str(tmp_path / "a"), offline)
    loggers.wandb_logger(str(tmp_path / "b"), True)
    first, *same, other = (given["id"] for given in started)
    assert same == [first, first]
    assert other != first
    assert [given["resume"] for given in started] == [None, None, "allow", None]


class Failing(Callback):
    """Raises where it is told to: at the first batch from step 5 on, or at the one after it."""

    def __init__(self, hook, error=OSError, late=0):
        self.error, self.late = error, late
        setattr(self, hook, self.fail)

    def fail(self, trainer, *_):
        if trainer.global_step >= 5:
            self.late -= 1
            if self.late < 0:
                raise self.error("no")


@pytest.mark.parametrize(
    ("hook", "options"),
    [
        ("on_train_batch_start", {}),
        ("on_train_batch_start", {"accumulate_grad_batches": 2}),
        ("on_train_batch_start", {"accumulate_grad_batches": 2, "late": 1}),
        ("on_after_backward", {}),
        ("on_train_batch_end", {}),
    ],
)
def test_an_error_leaves_a_checkpoint_of_the_last_finished_step(tmp_path, capsys, hook, options):
    failing = Failing(hook, late=options.pop("late", 0))
    rows = [CSVFile(tmp_path / name) for name in ("whole", "failed")]
    options |= {"max_steps": 8, "log_every_n_steps": 1}
    whole, _ = train(tmp_path, 8, logger=rows[0], **options)
    with pytest.raises(OSError, match="no"):
        train(tmp_path, 8, last(tmp_path), failing, logger=rows[1], **options)
    path = find_checkpoint("last", tmp_path)
    assert load_checkpoint(path)["global_step"] == 5
    says = f"wrote last.ckpt after step 5; resume with ckpt_path=last hydra.run.dir={tmp_path}\n"
    assert capsys.readouterr().out == f"stopped: no\n{says}"
    rows[1].resume(5)
    again, _ = train(tmp_path, 8, resume=path, logger=rows[1], **options)
    assert again == whole[-len(again) :]
    assert len(again) == 3 * options.get("accumulate_grad_batches", 1)
    a, b = (logger.path.read_text().splitlines() for logger in rows)
    assert a[-3:] == b[-3:]


@pytest.mark.parametrize(
    ("error", "step"), [(Diverged, 3), (KeyboardInterrupt, 3), (ValueError, 5)]
)
def test_a_network_that_diverged_does_not_replace_the_checkpoint(tmp_path, error, step):
    with pytest.raises((error, SystemExit)):
        train(tmp_path, 8, last(tmp_path, every_n_steps=3), Failing("on_after_backward", error))
    assert load_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == step


def test_a_checkpoint_that_cannot_be_written_hides_no_error(tmp_path, capsys):
    class InTheWay(Callback):
        def on_train_batch_start(self, *_):
            (tmp_path / "checkpoints").write_text("in the way")

    failing = Failing("on_after_backward", ValueError)
    with pytest.raises(ValueError, match="no"):
        train(tmp_path, 8, last(tmp_path), InTheWay(), failing)
    assert "checkpoints" in capsys.readouterr().err


def test_a_signal_finishes_the_step_and_writes_a_checkpoint(tmp_path):
    class Signal(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 3; resume with ckpt_path=last"):
        train(tmp_path, 8, last(tmp_path), Signal())
    assert load_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == 3


def test_a_signal_behind_the_last_step_waits_for_no_picture(tmp_path):
    class Drawn(Callback):
        def on_train_end(self, trainer, *_):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("went on")

    with pytest.raises(Interrupted, match="after step 2; resume with ckpt_path=last"):
        train(tmp_path, 2, Drawn(), last(tmp_path))
    assert load_checkpoint(tmp_path / "checkpoints/last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("at", [0, 2])
def test_a_signal_that_ends_a_compiler_too_is_told_as_an_interrupt(tmp_path, at):
    class Compiler(Callback):
        def on_after_backward(self, trainer, *_):
            if trainer.global_step == at:
                signal.raise_signal(signal.SIGTERM)
                raise RuntimeError("g++ was terminated")

    callbacks = [last(tmp_path, every_n_steps=2), Compiler()]
    says = (
        "after step 2; resume with ckpt_path=last" if at else "0; start again with ckpt_path=auto"
    )
    with pytest.raises(Interrupted, match=says), interrupted_once(callbacks):
        train(tmp_path, 8, *callbacks)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(RuntimeError, match="own"), interrupted_once([last(tmp_path)]):
        raise RuntimeError("of its own")


def test_the_hint_of_a_sweep_is_one_that_hydra_reads(tmp_path):
    path = tmp_path / "seed=0" / "checkpoints" / "last.ckpt"
    assert remedy(path) == f"start again with ckpt_path=auto 'hydra.run.dir=\"{tmp_path}/seed=0\"'"
    AtomicCheckpointIO().save_checkpoint({}, path)
    assert remedy(path) == f"resume with ckpt_path=last 'hydra.run.dir=\"{tmp_path}/seed=0\"'"


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"config": {}, "x": 1}, path)
    with pytest.raises(Exception, match=r"pickle|local"):
        AtomicCheckpointIO().save_checkpoint({"config": {}, "x": lambda: 0}, path)
    assert load_checkpoint(path)["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_says_so_and_leaves_the_old_checkpoint(tmp_path, before):
    """A limit on the size of files stands for the disk: the write fails in the system."""
    path = tmp_path / "last.ckpt"
    if before:
        AtomicCheckpointIO().save_checkpoint({"config": {}, "x": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        says = "the one before is whole" if before else "there is none before it"
        with pytest.raises(OSError, match=rf"last\.ckpt could not be written \(File.*\); {says}$"):
            AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(2**20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"] * before
    if before:
        assert load_checkpoint(path)["x"] == 1


def test_a_file_in_the_place_of_the_checkpoints_is_named_before_the_first_step(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(NotADirectoryError, match=r"must be a folder, got the file .*checkpoints"):
        train(tmp_path, 3, LastCheckpoint(tmp_path / "checkpoints"))
    with pytest.raises(OSError, match=r"could not be written \(File exists; .* MiB are free\)"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")


def test_a_run_writes_over_no_other_run(tmp_path):
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")
    refuse_used(tmp_path / "new", None)
    refuse_used(tmp_path, find_checkpoint("last", tmp_path))
    for resumed in (None, tmp_path.parent / "other" / "last.ckpt"):
        with pytest.raises(FileExistsError, match=r"holds a run already.*ckpt_path=last"):
            refuse_used(tmp_path, resumed)


def test_a_run_without_a_checkpoint_is_started_anew_by_auto(tmp_path):
    rows = tmp_path / "metrics.csv"
    rows.write_text("step")
    with pytest.raises(FileExistsError, match=r"start it anew with ckpt_path=auto"):
        refuse_used(tmp_path, None)
    refuse_used(tmp_path, None, "auto")
    assert not rows.exists()
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(FileExistsError, match="ckpt_path=last"):
        refuse_used(tmp_path, None, "auto")


def test_auto_resumes_where_there_is_something_to_resume(tmp_path):
    assert find_checkpoint("auto", tmp_path) is None
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")
    assert find_checkpoint("auto", tmp_path) == find_checkpoint("last", tmp_path)


def test_a_missing_or_foreign_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=last.*hydra\.run\.dir"):
        find_checkpoint("last", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        find_checkpoint("nowhere.ckpt", tmp_path)
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "text.ckpt")


def test_ema_is_the_weighted_mean_of_the_weights_so_far(tmp_path):
    class Expected(Callback):
        def on_train_start(self, trainer, module):
            self.average = copy.deepcopy(list(module.net.parameters()))

        def on_train_batch_end(self, trainer, module, *_):
            n = trainer.global_step
            beta = min(0.5, (1 + n) / (10 + n))
            for a, w in zip(self.average, module.net.parameters(), strict=True):
                a.data = beta * a.data + (1 - beta) * w.data

    ema, expected = EMA(decay=0.5), Expected()
    train(tmp_path, 12, ema, expected)
    for a, b in zip(ema.averages["0.5"].values(), expected.average, strict=True):
        torch.testing.assert_close(a, b.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_a_power_function_average_has_the_width_that_is_asked_for(width):
    """The weight of step i in the average after n steps, by unrolling the recursion."""
    ema, n = EMA(decay=[], power=[width]), 4000
    share, left = torch.zeros(n, dtype=torch.float64), 1.0
    for i in range(n, 0, -1):
        beta = ema.beta(f"power_{width}", i)
        share[i - 1] = (1 - beta) * left
        left *= beta
    time = torch.arange(1, n + 1) / n
    assert float(share.sum()) == pytest.approx(1)
    mean = (share * time).sum()
    assert float(((time - mean).square() * share).sum().sqrt()) == pytest.approx(width, rel=0.01)


def test_several_averages_are_kept_and_one_is_chosen(tmp_path):
    ema = EMA(decay=[0.5, 0.9], power=[0.1], use="power_0.1")
    _, module = train(tmp_path, 12, ema, last(tmp_path))
    checkpoint = load_checkpoint(tmp_path / "checkpoints/last.ckpt")
    chosen = {name: choose(checkpoint, name) for name in ("0.5", "0.9", "power_0.1")}
    key = next(name for name in chosen["0.5"] if name.endswith("projection.weight"))
    values = [weights[key] for weights in chosen.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(values, 2))
    assert torch.equal(choose(checkpoint, "ema")[key], chosen["power_0.1"][key])
    with ema.averaged(module.net) as net:
        assert torch.equal(net.get_parameter(key), chosen["power_0.1"][key])
    assert choose(checkpoint, "net") is None
    with pytest.raises(ValueError, match=r"weights must be one of ema, net, 0\.5, 0\.9"):
        choose(checkpoint, "0.99")
    with pytest.raises(ValueError, match=r"callbacks\.ema: an average cannot begin in the middle"):
        train(tmp_path, 14, EMA(decay=0.7), resume=tmp_path / "checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decay": 1.5}, r"callbacks\.ema\.decay must be"),
        ({"decay": []}, r"callbacks\.ema\.decay: give a decay"),
        ({"power": [0.5]}, r"callbacks\.ema\.power must be"),
        ({"use": 0.5}, r"callbacks\.ema\.use must be one of 0\.9999; got '0\.5'"),
    ],
)
def test_a_wrong_average_raises_an_error_that_names_its_key(options, says):
    with pytest.raises(ValueError, match=says):
        EMA(**options)


class Poison(Callback):
    """Makes the gradient of some steps NaN."""

    def __init__(self, steps):
        self.steps = steps

    def on_after_backward(self, trainer, module):
        if trainer.global_step in self.steps:
            next(module.net.parameters()).grad.fill_(float("nan"))


def test_a_non_finite_step_is_skipped_and_counted(tmp_path):
    guard = NonFiniteGuard(patience=3)
    losses, module = train(tmp_path, 8, Poison({2, 3, 6}), guard)
    assert guard.skipped == 3
    assert len(losses) == 8
    assert torch.tensor(losses).isfinite().all()
    assert all(p.isfinite().all() for p in module.net.parameters())


def test_too_many_non_finite_steps_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(Diverged, match=r"3 steps in a row.*optimizer\.lr"):
        train(tmp_path, 8, Poison({2, 3, 4}), NonFiniteGuard(patience=3))


@pytest.mark.compile
@pytest.mark.slow
def test_a_compiled_objective_trains_like_an_eager_one(tmp_path):
    eager, _ = train(tmp_path, 3, dropout=0.0, attention=jvp_attention)
    compiled, _ = train(tmp_path, 3, dropout=0.0, attention=jvp_attention, compile=True)
    assert compiled == pytest.approx(eager, rel=1e-4)


class NoWaiting(Callback):
    """What would wait for the GPU is an error in the steps after the first ones."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 4:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 10:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_neither_a_step_nor_its_row_waits_for_the_gpu(tmp_path):
    callbacks = [Throughput(), NonFiniteGuard(), Divergence(window=5), LossByTimestep()]
    options = {"accelerator": "gpu", "log_every_n_steps": 2, "attention": jvp_attention}
    try:
        train(tmp_path, 12, *callbacks, NoWaiting(), logger=CSVFile(tmp_path), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9, 11]
    assert all(float(row["train/loss"]) > 0 for row in rows)


class Waits(Later):
    """Hands out numbers one step later, as where a device computes them."""

    def __call__(self, values):
        known, self.kept = self.flush(), values
        return known

    def flush(self):
        kept, self.kept = self.kept, None
        return [] if kept is None else [kept.tolist()]


@pytest.mark.parametrize("steps", [4, 5])
def test_a_row_has_the_numbers_of_its_step_also_where_they_come_later(tmp_path, monkeypatch, steps):
    rows = {}
    for name, later in (("now", Later), ("later", Waits)):
        monkeypatch.setattr("training.rows.Later", later)
        folder = tmp_path / name
        callbacks = [NonFiniteGuard(), LossByTimestep(), last(folder, every_n_steps=2)]
        options = {"logger": CSVFile(folder), "log_every_n_steps": 2}
        losses, module = train(folder, steps, *callbacks, **options)
        with (folder / "metrics.csv").open() as file:
            rows[name] = list(csv.DictReader(file))
        assert module.rows.known["train/error"] == losses[-1]
    assert rows["now"] == rows["later"]
    written = [int(row["step"]) for row in rows["now"]]
    assert written == ([1, 3] if steps == 4 else [1, 3, 4])
    assert [float(row["train/error"]) for row in rows["now"]] == [losses[i] for i in written]


def test_a_window_that_is_known_later_is_judged_before_a_checkpoint(monkeypatch):
    monkeypatch.setattr("training.callbacks.divergence.Later", Waits)
    divergence, trainer = Divergence(factor=10, window=2), SimpleNamespace(global_step=0)

    def window(error):
        for _ in range(2):
            trainer.global_step += 1
            outputs = {"means": {"error": torch.tensor(error)}}
            divergence.on_train_batch_end(trainer, None, outputs, None, 0)

    window(1.0)
    assert divergence.best is None  # not known yet
    assert divergence.state_dict() == {"best": 1.0}
    window(50.0)
    with pytest.raises(Diverged, match="50 times its best, at step 4"):
        divergence.state_dict()


def test_the_bar_on_a_terminal_shows_numbers_from_the_first_to_the_last_step(tmp_path):
    progress, printed = RichProgress(), io.StringIO()
    progress.console = Console(file=printed, force_terminal=True, width=200)
    losses, _ = train(tmp_path, 12, progress, log_every_n_steps=5, logger=CSVFile(tmp_path))
    assert f"error {losses[-1]:.4f}" in printed.getvalue()
    assert "nan" not in printed.getvalue()


def test_a_step_that_an_error_ends_is_in_no_row():
    rows, trainer = Rows(), SimpleNamespace(global_step=0, log_every_n_steps=1, loggers=[])
    rows.begin(0)
    rows.record("train/loss", 1.0)
    rows.end(trainer)  # by the checkpoint that the error leaves
    rows.finish(trainer)
    assert rows.known == {}
    trainer.global_step = 1
    rows.end(trainer)
    assert rows.known == {"train/loss": 1.0}


def test_two_seeds_differ_and_one_seed_repeats(tmp_path):
    first, _ = train(tmp_path, 3)
    second, _ = train(tmp_path, 3)
    assert first == second
    assert len(set(first)) == 3


def test_a_summary_has_null_where_a_number_is_not_finite():
    text = strict_json({"loss": float("nan"), "error": float("inf"), "steps": 3})
    assert json.loads(text) == {"loss": None, "error": None, "steps": 3}
    assert "NaN" not in text


def test_a_row_that_a_kill_cut_short_is_made_again(tmp_path):
    logger = CSVFile(tmp_path)
    for step in range(12):
        logger.log_metrics({"loss": step / 2}, step)
    text = logger.path.read_text()
    logger.path.write_text(text[: text.index("11,") + 1])
    resumed = CSVFile(tmp_path)
    resumed.resume(11)
    assert [row["step"] for row in resumed.rows] == [str(step) for step in range(11)]


def test_metrics_csv_joins_values_of_a_step_and_continues_on_resuming(tmp_path):
    logger = CSVFile(tmp_path)
    for step in range(4):
        logger.log_metrics({"loss": step / 2, "epoch": 0}, step)
    logger.log_metrics({"accuracy": 0.5}, 3)
    resumed = CSVFile(tmp_path)
    resumed.resume(2)
    resumed.log_metrics({"loss": 7.0}, 2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"]) for row in rows] == [
        ("0", "0.0"),
        ("1", "0.5"),
        ("2", "7.0"),
    ]
    assert set(rows[0]) == {"step", "loss", "accuracy"}
