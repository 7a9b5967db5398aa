"""From a configuration to objects; used by every script."""

from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from training.activation_checkpointing import checkpoint_blocks
from training.config_checks import compiled, fusable, no_cuda_graphs, sharded
from training.context_parallel import ContextParallel
from training.initial import initialise
from training.module import GenerativeModule
from training.validation import positive_integer


def build_data(config: DictConfig) -> Any:
    """The data module of ``config.data``."""
    return instantiate(config.data, seed=config.seed)


def settle_batch(config: DictConfig, processes: int | None = None) -> None:
    """Set ``data.batch_size``, that of one process and one backward pass, from
    ``global_batch_size``, or check that both say the same. ``processes``: None is what the trainer
    finds.
    """
    total, given = config.get("global_batch_size"), config.data.batch_size
    if total is None:
        if given is None:
            raise ValueError("data.batch_size must be given where global_batch_size is null")
        return
    positive_integer("global_batch_size", total)
    if processes is None:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        processes = int(instantiate(config.trainer, **quiet).world_size)
    if (context := build_context(config)) is not None:  # a group shares its images
        processes //= context.size(processes)
    accumulate = config.trainer.accumulate_grad_batches
    batch, rest = divmod(total, processes * accumulate)
    groups = "process(es)" if context is None else "group(s) of processes"
    parts = f"{processes} {groups} x trainer.accumulate_grad_batches={accumulate}"
    if rest or not batch:
        raise ValueError(
            f"global_batch_size={total} cannot be divided over {parts}; choose other numbers of"
            " devices or of accumulated batches, or global_batch_size=null and data.batch_size"
        )
    if given not in (None, batch):
        raise ValueError(
            f"data.batch_size={given} with {parts} is a step of {given * processes * accumulate}"
            f" images, and global_batch_size is {total}; leave data.batch_size={batch}, change"
            " trainer.accumulate_grad_batches, or set global_batch_size=null"
        )
    config.data.batch_size = batch


def build_context(config: DictConfig) -> ContextParallel | None:
    """How processes share the tokens of an image; None where each has whole ones."""
    kind, size = config.get("context_parallel"), config.get("context_size")
    if kind is None:
        return None
    return ContextParallel(kind, list(size) if OmegaConf.is_list(size) else size)


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
    # Where they share one network, the others get their weights from the first process.
    empty = sharded(config.trainer) and rank_zero_only.rank != 0
    with torch.device("meta") if empty else nullcontext():
        net = build_net(config, data.shape, data.num_classes)
    if config.get("init_from") and not (resumed or empty):
        exceptions = list(config.init_except)
        initialise(net, config.init_from, config.init_weights, config.init_format, exceptions)
    checkpoint_blocks(net, config.checkpointing)
    options = dict(config.optimizer)
    if "fused" in options and options["fused"] is None:
        options["fused"] = fusable(config.trainer)
    return GenerativeModule(
        net,
        instantiate(config.objective),
        instantiate(options),
        config.seed,
        compiled(config),
        config.cuda_graphs is not False and not no_cuda_graphs(config),
        OmegaConf.to_container(config, resolve=True),  # type: ignore[arg-type]
        data.description,
        build_context(config),
    )
