"""The benchmarks as commands: their options, files and pictures, and other projects' kernels."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """`main` of the script, as a command in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("benchmark_attention").main


def test_the_command_writes_json_csv_and_a_picture(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abc")
    arguments = ["--device", "cpu", "--budget-ms", "1", "--dtypes", "float32", "--output", tmp_path]
    arguments += ["--workloads", "1x2x8x4", "1x2x16x4", "1x2x24x4", "--masks", "none", "padding"]
    arguments += ["--implementations", "ours", "sdpa-math", "--passes", "jvp", "full"]
    assert benchmark([*map(str, arguments)]) == 0
    result = json.loads((tmp_path / "workloads_cpu.json").read_text())
    assert result["environment"]["commit"] == "0123abc"
    assert len(result["rows"]) == 3 * 2 * 2 * 2
    assert all(r["status"] == "ok" and r["accurate"] for r in result["rows"]), result["rows"]
    with (tmp_path / "workloads_cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["shape"] == "1x2x8x4"
    assert float(lines[0]["errors.t_out"]) < 2e-6
    assert (tmp_path / "workloads_cpu.png").is_file()
    printed = capsys.readouterr().out
    assert "1x2x24x4+padding" in printed
    assert "written to" in printed


def test_the_suite_of_the_legacy_table_writes_one_file_a_dtype(
    benchmark, tmp_path, monkeypatch, capsys
):
    module = sys.modules[benchmark.__module__]
    measure = module.legacy_table.measure
    quick = lambda *arguments: measure(*arguments, calls=(0, 1))  # noqa: E731
    monkeypatch.setattr(module.legacy_table, "measure", quick)
    arguments = [
        "--suite",
        "readme",  # its former name
        "--device",
        "cpu",
        "--lengths",
        "8",
        "--output",
        str(tmp_path),
    ]
    assert benchmark([*arguments, "--dtypes", "float32", "bfloat16"]) == 0
    found = sorted(path.name for path in tmp_path.glob("*.json"))
    assert found == ["legacy_table_bfloat16_cpu.json", "legacy_table_float32_cpu.json"]
    assert "--suite readme is now --suite legacy_table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--bla"], "unrecognized arguments: --bla"),
        (["--workloads", "long"], "or BxHxLxD, got 'long'"),
        (["--workloads", "1x2x0x4"], "or BxHxLxD, got '1x2x0x4'"),
        (["--masks", "window"], "invalid choice: 'window'"),
        (["--implementations", "mine"], "or module:function, got 'mine'"),
        (["--implementations", "no_such:f"], "cannot be imported: No module named 'no_such'"),
        (["--suite", "targets", "--passes", "jvp"], "--suite targets has no option --passes"),
        (["--suite", "lengths", "--lengths", "0"], "--lengths must be positive, got 0"),
        (["--budget-ms", "0"], "--budget-ms must be positive, got 0"),
    ],
)
def test_a_wrong_option_gives_one_clear_line(benchmark, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as status:
        benchmark(["--device", "cpu", *arguments])
    assert status.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark([])
    assert "--device cpu" in capsys.readouterr().err


EARLIER = """
import torch

class JVPAttn:
    @staticmethod
    def fwd_dual(q, k, v):
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 * 1.1, dim=-1) @ v
"""


@pytest.mark.slow
def test_peers_are_timed_beside_ours_and_their_errors_are_seen(tmp_path):
    source, output = tmp_path / "jvp_attention.py", tmp_path / "peers.json"
    source.write_text(EARLIER)
    command = [sys.executable, ROOT / "scripts/benchmark_peers.py", "--device", "cpu"]
    command += ["--dtype", "float32", "--workloads", "1x2x20x8", "--earlier", source]
    command += ["--tvm", tmp_path, "--output", output]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = {(r["project"], r["step"]): r for r in json.loads(output.read_text())["rows"]}
    for step in ("jvp", "value", "both"):
        assert rows["ours", step]["ms"] > 0
        assert ("error" in rows["earlier", step]) == (step == "both")
    for name in ("value_error", "tangent_error"):
        assert rows["ours", "jvp"][name] < 1e-5
        assert rows["earlier", "jvp"][name] > 1e-2  # wrong by a tenth in its scale
    assert "jvp_utils" in rows["tvm", "jvp"]["error"]  # a folder without it
    assert "| (1, 2, 20, 8) | the same, and the gradient of both |" in run.stdout
    assert "earlier 1x2x20x8 both: NotImplementedError: its tangent has no gradient" in run.stdout


def test_structure_is_timed_beside_the_dense_call(benchmark, monkeypatch):
    structure = importlib.import_module("benchmarks.structure")
    for name, value in (("HEADS", 1), ("HEAD_DIMS", (8,)), ("ROUNDS", 1)):
        monkeypatch.setattr(structure, name, value)
    cases = list(structure.cases(512, "cpu"))
    rows = list(structure.measure(cases, "cpu", budget_ms=0.1))
    assert [round(row["share"], 3) for row in rows] == [0.063, 0.625, 8.0, 8.0, 0.667]
    for row in rows:
        assert row["full_ms"] > 0
        assert row["jvp_of_dense"] == row["jvp_ms"] / row["dense_jvp_ms"]
    window, *_, ranges = structure.table(rows)[1:]
    assert window[:3] == ["window (16, 16)", "(1, 1, 512, 8)", "0.06"]
    assert ranges[0] == "half of the rows without a tangent"
