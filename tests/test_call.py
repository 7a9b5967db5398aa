"""A field of `Spec` is added in one place, and the way from the public function to the launch is
straight."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jvp_flash_attention import attention, call
from jvp_flash_attention.call import Inputs, Saved, Spec, Tangents, padded, split

PACKAGE = Path(call.__file__).parent


def test_a_flat_sequence_is_split_and_filled_up_by_the_fields():
    flat = [*range(len(Inputs._fields)), *"abcd", "rest", None]
    x, t, *rest = split(flat, Inputs, Tangents)
    assert x == Inputs(*range(len(Inputs._fields)))
    assert t == Tangents(*"abcd")
    assert rest == ["rest", None]
    assert padded("ab", Saved) == ("a", "b", None, None)


def test_a_field_that_somebody_does_not_know_is_noticed():
    but = ("causal", "backend")
    assert call.is_default(Spec(0.5, causal=True, backend="triton"), but)
    assert not call.is_default(Spec(0.5, dropout_p=0.1), but)


COMPOSITIONS = """
import sys
import torch
from torch.func import grad, jvp, linearize, vjp, vmap
from jvp_flash_attention import api, attention, attention_jvp, backends, call, kernels, reference

assert call.Spec._fields[2] == "dummy"
Spec, seen = call.Spec, []
api.Spec = lambda **fields: Spec(**fields, dummy=7)  # as if an argument said so

class Spy:
    def forward(self, x, t, spec):
        seen.append(spec)
        return implementation.forward(x, t, spec)
    def backward(self, d_out, d_t_out, x, t, saved, spec, mask_grad):
        seen.append(spec)
        return implementation.backward(d_out, d_t_out, x, t, saved, spec, mask_grad)

backends.register("spy", Spy())
q, k, v, t = torch.randn(4, 1, 2, 5, 4)
f = lambda x, backend="spy": attention(x, k, v, backend=backend)
loss = lambda x, backend="spy": f(x, backend).square().sum()
along = lambda x, backend="spy": sum(jvp(lambda y: f(y, backend), (x,), (t,))).square().sum()
def hvp(x, backend="spy"):
    return jvp(grad(lambda y: loss(y, backend)), (x,), (t,))[1]
compiled = lambda g: torch.compile(g, backend="aot_eager", fullgraph=True)
COMPOSITIONS = {
    "value": f,
    "jvp": lambda x, backend="spy": jvp(lambda y: f(y, backend), (x,), (t,))[1],
    "explicit": lambda x, backend="spy": attention_jvp(x, k, v, t, None, t, backend=backend)[1],
    "vjp": lambda x, backend="spy": vjp(lambda y: f(y, backend), x)[1](t)[0],
    "hvp": hvp,
    "grad of jvp": lambda x, backend="spy": grad(lambda y: along(y, backend))(x),
    "vmap": lambda x, backend="spy": vmap(lambda y: f(y, backend))(torch.stack([x, x])),
    "linearize": lambda x, backend="spy": linearize(lambda y: f(y, backend), x)[1](t),
}
quick = sys.argv[1:] == ["quick"]
for implementation in (reference,) if quick else (reference, kernels):
    for name, compose in COMPOSITIONS.items():
        for _ in range(2):  # the kernels' second one from the cache
            seen.clear()
            got = compose(q)
            assert seen and all(spec.dummy == 7 for spec in seen), (name, seen)
            torch.testing.assert_close(got, compose(q, "reference"))
if quick:
    raise SystemExit
assert kernels.dispatch.launch_cache._entries
implementation = reference
leaf = q.clone().requires_grad_()
for name, step in (("value", f), ("jvp", along)):
    want = torch.autograd.grad(step(leaf, "reference").square().sum(), leaf)[0]
    seen.clear()
    got = torch.autograd.grad(compiled(step)(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(got, want)
    assert len(seen) == 2 and all(spec.dummy == 7 for spec in seen), (name, seen)
"""


@pytest.mark.parametrize(
    "how", ["quick", pytest.param("whole", marks=[pytest.mark.slow, pytest.mark.compile])]
)
def test_a_new_field_of_spec_goes_through_every_composition(how, tmp_path):
    """Eager ones on the reference; as a whole on the kernels and compiled too."""
    copy = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "call.py").read_text()
    before = "    dropout_p: float = 0.0"
    assert source.count(before) == 1
    (copy / "call.py").write_text(source.replace(before, f"    dummy: int | None = None\n{before}"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    run = [sys.executable, "-c", COMPOSITIONS, how]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("jvp", [False, True])
def test_the_way_to_the_launch_is_at_most_five_modules_and_none_twice(jvp, device, monkeypatch):
    """docs/kernels.md lists them."""
    launch_cache = pytest.importorskip("jvp_flash_attention.kernels.launch_cache")
    ways, run = [], launch_cache.Launch.run

    def spy(launch):
        frame, way = sys._getframe(1), []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents:
                name = path.relative_to(PACKAGE).with_suffix("").as_posix()
                if way[:1] != [name]:
                    way.insert(0, name)
            frame = frame.f_back
        ways.append(way)
        return run(launch)

    monkeypatch.setattr(launch_cache.Launch, "run", spy)
    q, k, v, t = torch.randn(4, 1, 1, 7, 8, device=device)
    f = lambda q: attention(q, k, v, scale=0.123, backend="triton")  # noqa: E731
    _ = torch.func.jvp(f, (q,), (t,)) if jvp else f(q)
    road = ["api", "functorch", "autograd", "kernels/dispatch", "kernels/launch_cache"]
    assert ways == [road if jvp else [name for name in road if name != "functorch"]]
