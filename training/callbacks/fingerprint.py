"""What a run started from and was fed, as hashes: two runs that are compared must agree in them."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_leaves

from training.sharding import whole
from training.validation import positive_integer


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """16 hexadecimal digits that depend on every bit, and on shapes and dtypes."""
    hashed = hashlib.blake2b(digest_size=8)
    for x in tensors:
        hashed.update(f"{x.dtype}{tuple(x.shape)}".encode())
        x = whole(x.detach())
        hashed.update(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


class Fingerprint(Callback):
    """Writes ``directory/fingerprint.jsonl``: the hash of the initial weights, then, of every
    ``every_n_steps``-th batch, that of everything the step is a function of: images, labels, times,
    noise, dropped labels.
    """

    def __init__(self, directory: str, every_n_steps: int = 1) -> None:
        positive_integer("callbacks.fingerprint.every_n_steps", every_n_steps)
        self.path, self.every_n_steps = Path(directory) / "fingerprint.jsonl", every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._write(trainer, {"weights": digest(pl_module.net.state_dict().values())})  # type: ignore[union-attr]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every_n_steps == 0:
            sample = pl_module.sample(batch, batch_idx)
            tensors = [x for x in tree_leaves((batch, sample)) if isinstance(x, torch.Tensor)]
            self._write(trainer, {"step": trainer.global_step, "batch": digest(tensors)})

    def _write(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
