"""Checkpoint files: written whole or not at all, found by name, read with a clear error."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from torch import nn

from training import renamed
from training.checksums import Sealed, verify
from training.sharded_checkpoints import (
    REST,
    Layout,
    distributed_as,
    is_sharded_checkpoint,
    read,
    remove_shards,
    sync_folder,
)

# What a resumed run has in common with its checkpoint, less what may change on the way.
KEPT = ("seed", "attention", "data", "model", "objective", "optimizer")
KEPT += ("trainer.accumulate_grad_batches", "trainer.devices", "trainer.num_nodes")
KEPT += ("context_parallel", "context_size")
FREE = ("data.path", "data.num_workers", "data.in_memory", "model.attention")
FREE += ("optimizer.lr", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.min_lr_ratio")
FREE += ("optimizer.decay_steps",)
# What says again what another key says.
AGAIN = ("ckpt_path", "allow_config_changes", "lock_wait", "trusted", "model.attention")
AGAIN += ("init_from", "init_weights", "init_format", "init_except")  # the checkpoint's are newer
AGAIN += ("callbacks.samples.sampler", "callbacks.sample_quality.sampler")
FEW = 4  # settings that a message lists


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, then renames: nobody sees half a file, neither
    after a kill nor after a power cut nor on a full disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")  # of one name: a killed write leaves one
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                with Sealed(file) as sealed:
                    torch.save(checkpoint, sealed)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            before = path.resolve() if path.is_symlink() else None  # of a sharded run
            os.replace(temporary, path)
            sync_folder(path.parent)
            remove_shards(before)
        except BaseException as error:
            if path.parent.is_dir():
                temporary.unlink(missing_ok=True)
            if cause := _of_the_system(error):
                why = cause.strerror
                if cause.errno != errno.EFBIG:  # that is a limit on files
                    there = next(folder for folder in path.parents if folder.is_dir())
                    why = f"{why}; {shutil.disk_usage(there).free / 2**20:.0f} MiB are free"
                before = "the one before is whole" if path.is_file() else "there is none before it"
                raise OSError(
                    f"the checkpoint {path} could not be written ({why}); {before}"
                ) from error
            raise

    def load_checkpoint(
        self,
        path: str | os.PathLike,
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """On the CPU, and as ``load_checkpoint`` does: also what a sharded run wrote."""
        return load_checkpoint(Path(path))


def _of_the_system(error: BaseException | None) -> OSError | None:
    """The failed write behind an error: torch raises its own over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def find_checkpoint(ckpt_path: str | None, run_dir: Path) -> Path | None:
    """The file that ``ckpt_path`` means: ``last`` is that of the run directory, ``auto`` is the
    same where there is one, and a new run where there is none.
    """
    if ckpt_path is None:
        return None
    last = run_dir / "checkpoints" / "last.ckpt"
    if ckpt_path == "auto":
        return last if _exists(last) else None
    if ckpt_path == "last":
        if not _exists(last):
            raise FileNotFoundError(
                f"ckpt_path=last: there is no {last}; name the run to resume with "
                "hydra.run.dir=PATH, or the file with ckpt_path=FILE"
            )
        return last
    path = Path(ckpt_path)
    if not _exists(path):
        raise FileNotFoundError(f"ckpt_path: {_no_file(path)}")
    return path


def _exists(path: Path) -> bool:
    return path.is_file() or is_sharded_checkpoint(path)


def _no_file(path: Path) -> str:
    for last in (path / "checkpoints" / "last.ckpt", path / "last.ckpt"):
        if _exists(last):
            return f"{path} is a directory; give {last}"
    return f"there is no checkpoint {path}; give an existing file"


def refuse_used(run_dir: Path, resumed: Path | None, ckpt_path: str | None = None) -> None:
    """A run never writes over another one: its directory is new, or that of the resumed run. With
    ``ckpt_path=auto`` the rows of a run that ended before its first checkpoint make room.
    """
    if resumed is not None and run_dir.resolve() in resumed.resolve().parents:
        return
    last, rows = run_dir / "checkpoints" / "last.ckpt", run_dir / "metrics.csv"
    if ckpt_path == "auto" and not last.exists():
        rows.unlink(missing_ok=True)
    remedies = {
        last: "continue it with ckpt_path=last",
        rows: "it has no checkpoint yet, start it anew with ckpt_path=auto",
    }
    for used, remedy in remedies.items():
        if used.exists():
            raise FileExistsError(
                f"hydra.run.dir: {run_dir} holds a run already ({used.name}); {remedy}, or give"
                " another directory"
            )


