"""What a user types, as Hydra reads it."""

import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from training.arguments import prepared

HOME = str(Path.home())


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


def read(*arguments):
    """Key and value of each argument, as Hydra has them."""
    found = OverridesParser.create().parse_overrides(prepared(arguments))
    return {o.key_or_group: o.value() for o in found}


@pytest.mark.parametrize(
    ("key", "typed", "path"),
    [
        ("data.path", "~/pictures", f"{HOME}/pictures"),
        ("data.path", '"~/my pictures"', f"{HOME}/my pictures"),
        ("hydra.run.dir", "~/runs", f"{HOME}/runs"),
        ("hydra.run.dir", "~", HOME),
        ("ckpt", "runs/seed=0,lr=1/last.ckpt", "runs/seed=0,lr=1/last.ckpt"),
        ("ckpt_path", "a/[1] (copy)/{x}.ckpt", "a/[1] (copy)/{x}.ckpt"),
        ("init_from", "it's.ckpt", "it's.ckpt"),
        ("objective.teacher.ckpt", 'say "so" \\ or ü#;&.ckpt', 'say "so" \\ or ü#;&.ckpt'),
        ("++data.path", "a=b", "a=b"),
        ("output", "./x/y-1.json", "./x/y-1.json"),
        ("data.path", "'a=b'", "a=b"),
        ("ckpt_path", "null", None),
        ("ckpt_path", "last", "last"),
    ],
)
def test_a_path_is_read_as_the_shell_writes_it(key, typed, path):
    assert read(f"{key}={typed}") == {key.lstrip("+"): path}


@pytest.mark.parametrize(
    "argument",
    [
        "seed=3",
        "weights=[ema,net]",
        "runs=[a,b]",
        "hydra.run.dir=outputs/${now:%H}",
        "model.norm=rms",
        "~logger.wandb",
        "data.path=/usr/share/x",
    ],
)
def test_everything_else_stays_as_it_is(argument):
    assert prepared([argument]) == [argument]


def test_a_sweep_over_paths_stays_one():
    assert prepared(["-m", "data.path=a,b"]) == ["-m", "data.path=a,b"]
    assert prepared(["-m", "data.path=a=1,b"]) == ["-m", 'data.path="a=1,b"']
    assert read("data.path=a,b") == {"data.path": "a,b"}


def test_every_argument_of_lightnings_trainer_may_be_given(monkeypatch):
    given = ["trainer.limit_val_batches=2", "trainer.max_steps=3", "trainer.callbacks=[]"]
    once = prepared(given)
    assert once == ["++trainer.limit_val_batches=2", *given[1:]]
    assert prepared(once) == once
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    assert prepared(given) == given
    assert prepared(["sampler.nfe=2"], adopted="sampler") == ["++sampler.nfe=2"]


def test_a_group_is_left_out_by_null_where_a_run_can_do_without(monkeypatch):
    given = ["budget=null", "recipe=null", "experiment=null", "context_parallel=null"]
    assert prepared(given) == ["~budget", "~recipe", "context_parallel=null"]
    with pytest.raises(ValueError, match=r"logger must be one of csv, wandb, .*, got null"):
        prepared(["logger=null"])
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    assert prepared(["sampler=null"]) == ["sampler=null"]


def test_two_words_are_told_to_be_one():
    with pytest.raises(ValueError, match=r"max_steps 20: write trainer\.max_steps=20"):
        prepared(["trainer.max_steps", "20"])
    assert prepared(["-m", "seed=1", "--cfg", "job"]) == ["-m", "seed=1", "--cfg", "job"]


def test_slurm_is_asked_for_where_it_is(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"hydra=slurm: .* no srun on this machine"):
        prepared(["-m", "hydra=slurm"])
    with pytest.raises(ValueError, match=r"hydra=slurm needs -m"):
        prepared(["hydra=slurm"])
    assert prepared(["hydra=slurm", "--cfg", "job"]) == ["hydra=slurm", "--cfg", "job"]
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/srun")
    assert prepared(["-m", "hydra=slurm"]) == ["-m", "hydra=slurm"]
