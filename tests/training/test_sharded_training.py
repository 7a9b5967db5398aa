"""Sharded runs on two processes: the curves of DDP, and runs that end early and go on elsewhere."""

import signal
import time

import pytest
import torch

from tests.commands import FAST, column, in_process, rows
from tests.training.spawn import spawn
from training.checkpoints import load_checkpoint

pytestmark = pytest.mark.timeout(1200)

RUN = [*FAST, "trainer.devices=2", "data.batch_size=4", "attention=sdpa", "objective=tvm"]
RUN += ["trainer.log_every_n_steps=1", "optimizer.schedule=constant", "model.dropout=0.1"]
RUN += ["callbacks.ema.decay=[0.9,0.99]", "callbacks.checkpoint.every_n_steps=2"]
RUN += ["callbacks.samples.rows=1", "callbacks.sample_quality=null", "trainer.gradient_clip_val=1"]
FSDP = ["trainer=fsdp", "trainer.accelerator=cpu"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu"]
LOGGED = ("train/loss", "train/error", "train/grad_norm", "train/skipped")


def train(rank, world, *runs):
    """One after the other; of each the arguments."""
    for arguments in runs:
        trainer = FSDP if "fsdp" in arguments[0] else DDP
        in_process("train.py", *RUN, *trainer, "trainer.devices=2", *arguments[1:])


def last(run):
    return load_checkpoint(run / "checkpoints" / "last.ckpt")


def states(checkpoint):
    """Every tensor of a checkpoint by its place."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(checkpoint)
    keys = [(torch.utils._pytree.keystr(key), x) for key, x in leaves]
    return {key: x for key, x in keys if isinstance(x, torch.Tensor)}


def assert_equal(a, b):
    a, b = states(a), states(b)
    assert a.keys() == b.keys()
    for key, x in a.items():
        assert torch.equal(x, b[key]), key


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A sharded run that was killed after some checkpoints, resumed, and its whole twins."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {name: folder / name for name in ("killed", "whole")}
    endless = ("fsdp", "trainer.max_steps=100000", f"hydra.run.dir={runs['killed']}")
    processes = spawn(train, 2, (*endless, "ckpt_path=auto"), join=False).processes
    deadline = time.monotonic() + 240
    while not (runs["killed"] / "metrics.csv").exists() or len(rows(runs["killed"])) < 7:
        assert all(p.is_alive() for p in processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for p in processes:
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL
    made = len(rows(runs["killed"]))
    assert 4 <= last(runs["killed"])["global_step"] <= made
    end = f"trainer.max_steps={made + 3}"
    again = ("fsdp", end, f"hydra.run.dir={runs['killed']}", "ckpt_path=auto")
    whole = ("fsdp", end, f"hydra.run.dir={runs['whole']}")
    spawn(train, 2, again, whole)
    return runs


@pytest.fixture(scope="module")
def others(killed):
    """As many steps of unsharded processes, and two of weights in half precision."""
    runs = {name: killed["whole"].parent / name for name in ("ddp", "half")}
    made = last(killed["whole"])["global_step"]
    ddp = ("ddp", f"trainer.max_steps={made}", f"hydra.run.dir={runs['ddp']}")
    half = ("fsdp", "trainer.max_steps=2", "trainer.precision=bf16-mixed")
    spawn(train, 2, ddp, (*half, f"hydra.run.dir={runs['half']}"))
    return killed | runs


def test_a_killed_run_goes_on_as_if_it_had_not_been(killed):
    for name in ("step", *LOGGED):
        assert column(killed["killed"], name) == column(killed["whole"], name), name
    a, b = last(killed["killed"]), last(killed["whole"])
    assert len(states(a)) > 200
    assert_equal(a["state_dict"], b["state_dict"])
    assert_equal(a["ema"], b["ema"])
    assert_equal(a["optimizer_states"], b["optimizer_states"])


@pytest.mark.slow
def test_its_curves_are_those_of_unsharded_processes(others):
    for name in LOGGED:
        assert column(others["whole"], name) == pytest.approx(column(others["ddp"], name), rel=1e-4)
    a, b = last(others["whole"]), last(others["ddp"])
    for part in ("state_dict", "ema", "optimizer_states"):
        ours, theirs = states(a[part]), states(b[part])
        assert ours.keys() == theirs.keys()
        for key, x in ours.items():
            torch.testing.assert_close(x, theirs[key], rtol=1e-2, atol=1e-4, msg=key)
    pictures = [sorted((others[run] / "samples").glob("*.png")) for run in ("whole", "ddp")]
    assert [p.name for p in pictures[0]] == [p.name for p in pictures[1]]
    assert pictures[0]


@pytest.mark.slow
def test_weights_in_half_precision_draw_samples_too(others):
    assert list((others["half"] / "samples").glob("*.png"))
    assert len(rows(others["half"])) == 2


def test_it_goes_on_in_one_process_and_in_two_again(killed, tmp_path):
    step = last(killed["whole"])["global_step"]
    one = [*RUN, "trainer=cpu", "trainer.devices=1", f"hydra.run.dir={killed['whole']}"]
    more = ["ckpt_path=last", "allow_config_changes=[trainer.devices]"]
    before = last(killed["whole"])
    in_process("train.py", *one, *more, f"trainer.max_steps={step + 1}")
    path = killed["whole"] / "checkpoints" / "last.ckpt"
    assert path.is_file()
    assert not path.is_symlink()
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    after = last(killed["whole"])
    assert after["global_step"] == step + 1
    for key, x in states(before["ema"]).items():  # it went on from there
        assert (states(after["ema"])[key] - x).abs().max() < 0.1

    arguments = (f"trainer.max_steps={step + 2}", f"hydra.run.dir={killed['whole']}", *more)
    spawn(train, 2, ("fsdp", *arguments))
    assert path.is_symlink()
    end = last(killed["whole"])
    assert end["global_step"] == step + 2
    assert states(end).keys() == states(after).keys()
    steps = [int(s["step"]) for s in end["optimizer_states"][0]["state"].values()]
    assert set(steps) == {step + 2}

    ckpt = f"ckpt={path}"
    in_process("export.py", ckpt, f"output={tmp_path / 'model.safetensors'}")
    in_process("sample.py", ckpt, "n=10", f"output={tmp_path / 'samples.png'}")
    assert (tmp_path / "samples.png").stat().st_size > 100
