"""A run whose steps are made, but not what follows them: pictures, accuracy, summary."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig


class FinalizeOnly(Callback):
    """Ends a resumed run before its first step: what is made at the end is made now."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


def over(trainer: DictConfig, checkpoint: dict[str, Any]) -> str:
    """Which limit of the trainer the checkpoint has reached, or nothing."""
    if 0 <= trainer.max_steps <= checkpoint["global_step"]:
        return "max_steps"
    if trainer.max_time is None:
        return ""
    timer = Timer(trainer.max_time)
    timer.load_state_dict(checkpoint["callbacks"].get(timer.state_key, {}))
    return "max_time" if (timer.time_remaining() or 0) <= 0 else ""


def finished(callbacks: DictConfig, run_dir: Path, step: int) -> bool:
    """Whether the run directory holds what is made at the end, as far as it is asked for."""
    picture, summary = run_dir / "samples" / f"step_{step:06d}.png", run_dir / "summary.json"
    if callbacks.get("summary"):  # it is written last
        return summary.is_file() and json.loads(summary.read_text())["steps"] == step
    return not callbacks.get("samples") or picture.is_file()
