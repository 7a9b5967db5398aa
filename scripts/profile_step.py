"""Where the time of a training step goes: products, attention, elementwise, optimizer, idle.

python scripts/profile_step.py model=dit_b2 data=blobs data.channels=4 trainer.precision=bf16-mixed
"""

import json
import sys
import time
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from training.build import build_data
from training.cli import one_line_errors, run
from training.comparison.speed import Cell
from training.config_checks import check, precision
from training.environment import environment
from training.metrics.flops import peak_tflops
from training.metrics.profile import profile_steps
from training.renamed import composed


def measure(config: DictConfig) -> dict:
    """The step alone: sample, forward, backward and optimizer on one batch that stays there."""
    torch.backends.cuda.matmul.allow_tf32 = False
    options = config.profile
    data = build_data(config)
    cell = Cell({"": config}, "cuda")
    stepper = cell.steppers[""]
    first = stepper.first()
    stepper.times(options.warmup)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    spans = stepper.times(options.steps)
    wall = (time.perf_counter() - start) / options.steps
    found = profile_steps(lambda: stepper(lambda: None), max(1, options.steps // 4))
    images, flops = len(cell.batch[0]), cell.flops()
    peak = config.callbacks.throughput.peak_tflops
    peak = peak or peak_tflops(torch.device("cuda"), precision(config.trainer))
    median = sorted(sum(span) for span in spans)[len(spans) // 2] / 1000
    return {
        "environment": environment(),
        "tokens": getattr(data, "tokens", None),
        "parameters": sum(p.numel() for p in stepper.net.parameters()),
        "attention": config.attention._target_,
        "batch": images,
        "compile": stepper.step.compile,
        "cuda_graphs": stepper.step.cuda_graphs,
        "first_step_s": round(first, 2),
        "step_ms": round(1000 * wall, 3),
        "step_ms_device": round(1000 * median, 3),
        "images_per_s": round(images / wall, 1),
        "tflops": round(flops / wall / 1e12, 1),
        "mfu": round(flops / wall / 1e12 / peak, 4) if peak else None,
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20),
        "reserved_mib": round(torch.cuda.max_memory_reserved() / 2**20),
        "busy": round(found.busy, 4),
        "ms_of": {name: round(ms, 3) for name, ms in found.kinds.items()},
        "kernels": [[name[:160], round(ms, 4), n] for name, ms, n in found.kernels],
    }


def show(result: dict, lines: int) -> None:
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] else ""
    print(
        f"step {result['step_ms']:.1f} ms, {result['images_per_s']:.0f} images/s,"
        f" {result['tflops']:.0f} TFLOP/s{mfu}; first step {result['first_step_s']:.0f} s;"
        f" GPU busy {result['busy']:.1%}; {result['peak_mib']} MiB"
    )
    for name, ms in result["ms_of"].items():
        print(f"  {name:14s} {ms:8.2f} ms")
    for name, ms, n in result["kernels"][:lines]:
        print(f"    {ms:8.3f} ms {n:7.1f} x  {name[:110]}")


@hydra.main(version_base="1.3", config_path="../configs", config_name="profile")
def main(config: DictConfig) -> None:
    with one_line_errors():
        config = composed(config)
        check(config)
        if not torch.cuda.is_available():
            raise ValueError("scripts/profile_step.py reads the kernels of a GPU; here is none")
        result = measure(config)
        show(result, config.profile.kernels)
        if config.profile.output:
            Path(config.profile.output).write_text(json.dumps(result, indent=1) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    run(main)
