"""``resume=RUN``: a run goes on with its own settings; its config.yaml is data."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from tests.commands import FAST, in_process, rows
from tests.test_configs import CONFIGS, composed
from training.checkpoints import load_checkpoint
from training.resuming import directory
from training.threads import choose_threads

LIGHT = [
    *FAST,
    "callbacks.sample_quality=null",
    "callbacks.samples=null",
    "trainer.log_every_n_steps=1",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two steps of flow matching with settings that are nobody's default."""
    run = tmp_path_factory.mktemp("base") / "run"
    given = ["objective=flow_matching", "optimizer.lr=1e-3", "trainer.max_steps=2"]
    in_process("train.py", *LIGHT, *given, f"hydra.run.dir={run}")
    return run


@pytest.fixture
def run(base, tmp_path):
    """The same, moved to a path that Hydra would misread."""
    moved = tmp_path / "seed=0 [moved]"
    shutil.copytree(base, moved)
    return moved


def refused(capfd, *arguments):
    with pytest.raises(SystemExit) as stopped:
        in_process("train.py", *arguments)
    lines = capfd.readouterr().err.strip().splitlines()
    assert (stopped.value.code, len(lines)) == (1, 1), lines
    return lines[0]


def test_a_run_goes_on_with_its_settings_wherever_it_lies(run, base):
    before = (base / "metrics.csv").read_text()
    said = in_process(
        "train.py", f"resume={run}", "trainer.max_steps=4", "optimizer.min_lr_ratio=0.5"
    )
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    config = checkpoint["config"]
    assert checkpoint["global_step"] == 4
    assert config["objective"]["_target_"].endswith(".FlowMatching")
    assert (config["optimizer"]["lr"], config["optimizer"]["min_lr_ratio"]) == (1e-3, 0.5)
    assert (config["model"]["width"], config["trainer"]["max_steps"]) == (48, 4)
    assert len(rows(run)) == 4
    assert "resumed with other settings: " in said
    assert "trainer.max_steps=4 (it was 2)" in said
    assert "resume=" not in said
    assert OmegaConf.load(run / "config.yaml").resume is None
    assert (base / "metrics.csv").read_text() == before  # nothing is written where it was
    assert "nothing to do" in in_process("train.py", f"resume={run}")


def test_a_hostile_configuration_is_refused_and_names_nothing_to_be_trusted(run, capfd):
    config = OmegaConf.load(run / "config.yaml")
    config.callbacks.samples = {"_target_": "os.mkdir", "path": str(run / "pwned")}
    config.trusted = ["os.mkdir"]
    OmegaConf.save(config, run / "config.yaml")
    before = sorted(run.rglob("*"))
    line = refused(capfd, f"resume={run}", "trainer.max_steps=4")
    assert "callbacks.samples._target_=os.mkdir in its configuration is no callback" in line
    assert str(run / "config.yaml") in line
    assert sorted(run.rglob("*")) == before


def test_what_cannot_be_resumed_is_said(run, tmp_path, capfd):
    says = "resume: nowhere has no config.yaml; give the directory of a run"
    assert says in refused(capfd, "resume=nowhere")
    assert not (tmp_path / "nowhere").exists()
    line = refused(capfd, f"resume={run}", "objective=tvm")
    assert "objective: groups are the run's with resume=RUN; give single keys" in line
    assert f"hydra.run.dir is that of resume={run}; leave" in refused(
        capfd, f"resume={run}", f"hydra.run.dir={tmp_path}"
    )
    assert "was trained with other settings" in refused(capfd, f"resume={run}", "model.depth=3")


def test_the_directory_is_that_of_the_run(run):
    given = ["seed=1", f'resume="{run}"']
    assert directory(given) == [*given, f'hydra.run.dir="{run}"']
    of_a_process = [*given, f'hydra.run.dir="{run}"']  # that Lightning starts beside this one
    assert directory(of_a_process)[-1] == of_a_process[-1]
    assert directory(["seed=1", "resume=null"]) == ["seed=1", "resume=null"]


@pytest.mark.parametrize(
    ("given", "threads", "says"),
    [
        ([], 1, "one thread of 2, enough for a network of width 96; threads=2 takes all"),
        (["model=dit_b2"], 2, ""),
        (["model=unet"], 2, ""),
        (["model.width=512"], 2, ""),
        (["threads=2"], 2, ""),
        (["model=dit_b2", "threads=1"], 1, ""),
    ],
)
def test_a_small_network_takes_one_thread_and_says_so(monkeypatch, given, threads, says):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    now = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    assert choose_threads(composed(*given)) == says
    assert now == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    now[0] = 2
    assert choose_threads(composed()) == ""
    assert now == [2]


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (12, 6), (64, 8)])
def test_beside_a_gpu_half_of_the_cores_are_left_to_others(monkeypatch, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    now = [cores]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    assert choose_threads(composed("trainer=gpu")) == ""
    assert now == [threads]


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("compare_report.py", ["nowhere", "--name", "a", "--title", "b"], "OUTPUT: nowhere has no"),
        ("compare_report.py", ["--docs", "nowhere"], "--docs: there is no directory nowhere/res"),
        ("fashion_mnist.py", ["nowhere", "--output", "x.json"], "runs: nowhere has no config.yaml"),
        ("fashion_mnist.py", ["--output", "x.json"], "--output: there is no file x.json"),
        ("digits_objectives.py", ["nowhere"], "nowhere has no summary.json; give runs that have"),
    ],
)
def test_what_a_script_misses_is_one_line(tmp_path, monkeypatch, capfd, script, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        in_process(script, *arguments)
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert error.startswith(f"error: {says}")
    assert not list(tmp_path.iterdir())


def test_all_objectives_are_trained_one_after_the_other(tmp_path, monkeypatch):
    from scripts import digits_objectives

    called = []
    monkeypatch.setattr(
        digits_objectives.subprocess, "run", lambda given, check: called.append(given[2:])
    )
    for name in ("flow_matching", "lsd"):  # these have ended
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(json.dumps({}))
    teacher = tmp_path / "flow_matching" / "checkpoints" / "last.ckpt"
    with pytest.raises(FileNotFoundError, match="scd needs its teacher"):
        digits_objectives.train_all(["scd"], tmp_path, [])
    teacher.touch()
    digits_objectives.train_all(list(digits_objectives.OBJECTIVES), tmp_path, ["seed=1"])
    trained = [given[0].removeprefix("objective=") for given in called]
    assert set(trained) == set(digits_objectives.OBJECTIVES) - {"flow_matching", "lsd"}
    groups = {p.stem for p in (CONFIGS / "objective").glob("*.yaml")} - {"flow_map"}
    assert set(digits_objectives.OBJECTIVES) == groups
    for given in called:
        name = given[0].removeprefix("objective=")
        config = composed(*[a for a in given if not a.startswith("hydra.")])
        assert digits_objectives.name(config) == name
        assert config.seed == 1
        wanted = config.objective.get("teacher") is not None
        assert (f"objective.teacher.ckpt={teacher}" in given) == wanted
