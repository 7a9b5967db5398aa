"""Tests run on the CPU, kernels in Triton's interpreter, on a machine with a GPU too: all of them
pass there. `pytest -m gpu` runs those marked so on the GPU. Others, whose kernels run on either, go
there with TESTS_DEVICE=cuda. `--report PATH` writes what the tests measured as JSON.
"""

import gc
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if "TESTS_DEVICE" not in os.environ:  # which the workers find
    chosen = any(a == "-m" and "gpu" in b.split() for a, b in pairwise(sys.argv))
    os.environ["TESTS_DEVICE"] = "cuda" if chosen else "cpu"
if os.environ["TESTS_DEVICE"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

    from tests.interpreter import quicken

    quicken()

gc.set_threshold(20_000, 20, 20)  # what is imported is large, lives on and is searched each time

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    """Where the Triton kernels run: the GPU, or the CPU through the interpreter."""
    return DEVICE


@pytest.fixture
def launched_anew():
    """No launch of other calls is there, and none of these is left."""
    pytest.importorskip("triton")
    from jvp_flash_attention.kernels import launch_cache

    launch_cache.clear()
    yield
    launch_cache.clear()


@pytest.fixture
def products(monkeypatch) -> list[str]:
    """The names of the portable kernels, one for each product of tiles that the interpreter makes
    from here on."""
    pytest.importorskip("triton")
    from triton import knobs

    from jvp_flash_attention.kernels.portable import bwd_dkdv, bwd_dq, forward

    if not knobs.runtime.interpret:
        pytest.skip("counts what the interpreter calls")
    found = []
    for name, module in (("forward", forward), ("bwd_dkdv", bwd_dkdv), ("bwd_dq", bwd_dq)):

        def counted(*args, dot=module.dot.fn, name=name):
            found.append(name)
            return dot(*args)

        monkeypatch.setattr(module, "dot", counted)
    return found


@pytest.fixture
def specs(monkeypatch) -> list:
    """The `Spec` of every plain call of `attention`, checked anew, as they come."""
    from jvp_flash_attention import api

    seen, run = [], api.autograd.attention
    monkeypatch.setattr(api, "_checked", {})
    monkeypatch.setattr(
        api.autograd, "attention", lambda x, spec, *more: seen.append(spec) or run(x, spec, *more)
    )
    return seen


def pytest_addoption(parser):
    parser.addoption("--report", help="write the errors that the tests recorded to this JSON file")


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and pytest -m gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


class _Report:
    """Written after every test: what a run that is cut off has found is not lost."""

    def __init__(self, path: str):
        from training.environment import environment

        self.path, self.rows, self.environment = Path(path), [], environment()

    def pytest_runtest_logreport(self, report):
        if report.when != "call":
            return
        row = {"test": report.nodeid.split("::", 1)[1], "outcome": report.outcome}
        self.rows.append(row | dict(report.user_properties))
        tests = sorted(self.rows, key=lambda row: row["test"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": self.environment, "tests": tests}
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def pytest_configure(config):
    # By the number of their tests the files whose few tests take long would come last.
    config.option.loadscopereorder = False
    if config.getoption("--report") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Report(config.getoption("--report")))
