"""Checkpoint files: written whole or not at all, found by name, read with a clear error."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, then renames: nobody sees half a file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def find_checkpoint(ckpt_path: str, run_dir: Path) -> Path:
    """The file that ``ckpt_path`` means: ``last`` is the last one of the run directory."""
    if ckpt_path == "last":
        path = run_dir / "checkpoints" / "last.ckpt"
        if not path.is_file():
            raise FileNotFoundError(
                f"ckpt_path=last: there is no {path}; name the run to resume with "
                "hydra.run.dir=PATH, or the file with ckpt_path=FILE"
            )
        return path
    path = Path(ckpt_path)
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path: there is no checkpoint {path}; give an existing file")
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this framework, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"ckpt: there is no checkpoint {path}; give an existing file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"ckpt: {path} is not a readable checkpoint") from error
    if not isinstance(checkpoint, dict) or "config" not in checkpoint:
        raise ValueError(f"ckpt: {path} was not written by scripts/train.py")
    return checkpoint


def load_weights(module: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a module of the same shape."""
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds another network than the one configured; its settings are in the "
            "config.yaml of its run"
        ) from error
