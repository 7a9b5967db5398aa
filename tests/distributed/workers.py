"""What each of four processes does in the tests: every case on several meshes, once for all."""

import traceback
from functools import cache, partial

import torch
from torch import distributed
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.func import jvp

from jvp_flash_attention.distributed import (
    context_parallel_attention,
    ring_attention,
    shard,
    ulysses_attention,
    unshard,
)
from tests.distributed.problems import PRIMALS, TANGENTS, Case, Problem, collect

SIZE = 4
RING = (
    Case(),
    Case(L=13, S=13, Hk=2),
    Case(L=13, S=13, causal=True),
    Case(L=17, S=17, causal=True, softcap=0.5, layout="zigzag", Hk=1),
    Case(L=9, S=9, causal=True, padding=True, layout="zigzag"),
    Case(L=7, S=15, padding=True),
    Case(L=10, S=3, tangents="q"),  # a process without keys
    Case(L=3, S=10, tangents="v", layout="zigzag"),  # one without queries
)
ULYSSES = (
    Case(),
    Case(L=13, S=13, Hk=2, causal=True, softcap=0.5),
    Case(L=7, S=15, padding=True, Hk=1),
    Case(L=10, S=3, tangents="k"),
)
MODES = ("value", "tangent", "dual", "explicit", "detached")


def calls() -> dict[str, tuple[str, Case, str]]:
    """Name -> (mesh, case, mode)."""
    found = {}
    for mesh, cases in (("ring2", RING), ("ring4", RING), ("ulysses4", ULYSSES), ("2d", RING)):
        for i, case in enumerate(cases):
            # every mode with the first ones, then they take turns
            for mode in MODES if i < 2 else ("tangent",):
                found[f"{mesh}-{case}-{mode}"] = mesh, case, mode
    return found


