"""Runs that are ended by their time, and how they are collected: on grey squares of ten sizes."""

import json
import sys

import numpy as np
import pytest

from scripts import fashion_mnist
from tests.commands import FAST, column, in_process, rows
from tests.idx import write_idx
from training.checkpoints import load_checkpoint

TINY = [*FAST, "data.batch_size=8", "model.patch=8", "attention=sdpa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As many of each class; the side of a square tells its class."""
    folder = tmp_path_factory.mktemp("clothes")
    for prefix, n in (("train", 320), ("t10k", 160)):
        labels, shades = np.arange(n) % 10, np.random.default_rng(n).integers(100, 256, n)
        images = np.zeros((n, 28, 28))
        for image, label, shade in zip(images, labels, shades, strict=True):
            image[: 2 * label + 4, : 2 * label + 4] = shade
        write_idx(folder, f"{prefix}-images-idx3-ubyte", images, zipped=True)
        write_idx(folder, f"{prefix}-labels-idx1-ubyte", labels, zipped=True)
    return folder


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """One of each experiment, ended by its time; MeanFlow's went on for three steps."""
    base, found = tmp_path_factory.mktemp("runs"), []
    teacher = base / "flow_matching" / "checkpoints" / "last.ckpt"
    for name in ("flow_matching", "meanflow", "scm", "scd"):
        experiment = "fashion_mnist" + (f"_{name}" if name != "meanflow" else "")
        arguments = [f"experiment={experiment}", *TINY, f"data.path={folder}"]
        arguments += [f"hydra.run.dir={base / name}", "callbacks.ema.power=[0.1]", "sampler.nfe=1"]
        arguments += [f"objective.teacher.ckpt={teacher}"] if name == "scd" else []
        in_process("train.py", *arguments, "trainer.max_time=00:00:00:01")
        found.append(base / name)
        if name == "meanflow":
            steps = load_checkpoint(base / name / "checkpoints" / "last.ckpt")["global_step"]
            again = [*arguments, "ckpt_path=last"]
            says = in_process("train.py", *again, "trainer.max_time=00:00:00:01")
            assert "steps; raise trainer.max_time to go on" in says
            in_process(
                "train.py", *again, "trainer.max_time=null", f"trainer.max_steps={steps + 3}"
            )
            now = load_checkpoint(base / name / "checkpoints" / "last.ckpt")["global_step"]
            assert now == steps + 3
    return found


def test_a_run_that_is_ended_by_its_time_is_whole(runs):
    for run in runs:
        checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
        steps = checkpoint["global_step"]
        assert checkpoint["ema"]["updates"] == steps
        assert json.loads((run / "summary.json").read_text())["steps"] == steps
        assert (run / "samples" / f"step_{steps:06d}.png").is_file()
        assert int(rows(run)[-1]["step"]) == steps - 1
        assert column(run, "step") == sorted(set(column(run, "step")))


def test_the_checkpoint_of_an_ended_run_is_written_before_its_pictures(runs):
    for run in runs:
        (picture,) = sorted((run / "samples").iterdir())[-1:]
        assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns < picture.stat().st_mtime_ns


@pytest.mark.slow
def test_runs_are_collected_and_drawn(runs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "result.json"
    options = ["--output", output]
    command = ["", *runs, *options, "--n", 100, "--classifier-steps", 40, "--note", "a test"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    fashion_mnist.main()
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert fashion_mnist.markdown(result) in printed
    assert [row["objective"] for row in result["rows"]] == [run.name for run in runs]
    assert {tuple(row["scores"]) for row in result["rows"]} == {("1", "2", "4")}
    assert result["real"]["accuracy"] > 0.5
    for row, run in zip(result["rows"], runs, strict=True):
        assert row["images"] == 8 * row["steps"]
        assert row["curve"]["step"][-1] == row["steps"]
        assert row["curve"]["error"][-1] == pytest.approx(column(run, "train/error")[-1], rel=1e-4)
        scores = row["scores"]["1"]
        assert scores["frechet_distance"] > result["real"]["frechet_distance"]
    pictures = [tmp_path / "result.png", tmp_path / "result_curves.png"]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")

    drawn = pictures[1].read_bytes()
    for picture in pictures:
        picture.unlink()
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin fashion_mnist -->\nold\n<!-- end fashion_mnist -->\nb\n")
    monkeypatch.setattr(sys, "argv", list(map(str, ["", *options, "--document", page])))
    fashion_mnist.main()  # from the file alone
    assert fashion_mnist.markdown(result) in page.read_text()
    assert page.read_text().startswith("a\n<!-- begin fashion_mnist -->\n\n![")
    assert page.read_text().endswith("\n<!-- end fashion_mnist -->\nb\n")
    assert "old" not in page.read_text()
    assert fashion_mnist.markdown(result) in capsys.readouterr().out
    assert [picture.is_file() for picture in pictures] == [False, True]
    assert pictures[1].read_bytes() == drawn


def test_a_curve_keeps_its_mean_when_it_is_thinned(runs, monkeypatch):
    run = fashion_mnist.read_run(runs[0])
    monkeypatch.setattr(fashion_mnist, "POINTS", 1)
    curve = fashion_mnist.thinned(run)
    assert curve["error"] == [pytest.approx(np.mean(run.metrics["train/error"]), rel=1e-4)]
