"""Both arms trained for seconds, judged and put beside each other: on coloured bars."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import openclipart
from training.callbacks.snapshots import Snapshots
from training.data.packed import write_pack

CLASSES = ["red", "green", "blue"]
TINY = ["trainer=cpu", "data.batch_size=8", "model.depth=1", "model.width=32", "model.heads=2"]
TINY += ["model.patch=4", "trainer.log_every_n_steps=1", "trainer.precision=32-true"]
TINY += ["data.num_workers=0", "callbacks.page=null"]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A bar of the class's colour, as wide as chance will have it, on white."""
    draws, labels = np.random.default_rng(0), np.arange(450) % 3
    images = np.full((450, 3, 8, 8), 255)
    for image, label in zip(images, labels, strict=True):
        left = draws.integers(0, 6)
        image[:, :, left : left + draws.integers(1, 4)] = draws.integers(0, 120)
        image[label, :, left : left + 1] = 255
    path = tmp_path_factory.mktemp("pack") / "bars.npz"
    write_pack(path, images, labels, np.arange(450) >= 300, CLASSES, {"source": "bars"})
    return path


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", list(map(str, ["", *arguments])))
    openclipart.main()


@pytest.fixture(scope="module")
def arms(pack, tmp_path_factory):
    """The folder of both results."""
    folder = tmp_path_factory.mktemp("out")
    arguments = ["--pack", pack, "--output", folder, "--minutes", 0.05, "--snapshots", 2]
    arguments += ["--n", 100, "--classifier-steps", 40, "--rows", 1]
    with pytest.MonkeyPatch.context() as monkeypatch:
        called(monkeypatch, "--arm", "jvp", "--arm", "sdpa", *arguments, *TINY)
    return folder


def test_an_arm_leaves_its_result_and_its_pictures(arms):
    for arm in ("jvp", "sdpa"):
        result = json.loads((arms / f"{arm}.json").read_text())
        (row,) = result["rows"]
        assert row["arm"] == arm
        assert row["overrides"] == TINY
        assert row["images"] == 8 * row["steps"] > 0
        assert row["seconds"] > 2.5  # ended by its time, three seconds
        assert row["images_per_s"] == pytest.approx(row["images"] / row["seconds"])
        seconds = [point["seconds"] for point in row["over_time"]]
        assert seconds == sorted(seconds)
        assert seconds[-1] == row["seconds"]
        assert len(seconds) in (1, 2, 3)  # the end, and snapshots before it on a fast machine
        last = row["over_time"][-1]["frechet_distance"]
        assert last == row["scores"]["1"]["frechet_distance"]
        assert max(row["curve"]["seconds"]) <= 1.001 * row["seconds"]
        for scores in row["scores"].values():
            assert scores["frechet_distance"] > result["real"]["halves"]
            assert scores["frechet_held_out"] > 0
        assert result["real"]["held_out"]["accuracy"] > 0.8  # the classifier knows colours
        assert result["columns"] == CLASSES
        with np.load(arms / f"{arm}.npz") as file:
            shapes = {name: file[name].shape for name in file.files}
        assert shapes == dict.fromkeys(["real", f"{arm}\n1 NFE", f"{arm}\n2 NFE"], (3, 3, 8, 8))
        with Image.open(arms / f"{arm}.png") as picture:
            assert picture.width > picture.height / 3


def test_arms_are_put_beside_each_other(arms, tmp_path, monkeypatch, capsys):
    output, page = tmp_path / "both.json", tmp_path / "page.md"
    page.write_text("a\n<!-- begin openclipart -->\nold\n<!-- end openclipart -->\nb\n")
    results = [arms / "jvp.json", arms / "sdpa.json"]
    called(monkeypatch, "--report", *results, "--output", output, "--document", page)
    result = json.loads(output.read_text())
    assert [row["arm"] for row in result["rows"]] == ["jvp", "sdpa"]
    table = openclipart.markdown(result)
    assert table in capsys.readouterr().out
    assert table in page.read_text()
    assert "old" not in page.read_text()
    assert (tmp_path / "both_curves.png").read_bytes().startswith(b"\x89PNG")
    with Image.open(output.with_suffix(".png")) as both, Image.open(arms / "jvp.png") as one:
        assert both.width == one.width
        assert both.height > one.height


@pytest.mark.parametrize("key", ["minutes", "batch_size", "classifier"])
def test_arms_that_differ_in_more_than_the_attention_are_refused(arms, tmp_path, key):
    result = json.loads((arms / "sdpa.json").read_text())
    (result if key in result else result["rows"][0])[key] = "another"
    other = tmp_path / "sdpa.json"
    other.write_text(json.dumps(result))
    other.with_suffix(".npz").write_bytes((arms / "sdpa.npz").read_bytes())
    with pytest.raises(ValueError, match=f"differ in {key}"):
        openclipart.merged([arms / "jvp.json", other])


def test_a_finished_arm_is_not_trained_again(arms, pack, tmp_path, monkeypatch):
    """Judged anew from its run, with the classifier that is kept."""
    steps = json.loads((arms / "jvp.json").read_text())["rows"][0]["steps"]
    arguments = ["--pack", pack, "--output", tmp_path, "--runs", arms / "runs", "--minutes", 0.05]
    arguments += ["--snapshots", 2, "--n", 100, "--classifier-steps", 40, *TINY]
    called(monkeypatch, "--arm", "jvp", *arguments)
    result = json.loads((tmp_path / "jvp.json").read_text())
    assert result["rows"][0]["steps"] == steps


def test_wrong_arguments_are_named(pack, tmp_path, monkeypatch, capsys):
    for arguments, says in (
        ([], "give either --arm or --report"),
        (["--arm", "jvp"], "--arm needs --pack"),
    ):
        with pytest.raises(SystemExit):
            called(monkeypatch, *arguments, "--output", tmp_path)
        assert says in capsys.readouterr().err


def test_the_clock_of_a_resumed_run_goes_on(tmp_path):
    module = SimpleNamespace(net=torch.nn.Linear(1, 1))
    first = Snapshots(str(tmp_path), seconds=10.0)
    first.on_train_start(None, module)
    first.start -= 25
    first.written = 2
    second = Snapshots(str(tmp_path), seconds=10.0)
    second.load_state_dict(first.state_dict())
    second.on_train_start(None, module)
    assert 25 <= second.seconds() < 30
    assert second.written == 2  # the third is due at 30 seconds