def refuse_changed(config: DictConfig, checkpoint: dict[str, Any], path: Path) -> None:
    """A resumed run is the run that it was: ``KEPT``, but for ``FREE`` and what the user allows."""
    insisted = [renamed.key(key) for key in config.allow_config_changes]
    free = (*FREE, *insisted)
    now: Any = OmegaConf.to_container(config, resolve=True)
    for key in insisted:
        if not _has(now, key) and not _has(checkpoint["config"], key):
            raise ValueError(
                f"allow_config_changes: no setting is called {key}; give keys or groups of"
                " config.yaml, as model.depth or data"
            )
    changed = {
        key: values
        for key, values in differences(checkpoint["config"], now).items()
        if _under(key, KEPT) and not _under(key, free)
    }
    averages = (checkpoint["config"].get("callbacks") or {}).get("ema")
    if averages and not config.callbacks.get("ema") and not _under("callbacks.ema", insisted):
        changed["callbacks.ema"] = (averages, None)  # they would be gone for good
    if not changed:
        return
    few = len(changed) <= FEW
    insist = changed if few else dict.fromkeys(key.split(".")[0] for key in changed)
    allowed = ",".join([*insisted, *insist])
    raise ValueError(
        f"ckpt_path: {path} was trained with other settings: now {_listed(changed)}; give those"
        f" of its run's config.yaml, or insist with allow_config_changes=[{allowed}]"
    )


def changes(config: DictConfig, checkpoint: dict[str, Any]) -> str:
    """What a resumed run does otherwise from here on, where it may: one line, or nothing."""
    now: Any = OmegaConf.to_container(config, resolve=True)
    changed = {
        key: values
        for key, values in differences(checkpoint["config"], now).items()
        if not _under(key, AGAIN) and not key.endswith(".directory")
    }
    first = lambda key: not _under(key, ("trainer", "optimizer"))  # noqa: E731
    changed = {key: changed[key] for key in sorted(changed, key=first)}
    return f"resumed with other settings: {_listed(changed)}" if changed else ""


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    few = list(changed.items())[:FEW]
    text = ", ".join(f"{key}={_brief(new)} (it was {_brief(old)})" for key, (old, new) in few)
    return text + (f" and {len(changed) - FEW} more" if len(changed) > FEW else "")


def _brief(value: Any) -> str:
    """As on the command line; a group in braces."""
    words = {None: "null", True: "true", False: "false"}
    plain = value is None or isinstance(value, bool)
    return words[value] if plain else "{...}" if isinstance(value, dict) else str(value)


def differences(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ: (old, new)."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {key: (old, new)}
    found = {}
    for name in sorted(old.keys() | new.keys()):
        inner = f"{key}.{name}" if key else name
        found |= differences(old.get(name), new.get(name), inner)
    return found


def _has(config: Any, key: str) -> bool:
    for word in key.split("."):
        if not isinstance(config, dict) or word not in config:
            return False
        config = config[word]
    return True


def _under(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def load_checkpoint(path: Path, layout: Layout | None = None) -> dict[str, Any]:
    """A checkpoint of this framework, on the CPU, its checksum verified; ``config`` in it is what
    the file holds: ``registry.checked`` must see it before anything is built from it.

    ``layout``: for a sharded run, see ``sharded_checkpoints.read``; it may be of one process.
    """
    checkpoint = load_rest(path)
    if is_sharded_checkpoint(path):
        return read(path, checkpoint, layout or (lambda key: None))
    return distributed_as(checkpoint, layout) if layout else checkpoint


def load_rest(path: Path) -> dict[str, Any]:
    """A checkpoint without what is in shards."""
    if not _exists(path):
        raise FileNotFoundError(f"ckpt: {_no_file(path)}")
    if path.is_dir():
        path = path / REST
    verify(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"ckpt: {path} is not a readable checkpoint") from error
    if not isinstance(checkpoint, dict) or "config" not in checkpoint:
        raise ValueError(f"ckpt: {path} was not written by scripts/train.py")
    renamed.stored(checkpoint["config"], path)
    renamed.states(checkpoint)
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
