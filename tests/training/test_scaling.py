"""The scaling script, from start to table, on two CPU processes."""

import json

import pytest

from scripts import scaling
from tests.commands import in_process, succeed
from tests.training.spawn import spawn


def work(rank, world, *arguments):
    """A process as the script starts it."""
    in_process("scaling.py", *arguments)


@pytest.mark.parametrize("starts", ["given", pytest.param("its own", marks=pytest.mark.slow)])
def test_every_arm_is_measured_and_the_errors_are_those_of_one_process(tmp_path, starts):
    output = tmp_path / "scaling.json"
    tiny = ["model.depth=2", "model.width=32", "model.heads=2", "attention=sdpa", "data.tokens=64"]
    arguments = ["--gpus", 2, "--models", "dit_b2=4", "--steps", 1, "--curve", 4, "--eager"]
    arguments += ["--set", *tiny, "trainer.precision=32-true", "optimizer.lr=0.01"]
    arguments += ["--output", output]
    if starts == "given":
        spawn(work, 2, *arguments)
    else:
        assert str(output) in succeed("scaling.py", *arguments, cwd=tmp_path).stdout
    result = json.loads(output.read_text())
    assert list(result["arms"]["dit_b2"]) == ["one", "ddp", "fsdp"]
    for row in result["arms"]["dit_b2"].values():
        assert row["images_per_s_per_gpu"] == pytest.approx(4000 / row["step_ms"], rel=0.01)
        assert f"{row['images_per_s_per_gpu']:.1f}" in scaling.table(result)
    errors = result["curves"]["error"]
    assert len(set(errors["one"])) == 4
    for kind in ("ddp", "fsdp"):
        assert errors[kind] == pytest.approx(errors["one"], rel=1e-4)


def run(gpus, **rates):
    arms = {kind: {"images_per_s_per_gpu": rate} for kind, rate in rates.items()}
    return {"gpus": gpus, "arms": {"dit_b2": arms | {"big": {"out_of_memory": True}}}}


def test_several_numbers_of_gpus_are_a_table_and_a_picture(tmp_path):
    runs = {"1": run(1, one=80.0, **{"one, graphs": 100.0}), "4": run(4, ddp=90.0, fsdp=75.0)}
    shares = scaling.efficiencies(runs)
    assert shares["dit_b2", "ddp"] == {4: pytest.approx(0.9)}  # of the best that one GPU does
    assert shares["dit_b2", "one"] == {1: pytest.approx(0.8)}
    assert ("dit_b2", "big") not in shares
    assert "| dit_b2 | fsdp |  | 0.750 |" in scaling.together(runs)
    scaling.draw(runs, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_images_that_cannot_be_dealt_out_are_refused(monkeypatch, capsys):
    given = ["scaling.py", "--gpus", "1", "4", "--models", "dit_b2=6", "--strong"]
    monkeypatch.setattr("sys.argv", given)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit):
        scaling.main()
    assert "--strong deals out dit_b2=6: not to 4 GPUs" in capsys.readouterr().err
