"""Python in a process of its own whose kernels are compiled, and not interpreted as here."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def compiling(*arguments: str) -> str:
    """What `python *arguments` prints, in the project's folder."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
