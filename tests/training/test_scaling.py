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
