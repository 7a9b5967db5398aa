"""From a configuration to objects; used by every script."""

from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from training.callbacks.ema import with_weights
from training.checkpoints import load_checkpoint, load_weights
from training.module import GenerativeModule
from training.validation import one_of


def build_data(config: DictConfig) -> Any:
    return instantiate(config.data, seed=config.seed)


def build_module(config: DictConfig, data: Any) -> GenerativeModule:
    """The module of a configuration; its initial weights depend on ``seed`` alone."""
    L.seed_everything(config.seed, workers=True, verbose=False)
    channels, image_size, _ = data.shape
    net = instantiate(
        config.model, channels=channels, image_size=image_size, num_classes=data.num_classes
    )
    return GenerativeModule(
        net,
        instantiate(config.objective),
        instantiate(config.optimizer),
        config.seed,
        config.compile,
        OmegaConf.to_container(config, resolve=True),  # type: ignore[arg-type]
    )


def load_flow(ckpt: str | None, weights: str = "ema") -> nn.Module:
    """The trained network of a checkpoint, as a teacher: at r = t the velocity of the linear path.

    ``weights``: ``ema``, the average, or ``net``.
    """
    one_of("objective.teacher.weights", weights, ("ema", "net"))
    if ckpt is None:
        raise ValueError(
            "objective.teacher.ckpt must name the checkpoint to distil, of a run with"
            " objective=flow_matching; got null"
        )
    checkpoint = load_checkpoint(Path(ckpt))
    config = DictConfig(checkpoint["config"])
    if config.objective._target_.endswith(".SCM"):
        raise ValueError(
            f"objective.teacher.ckpt: {ckpt} is a consistency model, which has no velocity; give"
            " one of objective=flow_matching"
        )
    module = build_module(config, build_data(config))
    load_weights(module, checkpoint, Path(ckpt))
    average = checkpoint["ema"]["average"] if weights == "ema" else {}
    return with_weights(module.net, average)
