"""Without any one of PyTorch's private names the library imports and gives the same results."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jvp_flash_attention import attention, functorch

ROOT = Path(__file__).parents[1]
# what is used alone does not switch the shortcuts off
ALONE = [
    "is_legacy_batchedtensor",
    "_add_batch_dim",
    "_remove_batch_dim",
    "make_autograd_impl",
    "DispatchKeySet",
    "_will_engine_execute_node",
]


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_each_private_name_may_be_missing(tmp_path, every):
    options = [tmp_path / "exact.pt", str(every), *ALONE]
    run = subprocess.run(
        [sys.executable, "-m", "tests.without_private_names", *options],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert int(run.stdout.split()[0]) > 20 // every


PRIVATE = re.compile(r"\b(torch|forward_ad|functional|autograd)(\.\w+)*\._[a-zA-Z]|_opoverload")


def test_nothing_else_in_the_library_is_private_to_pytorch():
    for path in [*(ROOT / "jvp_flash_attention").rglob("*.py"), ROOT / "training/attentions.py"]:
        if path.name != "functorch.py":
            code = [line for line in path.read_text().splitlines() if "`" not in line]
            assert not [line for line in code if PRIVATE.search(line)], path


def test_a_symbolic_zero_is_known_without_its_name(monkeypatch):
    zero = torch._efficientzerotensor((2, 3))
    for known in (functorch.is_zerotensor, functorch._without_memory):
        monkeypatch.setattr(functorch, "is_zerotensor", known)
        assert functorch.nonzero(zero) is None
        assert torch.equal(functorch.materialized(zero), torch.zeros(2, 3))
        assert functorch.nonzero(torch.zeros(2, 3)) is not None
    q, unused = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(1, 2, 5, 4)
    t = torch.func.jvp(lambda x: attention(q, x, x), (unused,), (unused,))[1]
    assert t.requires_grad
