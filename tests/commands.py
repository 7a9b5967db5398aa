"""Scripts run as users run them, each in a process of its own, or here, which is faster."""

import csv
import io
import os
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

from hydra._internal.hydra import Hydra

from tests import processes

ROOT = Path(__file__).parents[1]
# One thread: OpenMP's waiting threads must not fight with whatever else the machine does.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
FAST = ["trainer=cpu", "logger=csv", "data.batch_size=16", "model.depth=2", "model.width=48"]
FAST += ["callbacks.page=null", "callbacks.throughput=null"]  # two seconds a run


def start(script, *arguments, cwd, printed):
    path, where = ROOT / "scripts" / script, {"cwd": cwd, "printed": printed}
    return processes.start(path, *arguments, environment=ENVIRONMENT, **where)


def call(script, *arguments, cwd):
    path = ROOT / "scripts" / script
    return processes.finish(path, *arguments, cwd=cwd, environment=ENVIRONMENT)


def succeed(script, *arguments, cwd):
    result = call(script, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def in_process(script, *arguments):
    """What the script prints, where the process is not what is tested."""
    path, printed = ROOT / "scripts" / script, io.StringIO()
    given = mock.patch.object(sys, "argv", [script, *map(str, arguments)])
    once = mock.patch.object(Hydra, "get_mode", return_value=None)  # it composes to ask for a key
    beside = mock.patch.object(sys, "path", [str(path.parent), *sys.path])  # as Python has it
    own = mock.patch.dict(os.environ)  # what it sets there ends with it
    with given, once, beside, own, redirect_stdout(printed):
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
