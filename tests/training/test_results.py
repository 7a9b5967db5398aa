"""The tables of the documents are those of the committed result files, which say what we claim."""

import json
import os
import runpy
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from training.whole_files import replaced

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training" / "experiments.md").read_text()


def result(name):
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("script", ["digits_objectives", "eight_gaussians"])
def test_a_table_of_the_documents_is_drawn_from_its_result_file(monkeypatch, script):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    table = __import__(script).markdown(result(script)["rows"])
    assert table in PAGE


def test_the_block_of_fashion_mnist_is_drawn_from_its_result_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    path = ROOT / "docs" / "results" / "fashion_mnist_h100.json"
    drawn = __import__("fashion_mnist").block(json.loads(path.read_text()), path)
    assert f"<!-- begin fashion_mnist -->\n{drawn}<!-- end fashion_mnist -->" in PAGE
    assert list(path.parent.glob("fashion_mnist_*.json")) == [path]


def test_few_step_models_beat_flow_matching_in_one_step_on_clothes():
    """In the same time, of compiled runs, judged by one classifier."""
    rows = {row["objective"]: row for row in result("fashion_mnist_h100")["rows"]}
    assert set(rows) == {"flow_matching", "meanflow", "scm"}
    assert all(row["compile"] and row["batch_size"] == 64 for row in rows.values())
    seconds = [row["seconds"] for row in rows.values()]
    assert max(seconds) < 1.02 * min(seconds)
    distance = {name: row["scores"]["1"]["frechet_distance"] for name, row in rows.items()}
    assert distance["meanflow"] < distance["flow_matching"] / 20
    assert distance["scm"] < distance["flow_matching"] / 10


def test_few_step_samples_of_digits_are_recognised(monkeypatch):
    rows = {row["objective"]: row for row in result("digits_objectives")["rows"]}
    accuracy = {name: row["sample_accuracy"] for name, row in rows.items()}
    assert accuracy["meanflow"]["1"] >= 0.95
    assert accuracy["scm"]["2"] >= 0.85
    assert accuracy["scd"]["2"] >= 0.85
    # Flow matching's single step is the mean of a class, which is recognised: the distance tells.
    distance = {name: row["energy_distance"]["1"] for name, row in rows.items()}
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    few = {*__import__("digits_objectives").OBJECTIVES} - {"flow_matching"}
    through = "dmf_distillation, jvp.mode=tangent_grad"  # far from the images, as the page says
    assert few | {"flow_matching", through} == set(rows)
    assert all(distance[name] < distance["flow_matching"] / 2 for name in few)


def test_meanflow_draws_eight_gaussians_in_one_and_two_steps():
    rows = result("eight_gaussians")["rows"]
    distance = {(row["objective"], row["seed"]): row["nfe"] for row in rows}
    for seed in {row["seed"] for row in rows}:
        flow, mean = distance["flow_matching", seed], distance["meanflow", seed]
        assert mean["1"] <= 0.35 * flow["1"]
        assert mean["2"] <= 0.02


def test_the_commit_is_that_of_the_code_and_says_where_the_code_differs(tmp_path, monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    code = tmp_path / "project" / "training"
    code.mkdir(parents=True)
    shutil.copy(ROOT / "training" / "environment.py", code)
    (code.parent / "README.md").write_text("words")

    def git(*arguments):
        names = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        done = ["git", "-C", code.parent, *names, *arguments]
        return subprocess.run(done, check=True, capture_output=True, text=True).stdout.strip()

    def said():
        return runpy.run_path(str(code / "environment.py"))["environment"]()["commit"]

    git("init", "-q")
    monkeypatch.chdir(tmp_path)
    assert said() is None  # files of nobody's, in a repository
    git("add", "."), git("commit", "-qm", "all")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert said() == commit
    (code.parent / "README.md").write_text("other words")
    assert said() == commit
    with (code / "environment.py").open("a") as file:
        file.write("\n")
    assert said() == f"{commit}-dirty"


def test_a_file_that_could_not_be_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / "new folder" / "scores.json"
    with replaced(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with suppress(OSError), replaced(path) as temporary:
        temporary.write_text("half of the sec")
        raise OSError("the disk is full")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_what_is_replaced_is_what_a_link_points_to_with_its_mode(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("first")
    target.chmod(0o640)
    link.symlink_to(target)
    with replaced(link) as temporary:
        temporary.write_text("second")
    assert link.is_symlink()
    assert target.read_text() == "second"
    assert target.stat().st_mode & 0o777 == 0o640
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        replaced(tmp_path).__enter__()
    os.mkfifo(tmp_path / "pipe")
    with replaced(tmp_path / "pipe") as itself:
        assert itself == tmp_path / "pipe"
