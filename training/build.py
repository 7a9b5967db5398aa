"""From a configuration to objects; used by every script."""

from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from training.module import GenerativeModule
from training.validation import integer


def build_data(config: DictConfig) -> Any:
    integer("seed", config.seed)
    return instantiate(config.data, seed=config.seed)


def build_module(config: DictConfig, data: Any) -> GenerativeModule:
    """The module of a configuration; its initial weights depend on ``seed`` alone."""
    L.seed_everything(config.seed, workers=True, verbose=False)
    if config.compile and OmegaConf.select(config, "objective.jvp.mode") == "double":
        raise NotImplementedError(
            "compile=true cannot replay the random state between the two forwards of"
            " objective.jvp.mode=double; use objective.jvp.mode=single or compile=false"
        )
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
