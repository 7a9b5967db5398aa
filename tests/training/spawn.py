"""Several processes of a test, as torchrun starts them, connected by gloo."""

import os
import socket

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import multiprocessing

from tests import processes  # noqa: F401  what they find imported


def spawn(work, world, *arguments, join=True):
    """``work(rank, world, *arguments)`` in so many processes; ``join``: until they end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (work, world, port, arguments)
    return multiprocessing.start_processes(
        _start, arguments, world, join, start_method="forkserver"
    )


def _start(rank, work, world, port, arguments):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test"}
    rank_zero_only.rank = rank  # Lightning was imported before the variables were set
    work(rank, world, *arguments)
