"""One run of scripts/train.py, from its configuration to the last file."""

import gc
import logging
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from training.background_checkpoints import BackgroundCheckpointIO
from training.build import build_data, build_module, settle_batch
from training.callbacks.checkpoint import interrupted_once
from training.callbacks.finalize import FinalizeOnly, finished, over
from training.checkpoints import (
    AtomicCheckpointIO,
    changes,
    find_checkpoint,
    load_checkpoint,
    load_rest,
    load_weights,
    refuse_changed,
    refuse_used,
)
from training.config_checks import check, sharded, warning
from training.lock import run_lock
from training.loggers.csv import CSVFile
from training.registry import checked, trust, trust_own
from training.threads import choose_threads
from training.whole_files import replaced


def train(config: DictConfig, run_dir: Path) -> None:
    """One run of ``scripts/train.py``, from its configuration, in a directory that it holds alone.

    Raises:
        ValueError, FileExistsError, FileNotFoundError: what the configuration asks for cannot be
            done. Nothing was written then.
    """
    # Lightning's import has set its own level, after ``cli.run``.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    check(config)
    threads = choose_threads(config)
    settle_batch(config)
    trust(config.trusted)
    trust_own(config)
    # A job that was started again may meet the last moments of the one before.
    wait = config.lock_wait if config.ckpt_path == "auto" else 0
    with run_lock(run_dir, rank_zero_only.rank or 0, wait):
        _train(config, run_dir, threads)


class Settings(Callback):
    """Writes a configuration into the run directory after the first step, whole or not at all."""

    def __init__(self, config: DictConfig, path: Path) -> None:
        self.config, self.path, self.written = config, path, False

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.written:
            self.write()

    def write(self) -> None:
        self.written = True
        with replaced(self.path) as temporary:
            OmegaConf.save(self.config, temporary, resolve=True)


def _train(config: DictConfig, run_dir: Path, *notes: str) -> None:
    resumed = find_checkpoint(config.ckpt_path, run_dir)
    checkpoint = load_rest(resumed) if resumed else None
    if resumed and checkpoint:
        checked(checkpoint["config"], resumed)
        refuse_changed(config, checkpoint, resumed)
    ending: list[Callback] = []
    limits: dict[str, Any] = {}
    if resumed and checkpoint and (limit := over(config.trainer, checkpoint)):
        step = checkpoint["global_step"]
        own = run_dir.resolve() in resumed.resolve().parents
        if not own or finished(config.callbacks, run_dir, step):
            print(f"nothing to do: {resumed} has made {step} steps; raise trainer.{limit} to go on")
            return
        print(f"the {step} steps are made; what follows them is missing and is made now")
        ending, limits = [FinalizeOnly()], {"max_steps": step + 1, "max_time": timedelta.max}
    if rank_zero_only.rank == 0:
        refuse_used(run_dir, resumed, config.ckpt_path)
        changed = begun = ""
        if checkpoint:
            begun = f"resumed after step {checkpoint['global_step']}: {resumed}"
            changed = changes(config, checkpoint)
        for line in (*notes, begun, changed, warning(config)):
            if line:
                print(line)
    data = build_data(config)
    module = build_module(config, data, resumed is not None)
    module.objective.prepare(data.shape, data.num_classes)
    callbacks = [instantiate(c) for c in config.callbacks.values() if c]
    loggers = [logger for c in config.logger.values() if c and (logger := instantiate(c))]
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        limits["enable_checkpointing"] = False  # nor any of Lightning's own
    trainer = instantiate(
        config.trainer,
        callbacks=callbacks + ending,
        logger=loggers,
        plugins=[AtomicCheckpointIO() if sharded(config.trainer) else BackgroundCheckpointIO()],
        **limits,
    )
    if resumed and checkpoint:
        if not sharded(config.trainer):
            load_weights(module, load_checkpoint(resumed), resumed)  # says clearly whether they fit
        for logger in loggers:
            if isinstance(logger, CSVFile):
                logger.resume(checkpoint["global_step"])
    if trainer.is_global_zero:
        settings = Settings(config, run_dir / "config.yaml")
        if resumed:  # a start that makes no step leaves the run as it was
            trainer.callbacks.append(settings)  # type: ignore[attr-defined]
        else:
            settings.write()
    for logger in loggers:
        logger.log_hyperparams(module.config)
    with interrupted_once(callbacks):
        try:
            trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
        except BaseException:
            with suppress(Exception):  # a lost GPU gives no numbers
                module.rows.flush(trainer)
            raise
        finally:
            gc.unfreeze()  # also after an error
