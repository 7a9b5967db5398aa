"""One process at a time in a run directory.

The lock is ``flock`` on ``RUN/run.lock``: it belongs to the process and goes with it, however the
process ends, so that nothing has to be removed after a crash. On NFS the server keeps it (Linux
2.6.12 and later), which tells two machines apart too. The file says who holds it.
"""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

POLL = 1.0  # seconds
# What the processes of one job have in common and those of the next one have not.
JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")


@contextmanager
def run_lock(run_dir: Path, rank: int = 0, wait: float = 0.0) -> Iterator[None]:
    """Hold the directory while the body runs.

    Rank 0 takes the lock, waiting at most ``wait`` seconds for its holder to end. The other ranks
    wait as long until rank 0 of their job has it: what they read in the directory is then what
    rank 0 does. With 0, which is right where nothing is looked for there, they do not wait.

    Raises:
        FileExistsError: another process trains there; the message says host, process and since
            when.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "run.lock"
    if rank != 0:
        _follow(path, wait)
        yield
        return
    with path.open("a+") as file:
        if _take(file, run_dir, wait):
            file.seek(0)
            file.truncate()
            json.dump(_self(), file)
            file.flush()
        yield  # closing the file gives the lock back


def _take(file: IO[str], run_dir: Path, wait: float) -> bool:
    """Whether the file system knows locks."""
    end, told = time.monotonic() + wait, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as error:
            print(
                f"{run_dir}: this file system has no locks ({error.strerror}); nothing keeps a"
                " second process out of the directory",
                file=sys.stderr,
            )
            return False
        holder = _words(_holder(Path(file.name)))
        if time.monotonic() >= end:
            waited = f" and did not end within {wait:g} seconds" if wait else ""
            raise FileExistsError(
                f"hydra.run.dir: {holder} trains in {run_dir}{waited}; give another directory, end"
                " that process, or wait for it with ckpt_path=auto lock_wait=SECONDS"
            )
        if not told:
            print(f"waiting up to {wait:g} s for {holder}, which trains in {run_dir}", flush=True)
            told = True
        time.sleep(min(POLL, max(0.0, end - time.monotonic())))


def _follow(path: Path, wait: float) -> None:
    end = time.monotonic() + wait
    while _holder(path).get("job") != _self()["job"] and time.monotonic() < end:
        time.sleep(POLL / 5)


def _self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "job": "/".join(os.environ.get(name, "") for name in JOB),
    }


def _holder(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or being written
        return {}
    return found if isinstance(found, dict) else {}


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return "process {pid} on {host} (since {since})".format(**{"pid": "?", "host": "?", **holder})
