"""Writes the library as a kernel repository of Hugging Face `kernels`.

    python scripts/kernel_repository.py FOLDER

FOLDER gets ``build.toml`` and ``torch-ext/flash_jvp``, from which kernel-builder builds, and
``build/torch-cpu`` and ``build/torch-cuda``, which `kernels` loads as they are: there is nothing to
compile. All three hold the files of ``jvp_flash_attention``. Operators are registered under the
name of the build, ``torch.ops._flash_jvp_cpu_1a2b3c4``, so that an installed copy, or another
build, may lie beside it in one process.
"""

import argparse
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "jvp_flash_attention"
NAME = "flash_jvp"
BACKENDS = ("cpu", "cuda")
VERSION = 1  # of the interface: `__all__` of the package

BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[torch-noarch]
"""


def write_repository(folder: Path) -> None:
    """The whole repository into a folder that is not there yet or empty.

    Raises:
        FileExistsError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"FOLDER must be new or empty, got {folder}")
    license = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"version": VERSION, "license": license}
    backends = ", ".join(f'"{b}"' for b in BACKENDS)
    text = BUILD_TOML.format(name=NAME.replace("_", "-"), backends=backends, **settings)
    (folder / "build.toml").write_text(text)
    _copy(folder / "torch-ext" / NAME)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        _copy(variant / NAME)
        files = _digests(variant)
        unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:7]
        metadata = {
            "id": f"_{NAME}_{backend}_{unique}",
            "name": NAME.replace("_", "-"),
            **settings,
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": files},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _copy(target: Path) -> None:
    shutil.copytree(SOURCE, target, ignore=shutil.ignore_patterns("__pycache__"))


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, base64, as `metadata.json` has them."""
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main() -> None:
    head = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(description=head)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    try:
        write_repository(parser.parse_args().folder)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
