"""Run by test_functorch.py: imports the library once in a child process for each private name of
PyTorch that it uses, or every so many, without that name, and compares what it computes with what
the whole one does.
"""

import os
import re
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch._dynamo  # here once, and not in every child
import triton  # noqa: F401

FUNCTORCH = Path(__file__).parents[1] / "jvp_flash_attention" / "functorch.py"


def names() -> list[tuple[str, str]]:
    """(module, name) of each private name that functorch.py looks for."""
    found = re.findall(r'_private\(\s*"([\w.]+):(\w+)', FUNCTORCH.read_text())
    return sorted(set(found))


def results() -> list[torch.Tensor]:
    """Values, tangents and gradients, plain and under transforms."""
    from jvp_flash_attention import attention, attention_jvp

    rng = torch.Generator().manual_seed(0)
    q, k, v, t = torch.randn(4, 1, 2, 5, 4, dtype=torch.float64, generator=rng)
    x = q.clone().requires_grad_()

    def f(q):
        return attention(q, k, v, is_causal=True)

    def loss(q):
        return f(q).square().sum()

    out, t_out = torch.func.jvp(f, (x,), (t,))
    explicit = attention_jvp(x, k, v, t, t, t, tangent_grad=False)
    with torch.no_grad():
        quiet = f(x)
    return [
        f(q),
        quiet,
        *torch.func.jvp(f, (q,), (t,)),
        *explicit,
        *torch.autograd.grad((out * t_out).sum(), x),
        *torch.autograd.grad(explicit[0].square().sum(), x),
        *torch.autograd.grad(torch.autograd.grad(loss(x), x, create_graph=True)[0].sum(), x),
        torch.func.vmap(f)(torch.stack([q, k])),
        *torch.func.jvp(torch.func.grad(loss), (q,), (t,)),
    ]


def check(module: str, name: str, exact: list[torch.Tensor]) -> bool:
    """Whether the results without the name are the exact ones."""
    owner = import_module(module)
    kept = getattr(owner, name)
    delattr(owner, name)
    spec = spec_from_file_location("jvp_flash_attention.functorch", FUNCTORCH)
    functorch = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(functorch)
    setattr(owner, name, kept)  # PyTorch itself needs it
    assert functorch.SHORTCUTS is (name in sys.argv[3:])
    got = results()
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e)
    if name == "TransformType":  # one of them for all: the compiler takes a second
        from jvp_flash_attention import attention

        rng = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(4, 1, 2, 5, 4, dtype=torch.float64, generator=rng)[:3]
        plain = torch.compile(lambda q: attention(q, k, v, is_causal=True), backend="eager")
        torch.testing.assert_close(plain(q), exact[0])
    return True


def in_a_child(run) -> bool:
    """Whether run() gives True in a process of its own."""
    pid = os.fork()
    if pid == 0:
        passed = False
        try:
            passed = run()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0 if passed else 1)
    return os.waitpid(pid, 0)[1] == 0


def keep(path: str) -> bool:
    torch.save([x.detach() for x in results()], path)
    return True


def main() -> int:
    path, every = sys.argv[1], int(sys.argv[2])
    if not in_a_child(lambda: keep(path)):
        return 1
    exact = torch.load(path)
    tried = names()[::every]
    failed = [n for n in tried if not in_a_child(lambda n=n: check(*n, exact))]
    print(f"{len(tried)} names, failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
