"""Processes of their own that begin with everything imported.

Imports are ten times the work of most that tests run in a process. A server of each test session
imports once, touches no device and forks: what it gives is as fresh as a new Python.
"""

import os
import runpy
import sys
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

IMPORTED = "torch lightning sklearn.datasets sklearn.svm training.fit training.comparison.loss"
IMPORTED += " training.comparison.speed_report training.comparison.wandb training.data.digits"
IMPORTED += " training.objectives.meanflow training.callbacks.samples"
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(IMPORTED.split())


def start(path, *arguments, cwd, environment, printed):
    """A process in which a script runs as `python path *arguments` would run it there. What it
    prints goes to the files stdout and stderr in the folder `printed`.
    """
    process = FORKS.Process(target=_run, args=(path, arguments, cwd, environment, printed))
    process.start()
    return process


def finish(path, *arguments, cwd, environment):
    """What subprocess.run would give."""
    with TemporaryDirectory() as printed:
        where = {"cwd": cwd, "environment": environment, "printed": printed}
        process = start(path, *arguments, **where)
        process.join(240)
        told = [(Path(printed) / name).read_text() for name in ("stdout", "stderr")]
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{path} did not end; {told}")
    return CompletedProcess([path, *arguments], process.exitcode, *told)


def _run(path, arguments, cwd, environment, printed):
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(printed) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = list(map(str, [path, *arguments]))
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name="__main__")
