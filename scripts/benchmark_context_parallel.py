"""Times one attention layer whose sequence is sharded over GPUs, beside one GPU alone.

    python scripts/benchmark_context_parallel.py gpus=2
    python scripts/benchmark_context_parallel.py gpus=2 device=cpu lengths=64 heads=4 head_dim=16
    torchrun --nproc-per-node 2 scripts/benchmark_context_parallel.py lengths=75600

Options are written `name=value`; `--help` lists them. Without torchrun the script starts its own
processes. Every length is run by

    alone      `attention_jvp` of the whole sequence on one GPU
    ring       the same of shards, keys travelling
    ulysses    the same of shards, heads dealt out
    2d         both: pairs of GPUs deal out heads, keys travel from pair to pair (kinds=2d, four
               GPUs or more)

with two kinds of step, forward + JVP + backward each:

    detached   the gradient of the value, the tangent is a target (MeanFlow)
    both       the gradient of value and tangent in all six inputs

A time is the median step of the slowest process, by CUDA events. `scaling` is the time alone over
the time sharded times the processes. `exposed` is the share of a step that goes away where
transfers are replaced by copies within the GPU. `transfers` is a step where the kernels are left
out: transfers, merging and sums alone. Memory is the peak of a process, inputs included. What runs
out of memory is a row that says so.

Writes OUTPUT/context_parallel_MACHINE.json after every row, and prints the table last.
"""

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.timing import HostEvent, wait
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jvp_flash_attention import attention_jvp, backends
from jvp_flash_attention.call import Inputs, Saved, Spec, Tangents
from jvp_flash_attention.distributed import context_parallel_attention, positions
from training.environment import environment

KINDS, STEPS = ("alone", "ring", "ulysses", "2d"), ("detached", "both")
NAMES = ("q", "k", "v", "t_q", "t_k", "t_v", "d_out", "d_t_out")
WARM_UP = 1024  # tokens, and a ragged end as the length has: compiles kernels, opens connections


