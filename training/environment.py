"""Machine, versions and commit, for every result file."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment() -> dict[str, str | int | None]:
    """What a reader of a result needs to reproduce it."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash_jvp": _version("flash-jvp"),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit of this file, with -dirty where tracked files differ from it; a copy
    of the files names its own in the variable COMMIT."""
    if named := os.environ.get("COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    options: Any = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    try:
        return subprocess.run(command, check=True, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