def meshes() -> dict[str, DeviceMesh]:
    """Both halves of ring2 do the same."""
    both = init_device_mesh("cpu", (2, SIZE // 2), mesh_dim_names=("ring", "ulysses"))
    alone = init_device_mesh("cpu", (SIZE,), mesh_dim_names=("all",))
    return {"ring2": both["ring"], "ring4": alone, "ulysses4": alone, "2d": both}


def function(name: str, mesh: DeviceMesh, case: Case, lengths: bool = True, **more):
    kind = name.rstrip("24") if name != "2d" else name
    how = {"lengths": (case.L, case.S) if lengths else None, "layout": case.layout, **more}
    return context_parallel_attention(mesh, kind, **how)


def errors(name: str, mesh: DeviceMesh, case: Case, mode: str) -> dict[str, float]:
    """Largest deviations of this process's shards from dense attention's, by name."""
    p, detached = problem(case), mode == "detached"
    exact = p.mine(solved(case, _mode(mode)), mesh)
    attend = function(name, mesh, case, tangent_grad=not detached)
    whole = {**p.inputs, "d_out": p.d_out, "d_t_out": p.d_t_out}
    local = p.mine(whole, mesh)
    leaves = {name: local[name].requires_grad_() for name in p.inputs}
    mask = None if p.mask is None else shard(p.mask, mesh, -1, case.layout)
    how = {"is_causal": case.causal, "softcap": case.softcap, "enable_gqa": True}
    call = partial(attend, attn_mask=mask, **how)
    primals = tuple(leaves[name] for name in PRIMALS)
    tangents = tuple(leaves[name] for name in TANGENTS)
    if mode == "dual":
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, primals, tangents)
            out, t_out = forward_ad.unpack_dual(call(*duals))
    elif mode == "explicit":
        explicit = partial(attend.jvp, attn_mask=mask, **how)
        out, t_out = explicit(*primals, *tangents)
    else:
        out, t_out = jvp(call, primals, tangents)
    if detached and t_out.requires_grad:
        raise AssertionError("tangent_grad=False leaves a graph")
    got = collect(out, t_out, leaves, local["d_out"], local["d_t_out"], _mode(mode))
    if mode == "value":  # a plain call is another pass
        got["out"] = call(*(x.detach() for x in primals))
    found = {name: _largest(got[name] - x) for name, x in exact.items()}
    whole = unshard(got["out"], mesh, layout=case.layout, length=case.L)
    found["unshard"] = _largest(whole - solved(case, "value")["out"])
    return found


problem = cache(Problem)  # for every mesh and mode the same


@cache
def solved(case: Case, mode: str) -> dict[str, torch.Tensor]:
    return problem(case).solve(mode)


def second_order(name: str, mesh: DeviceMesh, case: Case) -> dict[str, float]:
    """Double backward, jvp of grad and vmap."""
    p = Problem(case)
    attend = function(name, mesh, case)
    local = p.mine({**p.inputs, "d_out": p.d_out}, mesh)
    found = {}
    for what, run in SECOND.items():
        if what == "vmap" and not name.startswith("ring"):
            continue
        exact = p.mine(run(p.dense, p.inputs, p.d_out), mesh)
        got = run(attend, {name: local[name] for name in p.inputs}, local["d_out"])
        found |= {f"{what} {name}": _largest(got[name] - x) for name, x in exact.items()}
    return found


def double_backward(f, inputs, d_out):
    leaves = [inputs[name].clone().requires_grad_() for name in PRIMALS]
    grads = torch.autograd.grad((f(*leaves) * d_out).sum(), leaves, create_graph=True)
    F = sum((g * inputs[name]).sum() for g, name in zip(grads, TANGENTS, strict=True))
    return dict(zip(PRIMALS, torch.autograd.grad(F, leaves), strict=True))


def jvp_of_grad(f, inputs, d_out):
    gradient = torch.func.grad(lambda *x: (f(*x) * d_out).sum(), (0, 1, 2))
    given = ([inputs[name] for name in names] for names in (PRIMALS, TANGENTS))
    return dict(zip(PRIMALS, jvp(gradient, *map(tuple, given))[1], strict=True))


def mapped(f, inputs, d_out):
    stacked = (torch.stack([inputs[name], 0.5 * inputs[name]]) for name in PRIMALS)
    return {"out": torch.vmap(f)(*stacked)}


SECOND = {"double backward": double_backward, "jvp of grad": jvp_of_grad, "vmap": mapped}


def compiled(mesh: DeviceMesh, backend: str) -> dict[str, object]:
    """Gradients of compiled steps beside those of eager ones, and what a mesh inside is told."""
    rng = torch.Generator().manual_seed(distributed.get_rank())
    draw = lambda: torch.randn(1, 4, 8, 8, generator=rng, dtype=torch.float64)  # noqa: E731
    x, t_x, d_out, d_t_out, w = draw(), draw(), draw(), draw(), draw()[0, 0]

    def step(attend, explicit, x):
        if explicit:
            out, t_out = attend.jvp(x, x @ w, x, t_x, t_x @ w, t_x)
        else:
            out, t_out = jvp(lambda x: attend(x, x @ w, x), (x,), (t_x,))
            t_out = t_out.detach()
        return (out * d_out).sum() + (t_out * d_t_out).sum()

    found: dict[str, object] = {}
    for kind in ("ring", "ulysses"):
        attend = context_parallel_attention(mesh, kind)
        for explicit in (False, True):
            grads = []
            for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
                leaf = x.clone().requires_grad_()
                grads += torch.autograd.grad(run(attend, explicit, leaf), leaf)
            name = f"{kind} {'both' if explicit else 'meanflow'}"
            found[name] = _largest(grads[0] - grads[1])
    for given in (ring_attention, ulysses_attention):
        run = torch.compile(lambda x, f=given: f(x, x, x, mesh=mesh), fullgraph=True)
        try:
            run(x)
        except Exception as error:
            found[given.__name__] = str(error)
    return found


def work_compiled(rank: int, size: int, folder: str, backend: str) -> None:
    """One of two processes."""
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.save(_tried(compiled, mesh, backend), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


SECOND_ORDER = ("ring2", "ring4", "ulysses4", "2d")


def _mode(mode: str) -> str:
    return "value" if mode in ("value", "detached") else "tangent"


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def failures(mesh: DeviceMesh, pair: DeviceMesh) -> dict[str, str]:
    """What processes that do not agree, or ask for what there is not, are told."""
    rank = distributed.get_rank()
    x = torch.randn(1, 4, 4, 8)
    ring, ulysses = (context_parallel_attention(mesh, kind) for kind in ("ring", "ulysses"))
    zigzag = context_parallel_attention(mesh, "ring", layout="zigzag", lengths=(16, 16))
    uneven = x[:, :, : 4 - (rank == 2)]
    attempts = {
        "uneven": lambda: ring(uneven, uneven, uneven),
        "uneven ulysses": lambda: ulysses(uneven, uneven, uneven),
        "flags": lambda: ring(x, x, x, is_causal=rank == 1),
        "scale": lambda: ulysses(x, x, x, scale=0.5 + rank),
        "causal cross": lambda: ring(x, x[:, :, :2], x[:, :, :2], is_causal=True),
        "layout": lambda: zigzag(x[:, :, :3], x, x),
        "dropout": lambda: ring(x, x, x, dropout_p=0.1),
        "floating mask": lambda: ulysses(x, x, x, torch.zeros(4)),
        "mask with rows": lambda: ring(x, x, x, torch.ones(4, 4, dtype=torch.bool)),
        "whole mask": lambda: ring(x, x, x, torch.ones(16, dtype=torch.bool)),
        "heads": lambda: ulysses(x[:, :3], x[:, :3], x[:, :3]),
        "vmap": lambda: torch.vmap(ulysses)(*(x.expand(2, *x.shape),) * 3),
        "jvp of jvp": lambda: jvp(
            lambda q: jvp(lambda q: ring(q, x, x), (q,), (x,))[1], (x,), (x,)
        ),
        "mesh": lambda: context_parallel_attention(mesh, "2d"),
        "kind": lambda: context_parallel_attention(mesh, "star"),
        "ulysses zigzag": lambda: context_parallel_attention(mesh, "ulysses", layout="zigzag"),
        "unshard": lambda: unshard(x.clone().requires_grad_(), mesh),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "nothing"
        except Exception as error:
            kind = next(t for t in type(error).__mro__ if t.__module__ == "builtins")
            found[name] = f"{kind.__name__}: {error}"
    return found


def work(rank: int, size: int, folder: str) -> None:
    """One process. What it finds, or the error that it met, by name."""
    distributed.init_process_group("gloo")
    found: dict[str, object] = {}
    on = meshes()
    for name, (mesh, case, mode) in calls().items():
        found[name] = _tried(errors, mesh, on[mesh], case, mode)
    for mesh in SECOND_ORDER:
        found[f"second order {mesh}"] = _tried(second_order, mesh, on[mesh], Case(L=9, S=11))
    found["failures"] = failures(on["ring4"], on["ring2"])
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _tried(run, *args):
    try:
        return run(*args)
    except Exception:
        return traceback.format_exc()
