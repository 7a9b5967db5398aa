"""Train: ``python scripts/train.py attention=jvp``; ``--help`` lists the choices."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from training.build import build_data, build_module
from training.checkpoints import (
    AtomicCheckpointIO,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    refuse_used,
)
from training.cli import one_line_errors, run
from training.loggers.csv import CSVFile
from training.settings import check


def train(config: DictConfig, run_dir: Path) -> None:
    check(config)
    resumed = find_checkpoint(config.ckpt_path, run_dir)
    checkpoint = load_checkpoint(resumed) if resumed else None
    if checkpoint and 0 <= config.trainer.max_steps <= (step := checkpoint["global_step"]):
        print(f"nothing to do: {resumed} has made {step} steps; raise trainer.max_steps to go on")
        return
    if rank_zero_only.rank == 0:
        refuse_used(run_dir, resumed, config.ckpt_path)
    data = build_data(config)
    module = build_module(config, data)
    callbacks = [instantiate(c) for c in config.callbacks.values() if c]
    loggers = [logger for c in config.logger.values() if c and (logger := instantiate(c))]
    trainer = instantiate(
        config.trainer, callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO()]
    )
    if resumed and checkpoint:
        load_weights(module, checkpoint, resumed)  # says clearly whether they fit
        for logger in loggers:
            if isinstance(logger, CSVFile):
                logger.resume(checkpoint["global_step"])
    if trainer.is_global_zero:
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    for logger in loggers:
        logger.log_hyperparams(module.config)
    trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    if checkpoint and trainer.global_step == checkpoint["global_step"]:
        print(f"nothing was done: the {config.trainer.max_time} of trainer.max_time are over")


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    with one_line_errors():
        train(config, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    run(main)
