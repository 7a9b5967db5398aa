"""From a configuration to objects; used by every script."""

from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from training.initial import initialise
from training.module import GenerativeModule
from training.recompute import recompute_blocks
from training.settings import fusable


def build_data(config: DictConfig) -> Any:
    return instantiate(config.data, seed=config.seed)


def build_net(config: DictConfig, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network for images of this shape (C, H, W)."""
    channels, image_size, _ = shape
    return instantiate(
        config.model, channels=channels, image_size=image_size, num_classes=num_classes
    )


def build_module(config: DictConfig, data: Any, resumed: bool = False) -> GenerativeModule:
    """The module of a configuration; its initial weights depend on ``seed`` alone, or are those of
    ``init_from``, which a ``resumed`` run does not need any more.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    net = build_net(config, data.shape, data.num_classes)
    if config.get("init_from") and not resumed:
        exceptions = list(config.init_except)
        initialise(net, config.init_from, config.init_weights, config.init_format, exceptions)
    if config.checkpointing:
        recompute_blocks(net)
    options = dict(config.optimizer)
    if "fused" in options and options["fused"] is None:
        options["fused"] = fusable(config.trainer)
    return GenerativeModule(
        net,
        instantiate(config.objective),
        instantiate(options),
        config.seed,
        config.compile,
        OmegaConf.to_container(config, resolve=True),  # type: ignore[arg-type]
        data.description,
    )
