"""Checkpoints that are written while the training goes on."""

import signal
from threading import Event
from zipfile import ZipFile

import pytest
import torch
from lightning import Callback
from torch import nn
from torch.utils._pytree import tree_flatten

from tests.training.test_training import Failing, train
from training.background_checkpoints import BackgroundCheckpointIO, storages
from training.callbacks.checkpoint import LastCheckpoint, interrupted_once
from training.checkpoints import AtomicCheckpointIO, load_checkpoint


@pytest.fixture
def held(monkeypatch):
    """Writes wait until this is set."""
    go, inner = Event(), AtomicCheckpointIO.save_checkpoint

    def save(*given):
        assert go.wait(30)
        inner(*given)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    yield go
    go.set()


def test_the_file_holds_what_was_there_when_it_was_saved(tmp_path, held, device):
    path, io = tmp_path / "last.ckpt", BackgroundCheckpointIO()
    x, y = torch.zeros(3, 5, device=device), torch.ones(4, device=device)
    state = {"config": {}, "weights": {"x": x.T, "steps": [1]}, "pair": (y, 2), "none": None}
    io.save_checkpoint(state, path)
    x += 1
    y += 1
    state["weights"]["steps"].append(2)
    assert not path.exists()
    io.check()  # it has not ended, and nothing went wrong
    held.set()
    io.finish()
    found = load_checkpoint(path)
    assert not found["weights"]["x"].any()
    assert found["weights"]["x"].shape == (5, 3)
    assert torch.equal(found["pair"][0], torch.ones(4))
    assert found["weights"]["steps"] == [1]
    assert found["pair"][1] == 2

    memory = [room.data_ptr() for room in io.host]
    io.save_checkpoint(state, path)  # in the same memory
    io.finish()
    assert [room.data_ptr() for room in io.host] == memory
    assert load_checkpoint(path)["weights"]["x"].sum() == 15
    io.save_checkpoint({**state, "pair": (y.double()[:2], 2)}, path)  # of another kind
    io.teardown()
    assert torch.equal(load_checkpoint(path)["pair"][0], torch.full((2,), 2.0).double())
    assert not io.host


def test_room_that_was_made_before_is_used(tmp_path, device):
    state = {"config": {}, "x": torch.ones(6, device=device), "y": torch.zeros(3, device=device)}
    io = BackgroundCheckpointIO()
    io.reserve(state)
    io.finish()
    memory = {room.data_ptr() for room in io.host}
    assert len(memory) == (2 if device == "cuda" else 0)
    io.save_checkpoint(dict(reversed(state.items())), tmp_path / "last.ckpt")
    io.finish()
    if device == "cuda":
        assert {room.data_ptr() for room in io.host} == memory
        assert all(room.is_pinned() for room in io.host)
    found = load_checkpoint(tmp_path / "last.ckpt")
    assert (found["x"].sum(), found["y"].sum()) == (6, 0)


def test_the_first_step_makes_room_for_what_is_saved(tmp_path, monkeypatch):
    kinds = []

    def reserve(_io, checkpoint):
        kinds.append(sorted(len(x) for x in storages(checkpoint)))

    monkeypatch.setattr(BackgroundCheckpointIO, "reserve", reserve)
    train(tmp_path, 3, LastCheckpoint(tmp_path / "checkpoints"))
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert kinds == [sorted(len(x) for x in storages(saved))]


def test_the_file_is_the_one_that_is_written_at_once(tmp_path, device):
    """Shared memory, strides, what a state_dict has beside its tensors, and no byte more."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(device)
    w = torch.arange(6.0, device=device).view(2, 3)
    state = {
        "config": {},
        "state_dict": net.state_dict(),
        "shared": [w, w.T, w[1:], (w, None)],
        "empty": [torch.empty(0, device=device), torch.empty(0, 3, dtype=torch.int64)],
        "dtypes": [w.to(dtype) for dtype in (torch.bfloat16, torch.int64, torch.bool)],
    }
    AtomicCheckpointIO().save_checkpoint(state, tmp_path / "at_once.ckpt")
    io = BackgroundCheckpointIO()
    io.save_checkpoint(state, tmp_path / "beside.ckpt")
    io.finish()
    files = [tmp_path / f"{name}.ckpt" for name in ("at_once", "beside")]
    sizes = [[r.file_size for r in ZipFile(f).infolist() if "/data/" in r.filename] for f in files]
    assert sorted(sizes[0]) == sorted(sizes[1])
    a, b = map(load_checkpoint, files)
    assert a["state_dict"]._metadata == b["state_dict"]._metadata
    assert len({x.untyped_storage().data_ptr() for x in b["shared"][:3]}) == 1
    leaves = [tree_flatten(x)[0] for x in (a, b)]
    assert len(leaves[0]) == len(leaves[1])
    for x, y in zip(*leaves, strict=True):
        if isinstance(x, torch.Tensor):
            assert (x.stride(), x.dtype) == (y.stride(), y.dtype)
            assert torch.equal(x, y)
        else:
            assert x == y


def interrupted():
    raise KeyboardInterrupt


def test_an_interrupt_of_the_wait_forgets_no_write(tmp_path, held, monkeypatch):
    io, x = BackgroundCheckpointIO(), torch.zeros(2)
    io.save_checkpoint({"config": {}, "x": x}, tmp_path / "a.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(io.pending, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            io.finish()
    assert io.pending is not None
    held.set()
    io.finish()
    assert load_checkpoint(tmp_path / "a.ckpt")["x"].sum() == 0


def test_the_next_save_waits_for_the_one_before(tmp_path, held):
    io, x = BackgroundCheckpointIO(), torch.zeros(2)
    io.save_checkpoint({"config": {}, "x": x}, tmp_path / "a.ckpt")
    x += 1
    held.set()
    io.save_checkpoint({"config": {}, "x": x}, tmp_path / "b.ckpt")
    io.finish()
    assert [load_checkpoint(tmp_path / f"{n}.ckpt")["x"].sum() for n in "ab"] == [0, 2]


def test_a_failed_write_ends_the_run_and_is_not_tried_again(tmp_path, monkeypatch):
    calls = []

    def save(*_):
        calls.append(0)
        raise OSError("the disk is full")

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    says = f"the disk is full; when it can be, start again with .*hydra.run.dir={tmp_path}"
    with pytest.raises(OSError, match=says):
        train(tmp_path, 60, LastCheckpoint(tmp_path / "checkpoints", every_n_steps=2))
    assert len(calls) == 1


def test_a_signal_hides_no_failed_write(tmp_path, monkeypatch):
    class Signal(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    def save(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    last = LastCheckpoint(tmp_path / "checkpoints")
    with pytest.raises(OSError, match="the disk is full"), interrupted_once([last]):
        train(tmp_path, 8, last, Signal())


def test_a_run_that_fails_during_a_write_ends_with_a_whole_file(tmp_path, held):
    class Release(Callback):
        def on_exception(self, *_):
            assert not (tmp_path / "checkpoints" / "last.ckpt").exists()
            held.set()

    last = LastCheckpoint(tmp_path / "checkpoints", every_n_steps=5)
    with pytest.raises(ValueError, match="no"):
        train(tmp_path, 8, Release(), last, Failing("on_train_batch_end", ValueError))
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 5
