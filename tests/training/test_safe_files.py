"""Files that were damaged, and run directories that two processes want."""

import fcntl
import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from safetensors.torch import load_file, save, save_file

from tests.commands import FAST, ROOT, in_process, rows
from training.checkpoints import AtomicCheckpointIO, load_checkpoint
from training.checksums import Sealed, sealed_safetensors, verify_safetensors
from training.cli import LONGEST, short
from training.lock import run_lock

KEYS = {"config": {}, "data": {}, "global_step": 3}


def content():
    torch.manual_seed(0)
    return KEYS | {"state_dict": {"a": torch.randn(30, 3), "b": torch.arange(5.0)}}


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_any_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(), path)
    assert load_checkpoint(path)["state_dict"]["b"].tolist() == [0, 1, 2, 3, 4]
    assert torch.load(path)["global_step"] == 3  # other readers pass the checksum over
    whole, draw = path.read_bytes(), random.Random(0)
    places = [*range(40), *range(len(whole) - 60, len(whole))]
    for place in [*places, *draw.sample(range(len(whole)), 300)]:
        path.write_bytes(flipped(whole, place, draw.randrange(8)))
        with pytest.raises(ValueError, match=r"last\.ckpt is (damaged|not a readable)"):
            load_checkpoint(path)
    for cut in (whole[:-1], whole[: len(whole) // 2], whole + b"x"):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=r"last\.ckpt is damaged: .*copy the file again"):
            load_checkpoint(path)


def test_a_checkpoint_of_an_earlier_version_loads_and_its_records_are_verified(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(content(), path)
    assert load_checkpoint(path)["global_step"] == 3
    whole = path.read_bytes()
    place = whole.index(content()["state_dict"]["a"].numpy().tobytes())
    path.write_bytes(flipped(whole, place + 17, 3))
    assert torch.load(path)["global_step"] == 3  # PyTorch itself does not look
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [5, 1, 0, 40], [2, 2]])
def test_a_seal_passes_on_what_it_is_given_whatever_the_portions(tmp_path, sizes):
    with (tmp_path / "x").open("wb") as file, Sealed(file) as sealed:
        for size in sizes:
            assert sealed.write(b"a" * size) == size
        sealed.write(b"\0\0")
    written = (tmp_path / "x").read_bytes()
    assert written.startswith(b"a" * sum(sizes) + b"\x18\0flash-jvp crc32 ")


def exported(path, sealed=True):
    state = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
    meta = {"step": 1, "weights": "net", "checksum": True, "config": {}, "data": {}}
    metadata = {"format": "pt", "flash_jvp": json.dumps(meta)}
    if sealed:
        path.write_bytes(sealed_safetensors(lambda metadata: save(state, metadata), metadata))
    else:
        save_file(state, path, metadata)


def test_any_flipped_bit_of_an_exported_file_is_found(tmp_path):
    from training.loading import _read_exported

    path = tmp_path / "model.safetensors"
    exported(path)
    assert verify_safetensors(path)
    assert load_file(path)["a"].sum() == 66
    whole, draw = path.read_bytes(), random.Random(0)
    for place in range(len(whole)):
        path.write_bytes(flipped(whole, place, draw.randrange(8)))
        with pytest.raises(ValueError, match=r"model\.safetensors (is|was|has)"):
            _read_exported(path)
    path.write_bytes(flipped(whole, len(whole) - 3, 3))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*or export it again"):
        _read_exported(path)


def test_an_exported_file_without_the_checksum_that_it_speaks_of_is_refused(tmp_path):
    from training.loading import _read_exported

    exported(tmp_path / "a.safetensors", sealed=False)
    with pytest.raises(ValueError, match="damaged"):
        _read_exported(tmp_path / "a.safetensors")


HOLD = """
import sys
from pathlib import Path
from training.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path``."""
    arguments = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_trains_in_the_directory(tmp_path, holder):
    with pytest.raises(FileExistsError) as error, run_lock(tmp_path):
        pass
    host = os.uname().nodename
    assert f"process {holder.pid} on {host} (since 20" in str(error.value)
    assert str(tmp_path) in str(error.value)
    start = time.monotonic()
    says = r"did not end within 0\.3 s"
    with pytest.raises(FileExistsError, match=says), run_lock(tmp_path, wait=0.3):
        pass
    assert time.monotonic() - start >= 0.3


def test_one_that_waits_goes_on_when_the_holder_was_killed(tmp_path, holder, capsys):
    holder.kill()
    lock = fcntl.LOCK_EX | fcntl.LOCK_NB
    file = (tmp_path / "run.lock").open()
    with file, run_lock(tmp_path, wait=30), pytest.raises(BlockingIOError):
        fcntl.flock(file, lock)
    with run_lock(tmp_path):  # given back
        pass


def test_the_other_ranks_wait_until_rank_0_has_the_directory(tmp_path, monkeypatch):
    start = time.monotonic()
    with run_lock(tmp_path, rank=1, wait=0.5):  # nobody comes: it goes on all the same
        pass
    assert time.monotonic() - start >= 0.5
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with run_lock(tmp_path):
        start = time.monotonic()
        with run_lock(tmp_path, rank=1, wait=20):
            pass
        assert time.monotonic() - start < 10


def test_a_file_system_without_locks_is_said_and_does_not_stop_the_run(
    tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path):
        pass
    assert "no locks (Function not implemented)" in capsys.readouterr().err


def refused(capfd, *arguments):
    with pytest.raises(SystemExit) as stopped:
        in_process("train.py", *arguments)
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The arguments and the directory of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [
        *FAST,
        "callbacks.sample_quality=null",
        "callbacks.samples=null",
        "trainer.max_steps=2",
    ]
    arguments += ["objective=flow_matching", "trainer.log_every_n_steps=1"]
    in_process("train.py", *arguments, f"hydra.run.dir={folder}")
    return arguments, folder


def test_two_runs_do_not_share_a_directory(run, capfd):
    arguments, folder = run
    before = (folder / "metrics.csv").read_bytes()
    for ckpt in ("last", "auto"):
        with run_lock(folder):
            more = ["trainer.max_steps=3", f"ckpt_path={ckpt}", "lock_wait=0.1"]
            line = refused(capfd, *arguments, *more, f"hydra.run.dir={folder}")
        assert f"hydra.run.dir: process {os.getpid()} on " in line
    assert (folder / "metrics.csv").read_bytes() == before
    assert len(rows(folder)) == 2


def test_a_damaged_checkpoint_is_neither_resumed_nor_distilled(run, capfd, tmp_path):
    arguments, folder = run
    path = tmp_path / "last.ckpt"
    whole = (folder / "checkpoints" / "last.ckpt").read_bytes()
    path.write_bytes(flipped(whole, len(whole) // 2, 0))
    teacher = ["objective=scd", f"objective.teacher.ckpt={path}"]
    for number, more in enumerate([[f"ckpt_path={path}"], teacher, [f"init_from={path}"]]):
        target = tmp_path / str(number)
        line = refused(capfd, *arguments, *more, f"hydra.run.dir={target}")
        assert f"{path} is damaged" in line
        assert [p.name for p in target.iterdir()] == ["run.lock"]


def test_a_teacher_of_another_shape_is_told_before_anything_is_written(run, capfd, tmp_path):
    arguments, folder = run
    ckpt = f"objective.teacher.ckpt={folder / 'checkpoints' / 'last.ckpt'}"
    more = ["objective=scd", "data=blobs", "data.tokens=16", f"hydra.run.dir={tmp_path}", ckpt]
    line = refused(capfd, *arguments, *more)
    assert "objective.teacher.ckpt must be of a network for the data that is trained on" in line
    assert "images (3, 8, 8) of 10 classes; it is for images (1, 8, 8) of 10 classes" in line
    assert [p.name for p in tmp_path.iterdir()] == ["run.lock"]


def test_a_sweep_with_many_overrides_has_names_that_the_disk_takes():
    many = ",".join(f"optimizer.some_option_{i}=0.{i}" for i in range(18))
    others = {short(f"{many},seed={seed}") for seed in range(3)}
    assert len(others) == 3
    assert all(len(name) <= LONGEST and name.startswith("optimizer.some") for name in others)
    assert short("data.path=/a/b,seed=1") == "data.path=/a/b,seed=1"
    assert "/" not in short("data.path=/" + "ä" * 300)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", return_hydra_config=True)
    with open_dict(config):
        config.hydra.job.override_dirname = many
    assert config.hydra.sweep.subdir == short(many)
