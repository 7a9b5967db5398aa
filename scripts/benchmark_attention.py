"""Times attention on the named workloads, beside SDPA's MATH backend and the roof of the machine.

    python scripts/benchmark_attention.py --workloads long_4k_128 --output docs/results/speed.json

Every row is the median over repeated launches with the L2 cache flushed in between. TFLOP/s count
the matrix products that the pass needs (2 forward, 6 forward+JVP, 5 backward, 15 backward of both),
so a kernel that computes more of them pays for it. The roof is a bfloat16 product 8192³
in the same run.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from jvp_flash_attention import attention, attention_jvp
from jvp_flash_attention.workloads import WORKLOADS, Workload

PRODUCTS = {"forward": 2, "forward_jvp": 6, "backward": 5, "backward_jvp": 15}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def ours(x, causal: bool):
    """(O, tO) of this library."""
    return attention_jvp(*x, is_causal=causal)


def sdpa_math(x, causal: bool):
    """(O, tO) of SDPA on its MATH backend, the only one with forward-mode differentiation."""
    with sdpa_kernel(SDPBackend.MATH):
        f = lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal)  # noqa: E731
        return torch.func.jvp(f, tuple(x[:3]), tuple(x[3:]))


def plain(implementation: str, x, causal: bool):
    """O without tangents; SDPA chooses its own backend, so this is the vendor's kernel."""
    if implementation == "ours":
        return attention(*x[:3], is_causal=causal)
    return scaled_dot_product_attention(*x[:3], is_causal=causal)


def call(implementation: str, name: str, workload: Workload, dtype: torch.dtype):
    """A function to time: one pass of one implementation on fresh N(0, 1) inputs."""
    B, H, L, D, causal = workload
    x = [torch.randn(B, H, L, D, device="cuda", dtype=dtype) for _ in range(6)]
    both = ours if implementation == "ours" else sdpa_math
    if name == "forward":
        return lambda: plain(implementation, x, causal)
    if name == "forward_jvp":
        return lambda: both(x, causal)
    leaves = [z.requires_grad_() for z in (x[:3] if name == "backward" else x)]
    outputs = (plain(implementation, x, causal),) if name == "backward" else both(x, causal)
    cotangents = [torch.randn_like(o) for o in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def measure(implementation: str, name: str, workload: Workload, dtype: torch.dtype) -> dict:
    """Milliseconds, TFLOP/s and peak memory of one call, or what stopped it."""
    try:
        f = call(implementation, name, workload, dtype)
        f()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        memory = torch.cuda.max_memory_allocated() - before
        ms = milliseconds(f)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    tflops = workload.flops(PRODUCTS[name]) / ms / 1e9
    return {"ms": round(ms, 4), "tflops": round(tflops, 1), "mebibytes": round(memory / 2**20, 1)}


def milliseconds(f) -> float:
    """Median time on the device, the L2 cache flushed before every launch."""
    return float(do_bench(f, warmup=25, rep=100, return_mode="median"))  # pyright: ignore


def roof() -> float:
    """TFLOP/s of a bfloat16 product 8192 x 8192 x 8192 through the vendor's library."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9


def host_microseconds() -> dict[str, float]:
    """Host time of a call whose kernels take less: tiny tensors, 500 calls without waiting."""
    q, k, v, t_q, t_k, t_v = (
        torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)
    )
    calls = {
        "attention": lambda: attention(q, k, v),
        "attention_jvp": lambda: attention_jvp(q, k, v, t_q, t_k, t_v),
        "torch.func.jvp": lambda: torch.func.jvp(attention, (q, k, v), (t_q, t_k, t_v)),
    }
    found = {}
    for name, f in calls.items():
        f()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            f()
        found[name] = round((time.perf_counter() - start) / 500 * 1e6, 1)
        torch.cuda.synchronize()
    return found


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description="Time attention and its derivatives on a GPU.")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--passes", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument(
        "--implementations", nargs="+", choices=["ours", "sdpa"], default=["ours", "sdpa"]
    )
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch sees none; run it on a GPU")

    result = {"environment": environment(), "gemm_tflops": round(roof(), 1)}
    result |= {"host_microseconds": host_microseconds(), "rows": []}
    table = Table(title=f"{result['environment']['gpu']}, GEMM {result['gemm_tflops']} TFLOP/s")
    for column in ("workload", "dtype", "pass", "implementation", "ms", "TFLOP/s", "MiB"):
        table.add_column(column)
    for workload in arguments.workloads:
        for dtype in arguments.dtypes:
            for name in arguments.passes:
                for implementation in arguments.implementations:
                    found = measure(implementation, name, WORKLOADS[workload], DTYPES[dtype])
                    row = {"workload": workload, "dtype": dtype, "pass": name}
                    row |= {"implementation": implementation, **found}
                    result["rows"].append(row)
                    table.add_row(*(str(value) for value in row.values()))
    Console(width=120).print(table)
    print(result["host_microseconds"], "microseconds of host time a call")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
