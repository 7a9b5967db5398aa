"""The scaling script, from start to table, on two CPU processes."""

import json

import pytest

from tests.commands import succeed


@pytest.mark.slow
def test_every_arm_is_measured_and_the_errors_are_those_of_one_process(tmp_path):
    output = tmp_path / "scaling.json"
    tiny = ["model.depth=2", "model.width=32", "model.heads=2", "attention=sdpa", "data.tokens=64"]
    arguments = ["--gpus", 2, "--models", "dit_b2=4", "--steps", 1, "--curve", 4, "--eager"]
    arguments += ["--set", *tiny, "trainer.precision=32-true", "optimizer.lr=0.01"]
    printed = succeed("scaling.py", *arguments, "--output", output, cwd=tmp_path).stdout
    result = json.loads(output.read_text())
    assert list(result["arms"]["dit_b2"]) == ["one", "ddp", "fsdp"]
    for row in result["arms"]["dit_b2"].values():
        assert row["images_per_s_per_gpu"] == pytest.approx(4000 / row["step_ms"], rel=0.01)
        assert f"{row['images_per_s_per_gpu']:.1f}" in printed
    errors = result["curves"]["error"]
    assert len(set(errors["one"])) == 4
    for kind in ("ddp", "fsdp"):
        assert errors[kind] == pytest.approx(errors["one"], rel=1e-4)