def main() -> int:
    options = parsed()
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={options.gpus}", __file__, *sys.argv[1:]]
        return subprocess.call(launcher)
    rank = int(os.environ["RANK"])
    mesh = connected(options.device)
    rows: list[dict] = []
    result = {
        "environment": environment() | {"processes": mesh.size(), "device": options.device},
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "rows": rows,
    }
    path = output(options)
    for length in options.lengths:
        for step in options.steps:
            for kind in options.kinds:
                row = {"length": length, "step": step, "kind": kind}
                row |= together(partial(measure, mesh, kind, step, length, options))
                rows.append(row | compared(row, rows, mesh.size()))
                if rank == 0:
                    path.write_text(json.dumps(result, indent=1) + "\n")
    if rank == 0:
        print("\n".join(table(rows)))
        print(path)
    distributed.barrier()
    distributed.destroy_process_group()
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = partial(str.split, sep=",")
    parser.add_argument("--gpus", type=int, default=2, help="processes to start")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--lengths", type=several, default=[32768, 75600, 131072])
    parser.add_argument("--kinds", type=several, default=list(KINDS[:3]))
    parser.add_argument("--steps", type=several, default=list(STEPS))
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--iterations",
        type=int,
        default=2,
        help="timed steps at 65536 tokens; as 1 / length² else, 1 to 3",
    )
    parser.add_argument(
        "--exposed_up_to", type=int, default=80_000, help="longest sequence without transfers"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = [f"--{x}" if re.match(r"\w+=", x) else x for x in sys.argv[1:]]
    options = parser.parse_args(arguments)
    options.lengths = [int(n) for n in options.lengths]
    for name, allowed in (("kinds", KINDS), ("steps", STEPS)):
        if unknown := set(getattr(options, name)) - set(allowed):
            parser.error(f"{name} must be of {allowed}, got {sorted(unknown)}")
    return options


def output(options: argparse.Namespace) -> Path:
    gpu = environment()["gpu"] if options.device == "cuda" else "cpu"
    machine = re.sub(r"\W+", "_", str(gpu)).strip("_").lower()
    options.output.mkdir(parents=True, exist_ok=True)
    return options.output / f"context_parallel_{machine}_x{os.environ['WORLD_SIZE']}.json"


def connected(device: str) -> DeviceMesh:
    """All processes. NCCL's stream goes first, or its kernels queue behind those of attention."""
    patience = timedelta(seconds=120)
    if device == "cuda":
        mine = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(mine)
        first = distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        distributed.init_process_group("nccl", timeout=patience, pg_options=first, device_id=mine)
    else:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", timeout=patience)
    return init_device_mesh(device, (distributed.get_world_size(),))


def measure(
    mesh: DeviceMesh, kind: str, step: str, length: int, options: argparse.Namespace
) -> dict[str, float]:
    """Times in milliseconds and peak memory of one row, on this process; empty where it waits."""
    if kind == "alone" and mesh.get_local_rank() > 0:
        return {}
    cuda = options.device == "cuda"
    short = min(length, WARM_UP + length % WARM_UP)
    steps(mesh, kind, step, short, options, iterations=1)
    if cuda:
        reserve()
        torch.cuda.reset_peak_memory_stats()
    run = partial(steps, mesh, kind, step, length, options)
    iterations = round(options.iterations * (65536 / length) ** 2)
    forward, backward, total = run(iterations=min(max(iterations, 1), 3))
    found = {"forward_ms": forward, "backward_ms": backward, "ms": total}
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if kind != "alone" and mesh.size() > 1:
        with without_kernels():
            found["transfers_ms"] = run(iterations=2)[2]
        if length <= options.exposed_up_to:
            with without_transfers():
                found["computing_ms"] = run(iterations=1)[2]
    return found


def reserve() -> None:
    """Memory for PyTorch's allocator, so that no step waits for the driver to give some."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    torch.empty(int(0.8 * free), dtype=torch.uint8, device="cuda")


def steps(
    mesh: DeviceMesh,
    kind: str,
    step: str,
    length: int,
    options: argparse.Namespace,
    iterations: int,
) -> list[float]:
    """Median milliseconds of forward with JVP, of backward, and of both."""
    device, both = options.device, step == "both"
    rows, lengths = length, (length, length)
    attend: Any = partial(attention_jvp, tangent_grad=both)
    if kind != "alone":
        of = in_pairs(mesh) if kind == "2d" else mesh
        rows = len(positions(length, of))
        attend = context_parallel_attention(of, kind, lengths=lengths, tangent_grad=both).jvp
    torch.manual_seed(mesh.get_local_rank())
    shape = (1, options.heads, rows, options.head_dim)
    how: Any = {"device": device, "dtype": getattr(torch, options.dtype)}
    tensors = {name: torch.randn(shape, **how) for name in NAMES}
    inputs = [tensors[name] for name in NAMES[:6]]
    leaves = [x.requires_grad_() for x in (inputs if both else inputs[:3])]
    times = []
    for _ in range(iterations):
        at = [event(device) for _ in range(3)]
        at[0].record()
        outputs = attend(*inputs)
        at[1].record()
        count = 2 if both else 1
        torch.autograd.grad(outputs[:count], leaves, [tensors[x] for x in NAMES[6 : 6 + count]])
        at[2].record()
        del outputs
        wait(device)
        times.append([at[i].elapsed_time(at[j]) for i, j in ((0, 1), (1, 2), (0, 2))])
    return [statistics.median(x) for x in zip(*times, strict=True)]


@functools.cache
def in_pairs(mesh: DeviceMesh) -> DeviceMesh:
    """The same processes as (ring, ulysses), two to a group that deals out heads."""
    shape, names = (mesh.size() // 2, 2), ("ring", "ulysses")
    return init_device_mesh(mesh.device_type, shape, mesh_dim_names=names)


def event(device: str) -> Any:
    return torch.cuda.Event(enable_timing=True) if device == "cuda" else HostEvent()


@contextmanager
def without_transfers() -> Iterator[None]:
    """What would have been received is a copy of what would have been sent."""

    def ring(operations):
        sent, received = (x.tensor for x in operations)
        count = min(len(sent), len(received))
        received[:count].copy_(sent[:count])
        return []

    def all_to_all(received, sent, *_, **__):
        count = min(len(sent), len(received))
        received[:count].copy_(sent[:count])

    with (
        mock.patch.object(distributed, "batch_isend_irecv", ring),
        mock.patch.object(distributed, "all_to_all_single", all_to_all),
    ):
        yield


@contextmanager
def without_kernels() -> Iterator[None]:
    """Attention gives tensors without values."""
    found = backends.implementation

    def implementation(spec: Spec) -> Any:
        return NoKernels if spec.backend in backends.BACKENDS else found(spec)

    with mock.patch.object(backends, "implementation", implementation):
        yield


class NoKernels:
    """Both passes, doing nothing."""

    @staticmethod
    def forward(x: Inputs, t: Tangents | None, _spec: Spec) -> Saved:
        out = x.q.new_empty(*x.q.shape[:3], x.v.shape[3])
        lse = x.q.new_zeros(x.q.shape[:3], dtype=torch.float32)
        if t is None:
            return Saved(out, lse)
        return Saved(out, lse, torch.empty_like(out), torch.zeros_like(lse))

    @staticmethod
    def backward(_d_out, d_t_out, x: Inputs, *_) -> tuple[Tangents, Tangents]:
        grads = Tangents(*map(torch.empty_like, x[:3]))
        return grads, Tangents(*map(torch.empty_like, x[:3] if d_t_out is not None else ()))


def together(work: Callable[[], dict]) -> dict:
    """The largest of what it returns on each process, or that memory ran out on one."""
    found = None
    with suppress(torch.OutOfMemoryError):  # and leave: the traceback holds the tensors
        found = work()
    if found is None:
        torch.cuda.empty_cache()
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, found)
    if None in everyone:
        return {"error": "out of memory"}
    return {name: max(x[name] for x in everyone if x) for name in everyone[0]}


def compared(row: dict, rows: list[dict], size: int) -> dict[str, float]:
    """Scaling, and the share of a step in which it waits for transfers."""
    found = {}
    alone = [x for x in rows if x["kind"] == "alone" and "ms" in x]
    alone = [x for x in alone if (x["length"], x["step"]) == (row["length"], row["step"])]
    if alone and row["kind"] != "alone" and "ms" in row:
        found["scaling"] = alone[0]["ms"] / row["ms"] / size
    if "computing_ms" in row:
        found["exposed"] = max(1 - row["computing_ms"] / row["ms"], 0.0)
    return found


def table(rows: list[dict]) -> list[str]:
    columns = {
        "forward_ms": "forward ms",
        "backward_ms": "backward ms",
        "ms": "ms",
        "scaling": "scaling",
        "exposed": "exposed",
        "transfers_ms": "transfers ms",
        "peak_gib": "GiB",
    }
    lines = ["| " + " | ".join(["length", "step", "kind", *columns.values()]) + " |"]
    lines.append("|" + "---|" * (3 + len(columns)))
    for row in rows:
        cells = [str(row[name]) for name in ("length", "step", "kind")]
        for name in columns:
            x = row.get(name)
            cells.append("" if x is None else f"{x:.3f}" if name in SHARES else f"{x:.4g}")
        if "error" in row:
            cells[3] = row["error"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


SHARES = ("scaling", "exposed")


if __name__ == "__main__":
    sys.exit(main())
