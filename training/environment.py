"""Machine, versions and commit, for every result file."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CODE = ("jvp_flash_attention", "training", "configs", "scripts")


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
    """The checked-out commit of this file, with -dirty where files of code differ from it; a copy
    of the files names its own in the variable COMMIT."""
    if named := os.environ.get("COMMIT"):
        return named
    if _git("ls-files", "--error-unmatch", __file__) is None:  # another project's repository
        return None
    commit = _git("rev-parse", "--short=12", "HEAD")
    unchanged = _git("diff", "--quiet", "HEAD", "--", *(f":/{folder}" for folder in CODE))
    return commit if commit is None or unchanged is not None else f"{commit}-dirty"


def _git(*arguments: str) -> str | None:
    """What git says of the repository that this file is in, None where it fails."""
    others = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    options: Any = {"cwd": Path(__file__).parent, "env": others, "text": True}
    try:
        done = subprocess.run(["git", *arguments], check=True, capture_output=True, **options)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
