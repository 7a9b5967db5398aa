"""Private names of PyTorch lie in one place, and training does without them."""

import re
from pathlib import Path

import pytest
import torch

from jvp_flash_attention import attention
from training import private
from training.metrics.flops import step_flops
from training.models.dit import DiT
from training.objectives.flow_matching import FlowMatching

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(
    r"\b(torch|functional|autograd|distributed)(\.\w+)*\._(?!pytree)[a-zA-Z]|_cdata"
)


def test_nothing_else_in_the_trainer_is_private_to_pytorch():
    for path in [*(ROOT / "training").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        if path.name not in ("private.py", "kernel_repository.py"):
            code = [line for line in path.read_text().splitlines() if "``" not in line]
            assert not [line for line in code if PRIVATE.search(line)], path


def test_a_version_without_them_says_so_where_they_are_needed(monkeypatch):
    def lacking(name):
        raise AttributeError(name)

    monkeypatch.setattr(private, "resolve_name", lacking)
    net, objective = DiT(attention, 8, 1, 10, depth=1, width=32, heads=2), FlowMatching()
    with pytest.raises(NotImplementedError, match=r"has no torch._subclasses.*FakeTensorMode"):
        step_flops(net, objective, torch.zeros(2, 1, 8, 8), torch.zeros(2))
