"""Runs that end early, in whatever way, and go on as if they had not."""

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch

from tests import commands
from tests.commands import FAST, column, in_process, rows, succeed
from training.checkpoints import load_checkpoint

EXACT = ("train/loss", "train/error", "train/v_loss", "train/grad_norm", "train/lr")
# The schedule is constant, so that every run is the beginning of a longer one.
ENDLESS = [*FAST, "trainer.log_every_n_steps=1", "optimizer.schedule=constant", "attention=sdpa"]
ENDLESS += ["callbacks.sample_quality=null", "callbacks.samples=null", "model.dropout=0.1"]
ENDLESS += ["callbacks.ema.decay=[0.9,0.99]", "callbacks.ema.power=[0.1]"]


def start(run, printed, *arguments):
    """A run without end that has made at least eight steps."""
    endless = [*ENDLESS, "trainer.max_steps=1000000", *arguments]
    process = commands.start("train.py", *endless, cwd=run, printed=printed)
    deadline = time.monotonic() + 120
    while not (run / "metrics.csv").exists() or len(rows(run)) < 8:
        assert process.is_alive(), (printed / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    often = ["ckpt_path=auto", "callbacks.checkpoint.every_n_steps=3"]
    process = start(killed, tmp_path, f"hydra.run.dir={killed}", *often)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    checkpoint = killed / "checkpoints" / "last.ckpt"
    assert 3 <= load_checkpoint(checkpoint)["global_step"] <= len(rows(killed))

    end = f"trainer.max_steps={len(rows(killed)) + 5}"
    succeed("train.py", *ENDLESS, end, "ckpt_path=auto", f"hydra.run.dir={killed}", cwd=tmp_path)
    in_process("train.py", *ENDLESS, end, f"hydra.run.dir={whole}")
    assert column(killed, "step") == column(whole, "step") == list(range(len(rows(whole))))
    for name in EXACT:
        assert column(killed, name) == column(whole, name), name
    a, b = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (killed, whole))
    for name, weight in a["state_dict"].items():
        assert torch.equal(weight, b["state_dict"][name]), name
    for average, weights in a["ema"]["averages"].items():
        for name, weight in weights.items():
            assert torch.equal(weight, b["ema"]["averages"][average][name]), (average, name)


def test_a_resumed_run_is_the_run_that_it_was(tmp_path, capfd):
    run = ["train.py", *FAST, "attention=sdpa", f"hydra.run.dir={tmp_path}"]
    run += [
        "callbacks.sample_quality=null",
        "optimizer.schedule=constant",
        "optimizer.warmup_steps=0",
    ]
    in_process(*run, "trainer.max_steps=2")
    config = (tmp_path / "config.yaml").read_text()
    more = ["trainer.max_steps=3", "ckpt_path=last", "seed=1"]
    depth, fm = "model.depth=1 (it was 2), seed=1 (it was 0); give", ["objective=flow_matching"]
    for others, names, insist in (
        ([], "now seed=1 (it was 0); give", "[seed]"),
        (["model.depth=1"], depth, "[model.depth,seed]"),
        (["model.depth=1", "allow_config_changes=[seed]"], "model.depth=1", "[seed,model.depth]"),
        (fm, "objective._target_=training.objectives.flow_matching", "[objective,seed]"),
        (["attention=jvp"], "attention._target_=jvp_flash_attention.attention", "[attention"),
        (["callbacks.ema=null"], "callbacks.ema=null (it was {...})", "[seed,callbacks.ema]"),
    ):
        with pytest.raises(SystemExit):
            in_process(*run, *more, *others)
        error = capfd.readouterr().err
        assert names in error
        assert f"allow_config_changes={insist}" in error
        assert len(error.splitlines()) == 1
    with pytest.raises(SystemExit):
        in_process(*run, *more, "allow_config_changes=[seed, modle.depth]")
    assert "allow_config_changes: no setting is called modle.depth" in capfd.readouterr().err
    with pytest.raises(SystemExit):  # not before the checkpoint is read
        in_process(*run, *more, "allow_config_changes=[seed]", "callbacks.ema.decay=0.5")
    assert "an average cannot begin in the middle of a run" in capfd.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == config
    free = ["optimizer.lr=1e-4", "callbacks.samples=null", "logger=csv", "compile=false"]
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    checkpoint["callbacks"]["Summary"]["seconds"] += 1000
    torch.save(checkpoint, path)
    says = in_process(*run, *more, *free, "allow_config_changes=[seed]")
    assert 1000 < json.loads((tmp_path / "summary.json").read_text())["seconds"] < 1100
    told = "optimizer.lr=0.0001 (it was 0.002), trainer.max_steps=3 (it was 2)"
    told += ", callbacks.samples=null (it was {...}), compile=false (it was null) and 1 more"
    assert f"resumed with other settings: {told}\n" in says
    assert column(tmp_path, "train/lr")[-1] == pytest.approx(1e-4)  # not the checkpoint's


def test_a_sweep_goes_on_behind_a_run_that_fails(tmp_path):
    runs = ["-m", "optimizer.lr=-1,1e-3", f"hydra.sweep.dir={tmp_path}", "trainer.max_steps=1"]
    few = [*FAST, "callbacks.samples=null", "callbacks.sample_quality=null"]
    result = commands.call("train.py", *runs, *few, cwd=tmp_path)
    assert result.returncode == 1
    first, *others = result.stderr.splitlines()
    assert first == "error: optimizer.lr must be > 0; got -1"
    assert not any("Traceback" in line for line in others)
    assert len(list(tmp_path.glob("*lr=0.001*/summary.json"))) == 1


@pytest.mark.parametrize("numbers", [[signal.SIGINT] * 2, [signal.SIGTERM], [signal.SIGHUP]])
def test_an_interrupted_run_leaves_a_checkpoint_that_resumes(tmp_path, numbers):
    """Two interrupts at once are one: whatever sends them, the checkpoint is written."""
    process = start(tmp_path, tmp_path, f"hydra.run.dir={tmp_path}")
    for number in numbers:
        os.kill(process.pid, number)
        time.sleep(0.02)
    process.join(120)
    stderr = (tmp_path / "stderr").read_text()
    assert process.exitcode == 128 + numbers[0], stderr
    assert stderr.strip().startswith("interrupted after step ")
    assert len(stderr.strip().splitlines()) == 1
    step = int(stderr.split()[3].rstrip(";"))
    # the run's own settings are among it
    python, script, *hint = shlex.split(stderr.split("resume with ")[1])
    assert (python, Path(script).name) == ("python", "train.py")
    assert hint[:2] == ["ckpt_path=last", f"hydra.run.dir={tmp_path}"]
    says = in_process("train.py", *hint, f"trainer.max_steps={step + 2}")
    changed = [line for line in says.splitlines() if line.startswith("resumed with")]
    end = f"trainer.max_steps={step + 2} (it was 1000000)"
    assert changed == [f"resumed with other settings: {end}"]
    assert column(tmp_path, "step") == list(range(step + 2))
