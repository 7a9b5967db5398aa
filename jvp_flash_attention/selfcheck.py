"""Is this installation right?  python -m jvp_flash_attention.selfcheck

Runs every composition of PyTorch's transforms on attention and compares it with the same
composition of dense attention in float64: on a GPU through the kernels in float32, elsewhere
through the reference in float64. A line says `ok` with the relative error, `raises` where the order
of differentiation is not supported, or `WRONG`, which must never be; then the exit status is 1.

`--report` prints what an issue needs: versions, machine, how many lines said what, and the wrong
ones.
"""

# torch.func does not annotate how many results its transforms return
# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalOperand=false

import argparse
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from .api import attention, attention_jvp

Attend = Callable[..., Tensor]  # (q, k, v, mask) -> out


def dense(q, k, v, mask=None, causal=False, scale=None, window=None, softcap=0.0) -> Tensor:
    """softmax(s Q Kᵀ + b) V, materialised, of c tanh(s Q Kᵀ / c) with a `softcap` c; masked scores
    stay finite for autograd's sake."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    hidden = torch.zeros(1, 1, *scores.shape[2:], dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    left, right = window or (None, None)
    if left is not None:
        hidden = hidden | torch.ones_like(hidden).tril(-left - 1)
    if right is not None:
        hidden = hidden | torch.ones_like(hidden).triu(right + 1)
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        hidden = hidden | (mask == float("-inf"))
        scores = scores + mask.masked_fill(mask == float("-inf"), 0.0)
    scores = scores.masked_fill(hidden, -1e300 if scores.dtype == torch.float64 else -1e30)
    p = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    p = p / p.sum(-1, keepdim=True)
    return p.masked_fill(hidden.expand_as(p).all(-1, keepdim=True), 0.0) @ v


class Inputs:
    """A small problem with grouped queries, a bias, tangents and cotangents."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: str = "cpu"):
        rng = torch.Generator().manual_seed(0)
        draw = lambda *shape: (  # noqa: E731
            torch.randn(*shape, generator=rng, dtype=torch.float64).to(device, dtype)
        )
        self.q, self.k, self.v = draw(2, 4, 5, 3), draw(2, 2, 6, 3), draw(2, 2, 6, 4)
        self.bias = draw(1, 4, 1, 6)
        self.all = (self.q, self.k, self.v, self.bias)
        self.tangents = tuple(draw(*x.shape) for x in self.all)
        self.d_out, self.d_t_out = draw(2, 4, 5, 4), draw(2, 4, 5, 4)
        self.many = torch.stack([self.q, 2 * self.q])
        self.weight = draw(3, 3)

    def of_q(self, f: Attend):
        """The function of the queries alone."""
        return lambda q: f(q, self.k, self.v, self.bias)

    def of_bias(self, f: Attend):
        """The function of the bias alone."""
        return lambda b: f(self.q, self.k, self.v, b)

    def loss(self, f: Attend):
        """Inputs -> a number."""
        return lambda x: (f(*x) * self.d_out).sum()

    def jvp_loss(self, f: Attend, x, t):
        """A number that depends on the value and on the tangent."""
        out, t_out = jvp(f, tuple(x), tuple(t))
        return (out * self.d_out).sum() + (t_out * self.d_t_out).sum()


def _detached_tangent(i: Inputs, f: Attend):
    weight = i.weight.clone().requires_grad_()
    u, du = jvp(lambda q: i.of_q(f)(q @ weight), (i.q,), (i.tangents[0],))
    return torch.autograd.grad((u - (i.d_out - 0.3 * du).detach()).square().sum(), weight)


