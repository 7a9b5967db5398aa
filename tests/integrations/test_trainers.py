"""Stand-ins of public trainers: loss and gradients before and after the lines to change."""

import re
import warnings

import pytest
import torch

from jvp_flash_attention import reference
from tests.integrations.derivative import relative
from tests.integrations.test_page import SECTIONS
from tests.integrations.trainers import CHANNELS, LAYERS, TRAINERS


@pytest.fixture
def passes(monkeypatch):
    """The passes with a tangent that reach this library."""
    seen = []
    forward = reference.forward

    def spy(x, t, spec):
        if t is not None:
            seen.append((x, t))
        return forward(x, t, spec)

    monkeypatch.setattr(reference, "forward", spy)
    return seen


def batch():
    torch.manual_seed(1)
    z, v = torch.randn(2, 2, 5, CHANNELS, dtype=torch.float64)
    t = torch.rand(2, dtype=torch.float64)
    return z, v, t, t / 3


@pytest.mark.parametrize("name", TRAINERS)
def test_the_changed_lines_bring_every_layer_here_and_change_no_number(name, passes):
    before, after = TRAINERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing came
        loss, grads, o = before.step(*batch())
    if before.jvp is torch.func.jvp:
        assert (len(passes), o.jvp_calls) == (0, 0)
    passes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no SDPA in a jvp, where attention is called directly
        got_loss, got_grads, o = after.step(*batch())
    assert len(passes) == LAYERS
    assert relative(got_loss, loss) < 1e-12
    for got, exact in zip(got_grads, grads, strict=True):
        assert relative(got, exact) < 1e-11


def test_the_table_of_the_page_lists_them():
    section = SECTIONS["Public trainers"]
    rows = re.findall(r"^\| \[([^\]]+)\]\(https://github.com/([^)]+)\)", section, re.MULTILINE)
    assert [name for name, _ in rows] == [name for _, name in rows] == list(TRAINERS)


@pytest.mark.parametrize("name", [n for n, (b, _) in TRAINERS.items() if b.jvp is torch.func.jvp])
def test_unchanged_they_are_told_that_nothing_came(name):
    with pytest.warns(UserWarning, match="no scaled_dot_product_attention came"):
        TRAINERS[name][0].step(*batch())
