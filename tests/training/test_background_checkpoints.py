"""Checkpoints that are written while the training goes on."""

from threading import Event

import pytest
import torch
from lightning import Callback

from tests.training.test_training import Failing, train
from training.background_checkpoints import BackgroundCheckpointIO
from training.callbacks.checkpoint import LastCheckpoint
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

    memory = {key: room.data_ptr() for key, room in io.host.items()}
    io.save_checkpoint(state, path)  # in the same memory
    io.finish()
    assert {key: room.data_ptr() for key, room in io.host.items()} == memory
    assert load_checkpoint(path)["weights"]["x"].sum() == 15
    io.save_checkpoint({**state, "pair": (y.double()[:2], 2)}, path)  # of another kind
    io.teardown()
    assert torch.equal(load_checkpoint(path)["pair"][0], torch.full((2,), 2.0).double())
    assert not io.host


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
    with pytest.raises(OSError, match="the disk is full"):
        train(tmp_path, 60, LastCheckpoint(tmp_path / "checkpoints", every_n_steps=2))
    assert len(calls) == 1


def test_a_run_that_fails_during_a_write_ends_with_a_whole_file(tmp_path, held):
    class Release(Callback):
        def on_exception(self, *_):
            assert not (tmp_path / "checkpoints" / "last.ckpt").exists()
            held.set()

    last = LastCheckpoint(tmp_path / "checkpoints", every_n_steps=5)
    with pytest.raises(ValueError, match="no"):
        train(tmp_path, 8, Release(), last, Failing("on_train_batch_end", ValueError))
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 5
