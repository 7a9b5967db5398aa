"""How many threads of a CPU a run takes.

A small network's operations are over before a second thread has begun, and where another process
uses the machine too, threads that wait for each other in each of them cost tens of times the work.
So they do beside the thread that writes a checkpoint, if they are as many as the cores: a step's
batch took twice the time. Where a GPU makes the step, half of them are enough. With several
processes Lightning divides the cores among them.
"""

import os

import torch
from omegaconf import DictConfig

from training.config_checks import on_gpu
from training.validation import positive_integer

SMALL = 256  # width up to which one thread is chosen
ENOUGH = 8  # for the batches of a step on a GPU


def choose_threads(config: DictConfig) -> str:
    """Set the number of threads; a line about it where a CPU makes the step and it was not the user
    who chose."""
    if (given := config.get("threads")) is not None:
        positive_integer("threads", given)
        torch.set_num_threads(given)
        return ""
    usual, width = torch.get_num_threads(), _width(config)
    if "OMP_NUM_THREADS" in os.environ or usual == 1:
        return ""
    if on_gpu(config.trainer):
        torch.set_num_threads(min(usual // 2, ENOUGH))
        return ""
    if width > SMALL:
        return ""
    torch.set_num_threads(1)
    return (
        f"one thread of {usual}, enough for a network of width {width}; threads={usual} takes all"
    )


def _width(config: DictConfig) -> int:
    from training.models.dit import SIZES

    size = SIZES.get(config.model.get("size"))
    if size is None:  # another kind of network, of convolutions
        return SMALL + 1
    return config.model.get("width") or size[2]
