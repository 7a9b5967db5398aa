"""Scripts run as users run them, each in a process of its own, or here, which is faster."""

import csv
import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
# One thread: OpenMP's waiting threads must not fight with whatever else the machine does.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
FAST = ["trainer=cpu", "logger=csv", "data.batch_size=16", "model.depth=2", "model.width=48"]
FAST += ["callbacks.page=null"]  # a second a run


def command(script, *arguments):
    return [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]


def call(script, *arguments, cwd):
    return subprocess.run(
        command(script, *arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )


def succeed(script, *arguments, cwd):
    result = call(script, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def in_process(script, *arguments):
    """What the script prints, where the process is not what is tested."""
    path, printed = ROOT / "scripts" / script, io.StringIO()
    with mock.patch.object(sys, "argv", [script, *map(str, arguments)]), redirect_stdout(printed):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stopped:
            if stopped.code != 0:
                raise
    return printed.getvalue()


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(run, name):
    return [float(row[name]) for row in rows(run) if row[name]]
