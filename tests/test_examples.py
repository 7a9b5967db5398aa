"""Every script of examples/ runs, with few steps, as its first lines say."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.training.spawn import spawn

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = {"energy": 2, "fsdp2": 2, "meanflow": 2, "sd3": 1, "trace": 8}
NEEDS = {"sd3": "diffusers"}
# What must be in the output: it is printed where the work was done.
SAYS = {
    "energy": r"denoised +distance of a point from the circle 0\.\d+",
    "fsdp2": r"2/2  error \d+\.\d+\n(.*\n)*process [01] holds (\d+) of (\d+) weights",
    "meanflow": r"2/2  error \d+\.\d+\n80 samples",
    "sd3": r"1/1  error \d+\.\d+",
    "trace": r"exact: \d+\.\d+ .*\n(.*\n)*    8 probes: \d+\.\d+ ± \d+\.\d+",
}


def test_every_example_is_tested_and_listed():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == STEPS.keys() == SAYS.keys()
    listed = set(re.findall(r"^\| \[(\w+)\.", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert listed == names | {path.stem for path in EXAMPLES.glob("*.ipynb")}


@pytest.mark.parametrize("name", STEPS)
def test_an_example_runs(name, tmp_path):
    if (needed := NEEDS.get(name)) and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs the {needed} library")
    start = [str(EXAMPLES / f"{name}.py"), str(STEPS[name])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    if name == "fsdp2":
        spawn(work, 2, tmp_path, *start)
        check(name, *((tmp_path / stream).read_text() for stream in ("stdout", "stderr")))
    else:
        done = processes.finish(*start, cwd=tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr
        check(name, done.stdout, done.stderr)


@pytest.mark.slow
def test_torchrun_runs_the_one_that_needs_it(tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    start += [str(EXAMPLES / "fsdp2.py"), str(STEPS["fsdp2"])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check("fsdp2", done.stdout, done.stderr)


def check(name, stdout, stderr):
    assert re.search(SAYS[name], stdout), stdout
    assert "Warning" not in stderr


def work(rank, world, folder, path, *arguments):
    """A process as torchrun starts it; both write to the same files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [path, *arguments]
    sys.stdout = os.fdopen(1, "w")
    runpy.run_path(path, run_name="__main__")
    sys.stdout.flush()


def test_the_plain_trainer_has_at_most_80_lines():
    assert len((EXAMPLES / "meanflow.py").read_text().splitlines()) <= 80


def cells(kind: str) -> list[dict]:
    notebook = json.loads((EXAMPLES / "digits.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_runs(monkeypatch, tmp_path):
    """Its cells one after the other, without Jupyter, with two steps and no display."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "digits"}
    for i, cell in enumerate(cells("code")):
        code = re.sub(r"^STEPS = \d+", "STEPS = 2", "".join(cell["source"]), flags=re.MULTILINE)
        exec(compile(code, f"digits.ipynb, cell {i + 1}", "exec"), namespace)
    assert len(namespace["errors"]) == 2


def test_the_notebook_shows_its_pictures_and_stays_small():
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    pictures = [x for x in outputs if "image/png" in x.get("data", {})]
    assert len(pictures) >= 3
    assert not [x for x in outputs if x["output_type"] == "error"]
    assert (EXAMPLES / "digits.ipynb").stat().st_size < 400_000