def _double_backward(i: Inputs, f: Attend):
    leaves = [x.clone().requires_grad_() for x in i.all]
    first = torch.autograd.grad(i.loss(f)(leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def _dual_level(i: Inputs, f: Attend):
    leaves = [x.clone().requires_grad_() for x in (*i.all, *i.tangents)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves[:4], leaves[4:], strict=True)]
        out, t_out = forward_ad.unpack_dual(f(*duals))
    value = (out * i.d_out).sum() + (t_out * i.d_t_out).sum()
    return [out, t_out, *torch.autograd.grad(value, leaves)]


def _grad_of_grad(i: Inputs, f: Attend):
    along = lambda x: sum(  # noqa: E731
        (g * t).sum() for g, t in zip(grad(i.loss(f))(x), i.tangents, strict=True)
    )
    return grad(along)(i.all)


def _vmap_of_jvp(i: Inputs, f: Attend):
    tangents = torch.stack([i.tangents[0], i.q])
    return vmap(lambda t: jvp(i.of_q(f), (i.q,), (t,))[1])(tangents)


def _vmap_of_grad(i: Inputs, f: Attend):
    of_bias = lambda q: grad(lambda b: (f(q, i.k, i.v, b) * i.d_out).sum())(i.bias)  # noqa: E731
    return vmap(of_bias)(i.many)


def _grad_of_vmap(i: Inputs, f: Attend):
    each = lambda b: vmap(lambda q: f(q, i.k, i.v, b))(i.many)  # noqa: E731
    return grad(lambda b: each(b).square().sum())(i.bias)


COMPOSITIONS: dict[str, Callable[[Inputs, Attend], object]] = {
    "plain": lambda i, f: f(*i.all),
    "jvp": lambda i, f: jvp(f, i.all, i.tangents),
    "jvp, tangent of the keys only": lambda i, f: jvp(
        lambda k: f(i.q, k, i.v, i.bias), (i.k,), (i.tangents[1],)
    ),
    "jvp, tangent of the bias only": lambda i, f: jvp(i.of_bias(f), (i.bias,), (i.tangents[3],)),
    "grad": lambda i, f: grad(i.loss(f))(i.all),
    "vjp": lambda i, f: vjp(f, *i.all)[1](i.d_out),
    "grad, tangent detached": _detached_tangent,
    "grad of jvp": lambda i, f: grad(lambda x: i.jvp_loss(f, x, i.tangents))(i.all),
    "grad of jvp in the tangents": lambda i, f: grad(lambda t: i.jvp_loss(f, i.all, t))(i.tangents),
    "vjp of jvp": lambda i, f: vjp(lambda *x: jvp(f, x, i.tangents), *i.all)[1](
        (i.d_out, i.d_t_out)
    ),
    "double backward": _double_backward,
    "grad of grad": _grad_of_grad,
    "jvp of grad": lambda i, f: jvp(grad(i.loss(f)), (i.all,), (i.tangents,)),
    "hessian": lambda i, f: hessian(lambda b: (i.of_bias(f)(b) * i.d_out).sum())(i.bias),
    "vmap": lambda i, f: vmap(i.of_q(f))(i.many),
    "vmap over the last dimension": lambda i, f: vmap(i.of_q(f), in_dims=4)(
        i.many.movedim(0, 4).contiguous()
    ),
    "vmap of jvp": _vmap_of_jvp,
    "jvp of vmap": lambda i, f: jvp(
        lambda q, k: vmap(lambda x: f(x, k, i.v, i.bias))(torch.stack([q, 2 * q])),
        (i.q, i.k),
        i.tangents[:2],
    ),
    "vmap of grad": _vmap_of_grad,
    "grad of vmap": _grad_of_vmap,
    "jacfwd": lambda i, f: jacfwd(i.of_q(f))(i.q),
    "jacfwd of the bias": lambda i, f: jacfwd(i.of_bias(f))(i.bias),
    "jacrev of the bias": lambda i, f: jacrev(i.of_bias(f))(i.bias),
    "linearize": lambda i, f: linearize(f, *i.all)[1](*i.tangents),
    "dual_level": _dual_level,
}

THIRD_ORDER: dict[str, Callable[[Inputs, Attend], object]] = {
    "jvp of jvp": lambda i, f: jvp(lambda q: jvp(i.of_q(f), (q,), (i.q,))[1], (i.q,), (i.q,)),
    "jvp of attention_jvp": lambda i, f: jvp(
        lambda q: attention_jvp(q, i.k, i.v, i.q, None, None, enable_gqa=True)[1], (i.q,), (i.q,)
    ),
    "grad of grad of jvp": lambda i, f: grad(
        lambda q: grad(lambda p: jvp(i.of_q(f), (p,), (i.q,))[1].sum())(q).sum()
    )(i.q),
    "jvp of grad of jvp": lambda i, f: jvp(
        grad(lambda p: jvp(i.of_q(f), (p,), (i.q,))[1].sum()), (i.q,), (i.q,)
    ),
    "grad of grad of grad": lambda i, f: grad(
        lambda z: grad(lambda q: grad(lambda p: i.of_q(f)(p).square().sum())(q).sum())(z).sum()
    )(i.q),
    "jvp of jvp of grad": lambda i, f: jvp(
        lambda z: jvp(grad(lambda p: i.of_q(f)(p).square().sum()), (z,), (i.q,))[1], (i.q,), (i.q,)
    ),
}


def _plain_step(i: Inputs, f: Attend, weight: Tensor) -> Tensor:
    return (i.of_q(f)(i.q @ weight) - i.d_out).square().sum()


def _meanflow_step(i: Inputs, f: Attend, weight: Tensor) -> Tensor:
    u, du = jvp(lambda q: i.of_q(f)(q @ weight), (i.q,), (i.tangents[0],))
    return (u - (i.d_out - 0.3 * du).detach()).square().sum()


def _tangent_step(i: Inputs, f: Attend, weight: Tensor) -> Tensor:
    u, du = jvp(lambda q: i.of_q(f)(q @ weight), (i.q,), (i.tangents[0],))
    return (u - i.d_out + 0.3 * du).square().sum()


COMPILED = {
    "compile, training step": _plain_step,
    "compile, MeanFlow step": _meanflow_step,
    "compile, loss through the tangent": _tangent_step,
}


def flat(x) -> list[Tensor]:
    """The tensors of a nested structure."""
    return [x] if isinstance(x, Tensor) else [z for y in x for z in flat(y)]


def ours(q, k, v, bias) -> Tensor:
    """What is checked."""
    return attention(q, k, v, bias, enable_gqa=True)


def error(got: object, exact: object) -> float:
    """The largest relative error among the tensors of two results."""
    pairs = zip(flat(got), flat(exact), strict=True)
    return max(float((g.double() - e).detach().norm() / e.detach().norm()) for g, e in pairs)


def _compiled(step, inputs: Inputs, exact: Inputs) -> float:
    torch.compiler.reset()
    weight = inputs.weight.clone().requires_grad_()
    run = torch.compile(lambda w: step(inputs, ours, w), fullgraph=True)
    w_exact = exact.weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(step(exact, dense, w_exact), w_exact)
    return error(torch.autograd.grad(run(weight), weight), expected)


def _ranges(inputs: Inputs, exact: Inputs) -> float:
    """Rows and keys without a tangent: O, tO and the gradients of both."""
    (rows, keys), at = ((1, 4), (2, 5)), tuple(range(6))

    def inside(n: int, start: int, stop: int, like: Tensor) -> Tensor:
        i = torch.arange(n, device=like.device).unsqueeze(-1)
        return ((i >= start) & (i < stop)).to(like.dtype)

    def theirs(q, k, v, t_q, t_k, t_v):
        kept = inside(6, *keys, k)
        out, t_out = jvp(dense, (q, k, v), (t_q, t_k * kept, t_v * kept))
        return out, t_out * inside(5, *rows, q)

    def ours(*x):
        return attention_jvp(*x, enable_gqa=True, tangent_rows=rows, tangent_keys=keys)

    def all_of(i: Inputs, f):
        x = (*i.all[:3], *i.tangents[:3])
        loss = lambda *x: sum((y * d).sum() for y, d in zip(f(*x), (i.d_out, i.d_t_out)))  # noqa: B905, E731
        return [*f(*x), *grad(loss, at)(*x)]

    return error(all_of(inputs, ours), all_of(exact, theirs))


def _autocast(inputs: Inputs, exact: Inputs, device: str) -> float:
    narrow = [x.float() for x in inputs.all]
    with torch.autocast(device, torch.bfloat16):
        got = jvp(ours, tuple(narrow), tuple(t.float() for t in inputs.tangents))
    return error(got, jvp(dense, exact.all, exact.tangents))


def check(device: str) -> Iterable[tuple[str, str]]:
    """(name, verdict) of every composition."""
    dtype, tolerance = (torch.float32, 1e-5) if device == "cuda" else (torch.float64, 1e-10)
    inputs, exact = Inputs(dtype, device), Inputs(torch.float64, device)

    def verdict(measure, limit=tolerance, must_raise=False) -> str:
        try:
            found = measure()
        except NotImplementedError as reason:
            return f"raises ({str(reason).split(';')[0]})"
        except Exception as reason:
            return f"WRONG ({type(reason).__name__}: {str(reason).splitlines()[0][:80]})"
        return f"ok {found:.1e}" if found <= limit and not must_raise else f"WRONG {found:.1e}"

    for name, compose in COMPOSITIONS.items():
        yield name, verdict(lambda c=compose: error(c(inputs, ours), c(exact, dense)))
    yield "rows and keys without a tangent", verdict(lambda: _ranges(inputs, exact))
    yield "autocast", verdict(lambda: _autocast(inputs, exact, device), 2e-2)
    for name, step in COMPILED.items():
        yield name, verdict(lambda s=step: _compiled(s, inputs, exact))
    for name, compose in THIRD_ORDER.items():
        yield name, verdict(lambda c=compose: float(bool(c(inputs, ours))), must_raise=True)


def versions() -> dict[str, str]:
    """What a report says of this machine: nothing of paths, names or the network."""
    from . import __version__

    found = {
        "flash-jvp": __version__,
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda or "none"),
        "cuDNN": str(torch.backends.cudnn.version() or "none"),
    }
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "none"
    cuda = torch.cuda
    gpus = [
        "{} (sm_{}{})".format(cuda.get_device_name(i), *cuda.get_device_capability(i))
        for i in range(cuda.device_count())
    ]
    return found | {"GPU": ", ".join(gpus) or "none"}


