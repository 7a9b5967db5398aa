"""Every script of examples/ runs, with few steps, as its first lines say."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def script(name: str) -> list[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(STEPS[name])]
    if name == "fsdp2":
        together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command[1:1] = together
    return command


def test_every_example_is_tested_and_listed():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == STEPS.keys() == SAYS.keys()
    listed = set(re.findall(r"^\| \[(\w+)\.", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert listed == names


@pytest.mark.parametrize("name", STEPS)
def test_an_example_runs(name, tmp_path):
    if (needed := NEEDS.get(name)) and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs the {needed} library")
    done = subprocess.run(
        script(name),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[name], done.stdout), done.stdout
    assert "Warning" not in done.stderr


def test_the_plain_trainer_has_at_most_80_lines():
    assert len((EXAMPLES / "meanflow.py").read_text().splitlines()) <= 80
