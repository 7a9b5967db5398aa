"""Small networks on which exact statements can be checked."""

import pytest
import torch

from training.attentions import sdpa
from training.models.dit import DiT
from training.randomness import Draws


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: a second thread only waits, and fights with whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def draws():
    return Draws(0)


@pytest.fixture
def tiny():
    """A two-block DiT on 8 x 8 images; ``awake=True`` leaves no layer initialised at 0."""

    def build(attention=sdpa, awake=True, **options):
        torch.manual_seed(0)
        settings = {"image_size": 8, "channels": 1, "num_classes": 10, "depth": 2, "width": 32}
        net = DiT(attention, **(settings | options))
        if awake:
            for parameter in net.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
        return net

    return build


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(12, 1, 8, 8), torch.arange(12) % 10
