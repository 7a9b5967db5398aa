"""The benchmark of context parallelism runs on a CPU, and says what it could not measure."""

import json
from pathlib import Path

import pytest

from tests import commands
from tests.training.spawn import spawn

SCRIPT = "benchmark_context_parallel.py"


def work(rank, world, *arguments):
    """A process as the script starts it."""
    printed = commands.in_process(SCRIPT, *arguments)
    (Path(arguments[-1].removeprefix("output=")) / f"{rank}.txt").write_text(printed)


@pytest.mark.parametrize("starts", ["given", pytest.param("its own", marks=pytest.mark.slow)])
def test_two_processes_measure_every_row(tmp_path, starts):
    small = ["device=cpu", "heads=4", "head_dim=8", "dtype=float32", "lengths=33", "gpus=2"]
    small.append(f"output={tmp_path}")
    if starts == "given":
        spawn(work, 2, *small)
        printed = (tmp_path / "0.txt").read_text()
    else:
        printed = commands.succeed(SCRIPT, *small, cwd=tmp_path).stdout
    result = json.loads((tmp_path / "context_parallel_cpu_x2.json").read_text())
    assert result["environment"]["processes"] == 2
    assert result["settings"]["lengths"] == [33]
    kinds = [(row["step"], row["kind"]) for row in result["rows"]]
    assert kinds == [(s, k) for s in ("detached", "both") for k in ("alone", "ring", "ulysses")]
    for row in result["rows"]:
        assert min(row["forward_ms"], row["backward_ms"]) > 0
        assert row["ms"] >= 0.99 * max(row["forward_ms"], row["backward_ms"])
        if row["kind"] != "alone":
            alone = next(x for x in result["rows"] if x["step"] == row["step"])
            assert row["scaling"] == pytest.approx(alone["ms"] / row["ms"] / 2)
            assert 0 <= row["exposed"] < 1
            assert row["transfers_ms"] > 0
    assert printed.count("| 33 |") == 6