def report(verdicts: Sequence[tuple[str, str]], seconds: float) -> str:
    """Markdown for an issue: versions, counts, and the lines that are wrong."""
    wrong = [f"{name}: {verdict}" for name, verdict in verdicts if verdict.startswith("WRONG")]
    counts = {kind: sum(v.startswith(kind) for _, v in verdicts) for kind in ("ok", "raises")}
    lines = [f"{name}: {value}" for name, value in versions().items()]
    lines.append(
        f"selfcheck: {counts['ok']} ok, {counts['raises']} raise, {len(wrong)} wrong,"
        f" {seconds:.0f} s"
    )
    return "\n".join(["```text", *lines, *wrong, "```"])


def main(arguments: Sequence[str] = ()) -> int:
    """Prints the matrix, or with `--report` what an issue needs; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="print the text that an issue needs")
    short = parser.parse_args(arguments).report
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not short:
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        print(f"jvp_flash_attention on {where}, torch {torch.__version__}")
    warnings.filterwarnings("ignore", module="torch\\.fx")  # of what linearize folds
    start, verdicts = time.perf_counter(), []
    for name, verdict in check(device):
        verdicts.append((name, verdict))
        if not short:
            print(f"  {name:36} {verdict}", flush=True)
    wrong, seconds = sum(v.startswith("WRONG") for _, v in verdicts), time.perf_counter() - start
    print(report(verdicts, seconds) if short else f"{wrong} wrong, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
