"""Runs beside each other, each in a process of its own: a small model leaves a GPU idle most of the
time, and a machine has more cores than one run uses.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path

from omegaconf import DictConfig

from training.cli import run

Train = Callable[[DictConfig, Path], None]  # scripts/train.py's
LOG = "log.txt"  # what a run printed, in its directory


def train_in_parallel(train: Train, jobs: Sequence[tuple[DictConfig, Path]], number: int) -> None:
    """Train all of them, at most ``number`` at once. One that fails does not end the others; it is
    named when they are done. Interrupted, they write their checkpoints.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share the state of the device
    waiting, alive = list(jobs), {}
    failed: list[Path] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or alive:
            while waiting and len(alive) < number:
                config, directory = waiting.pop(0)
                process = context.Process(target=_train, args=(train, config, directory))
                process.start()
                alive[process.sentinel] = process, directory
            for sentinel in connection.wait(list(alive)):
                process, directory = alive.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                words = f"failed ({process.exitcode})" if process.exitcode else "done"
                print(f"{directory.name}: {words}", flush=True)
                if process.exitcode:
                    failed.append(directory)
    finally:
        for process, _ in alive.values():
            process.terminate()
        for process, _ in alive.values():
            process.join()
        signal.signal(signal.SIGTERM, before)
    if failed:
        logs = ", ".join(str(directory / LOG) for directory in failed)
        raise ChildProcessError(
            f"{len(failed)} of {len(jobs)} runs failed: see {logs}; the same command goes on with"
            " what is missing"
        )


def _train(train: Train, config: DictConfig, directory: Path) -> None:
    """In the new process: what is printed, by libraries too, goes to the run's log."""
    with (directory / LOG).open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run(lambda: train(config, directory))
