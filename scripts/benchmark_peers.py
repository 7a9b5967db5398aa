"""Times this library beside other projects' attention kernels that have a tangent.

    python scripts/benchmark_peers.py --earlier jvp_attention.py --rcm flash_attention_jvp_triton.py
    python scripts/benchmark_peers.py --tvm FOLDER --workloads 4x16x4096x128

Each option names what you have of the project; nothing is fetched:

    earlier   jvp_attention.py of the package `jvp-flash-attention` by A. Morehead
    rcm       rcm/utils/flash_attention_jvp_triton.py of github.com/NVlabs/rcm
    tvm       the folder that holds jvp_utils of github.com/lumalabs/tvm (it imports jaxtyping)

Steps, all of one attention layer without a mask:

    jvp       value and tangent, no gradient
    value     value and tangent, and the gradient of the value (MeanFlow, sCM)
    both      value and tangent, and the gradient of both (TVM)

A time is the median by events of the device, in a process of its own for each project. Errors are
those of value and tangent against float64, relative in the Frobenius norm. What a project does not
have, or cannot do on this machine, is a row that says so.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks import peers, report
from benchmarks.timing import median_ms
from torch import Tensor
from torch.autograd import forward_ad

from training.environment import environment

WORKLOADS = ("4x16x4096x128", "64x12x256x64")
SMALL = 2, 3, 512  # batch, heads and tokens whose errors are taken
PATIENCE = 240  # seconds for all of one project: some tune for long
Attention = Callable[..., tuple[Tensor, Tensor]]  # q, k, v, t_q, t_k, t_v -> out, t_out


def ours(_: Path | None) -> Attention:
    from jvp_flash_attention import attention_jvp

    return attention_jvp


def earlier(path: Path) -> Attention:
    function = _module(path).JVPAttn.fwd_dual

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(x[:3], x[3:], strict=True)]
            return forward_ad.unpack_dual(function(*duals))  # type: ignore[return-value]

    return attend


def rcm(path: Path) -> Attention:
    if importlib.util.find_spec("flash_attn") is None:  # its backward pass is FlashAttention's
        package, module = (
            types.ModuleType(f"flash_attn{x}") for x in ("", ".flash_attn_interface")
        )
        module._flash_attn_backward = module._flash_attn_varlen_backward = _absent  # type: ignore[attr-defined]
        sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": module}
    return _module(path).attention


def tvm(path: Path) -> Attention:
    sys.path.insert(0, str(path))
    from jvp_utils.functional import sdpa_jvp  # type: ignore[import-not-found]

    return lambda *x: torch.func.jvp(sdpa_jvp, x[:3], x[3:])  # type: ignore[return-value]


PROJECTS: dict[str, Callable[[Any], Attention]] = {
    "ours": ours,
    "rcm": rcm,
    "tvm": tvm,
    "earlier": earlier,
}
MISSING = {
    ("earlier", "both"): "its tangent has no gradient",
    ("rcm", "both"): "its tangent has no gradient",
}


def _absent(*_: Any, dropout_p: float = 0.0, softmax_scale: float = 1.0, **__: Any) -> None:
    raise ImportError("its backward pass needs the package flash_attn")


def _module(path: Path) -> types.ModuleType:
    """A file under a name of its own: the earlier package has our import name."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def inputs(b: int, h: int, l: int, d: int, options: argparse.Namespace) -> list[Tensor]:
    torch.manual_seed(0)
    how: Any = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    return [torch.randn(b, h, l, d, **how) for _ in range(8)]  # six, and two cotangents


def errors(attend: Attention, d: int, options: argparse.Namespace) -> dict[str, float]:
    x = inputs(*SMALL, d, options)[:6]
    exact = [y.double() for y in x]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / d**0.5, dim=-1) @ v

    wanted = torch.func.jvp(reference, tuple(exact[:3]), tuple(exact[3:]))
    got = attend(*x)
    names = ("value_error", "tangent_error")
    return {
        name: float((a.double() - b).norm() / b.norm())
        for name, a, b in zip(names, got, wanted, strict=True)
    }


def timed(attend: Attention, step: str, shape: list[int], options: argparse.Namespace) -> float:
    *x, d_out, d_t_out = inputs(*shape, options)  # type: ignore[arg-type]
    if step == "jvp":
        return median_ms(lambda: attend(*x), options.device)
    leaves = [y.requires_grad_() for y in (x if step == "both" else x[:3])]

    def work() -> Any:
        out, t_out = attend(*x)
        if step == "value":
            return torch.autograd.grad(out, leaves, d_out)
        return torch.autograd.grad((out, t_out), leaves, (d_out, d_t_out))

    return median_ms(work, options.device)


def measure(name: str, options: argparse.Namespace) -> None:
    """All rows of one project, each printed as soon as it is there."""
    try:
        attend = PROJECTS[name](getattr(options, name, None))
    except ImportError as missing:
        print(
            json.dumps({"project": name, "workload": "all", "step": "jvp", "error": str(missing)})
        )
        return
    for workload in options.workloads:
        shape = [int(n) for n in workload.split("x")]
        for step in peers.STEPS:
            row: dict[str, Any] = {"project": name, "workload": workload, "step": step}
            try:
                if reason := MISSING.get((name, step)):
                    raise NotImplementedError(reason)
                if step == "jvp":
                    row |= errors(attend, shape[-1], options)
                row["ms"] = timed(attend, step, shape, options)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(json.dumps(row), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--earlier", type=Path)
    add("--rcm", type=Path)
    add("--tvm", type=Path)
    add("--workloads", nargs="+", default=list(WORKLOADS), metavar="BxHxLxD")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    add("--output", type=Path, default=Path("peers.json"))
    add("--only", choices=PROJECTS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.only:
        measure(options.only, options)
        return 0
    given = ["ours", *(name for name in PROJECTS if getattr(options, name, None) is not None)]
    result: dict[str, Any] = {"environment": environment(), "dtype": options.dtype, "rows": []}
    for name in given:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        try:
            printed = subprocess.run(command, stdout=subprocess.PIPE, timeout=PATIENCE).stdout
        except subprocess.TimeoutExpired as late:
            printed = late.stdout or b""
            print(f"{name}: ended after {PATIENCE} s", file=sys.stderr)
        rows = [line for line in printed.decode().splitlines() if line.startswith("{")]
        result["rows"] += map(json.loads, rows)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(report.markdown(peers.table(result["rows"])))
    for row in result["rows"]:
        if "error" in row:
            print(f"{row['project']} {row['workload']} {row['step']}: {row['error']}")
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
