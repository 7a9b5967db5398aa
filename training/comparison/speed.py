"""Speed matching: the time of a whole training step, arm by arm, over tokens, head dims and modes.

A cell is (tokens, head dim, mode, compiled, batch). In it all arms hold the same parameters, the
same optimizer and the same batch; they take turns, in reversed order every other round, so that a
machine that warms up or is disturbed does so for all of them. A step is draws, forward, backward
and optimizer; events between them give the split. The first step (compilation, tuning of kernels)
is timed apart, and so is the memory of a step: the peak, with parameters, gradients and optimizer.

The numerator of MFU is the useful work of the objective (``metrics.flops``), one number for all
arms.
"""

import gc
import json
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from training.build import build_data, build_module
from training.comparison.arms import Compose, check_arms
from training.comparison.files import append_jsonl, read_jsonl
from training.config_checks import check, compiled, no_cuda_graphs, precision
from training.metrics.flops import peak_tflops, step_flops
from training.progress import tracked
from training.randomness import Draws, generator, key
from training.step import Step

CELL = ("tokens", "head_dim", "mode", "compiled", "batches")
OUT_OF_MEMORY, UNSUPPORTED, MEASURED = "out of memory", "unsupported", "measured"
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Stepper:
    """One arm's training step on one batch that stays where it is."""

    def __init__(
        self, config: DictConfig, net: nn.Module, optimizer: Any, batch: Any, device: str
    ) -> None:
        self.config, self.net, self.optimizer, self.batch = config, net, optimizer, batch
        self.device, self.number = device, 0
        self.objective = instantiate(config.objective).to(device)
        self.objective.setup(net)
        self.objective.on_fit_start(next(net.parameters()))
        graphs = compiled(config) and config.cuda_graphs is not False and not no_cuda_graphs(config)
        self.step = Step(net, self.objective, compiled(config), graphs)
        self.dtype = DTYPES.get(precision(config.trainer))
        self.step.prepare(self.dtype)
        self.step.halve(optimizer, self.dtype)

    def __call__(self, mark: Any) -> None:
        x, y = self.batch
        number = self.number
        self.number += 1
        torch.manual_seed(key(self.config.seed, number, 0, "layers"))
        draws = Draws(self.config.seed, number, device=x.device)
        mark()
        sample = self.objective.sample(x, y, self.net.null_label, draws)
        with torch.autocast(self.device, self.dtype) if self.dtype else nullcontext():
            loss = self.step(sample).loss
        mark()
        self.step.backward(loss)
        mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(self.net)
        mark()

    def times(self, steps: int) -> list[tuple[float, ...]]:
        """(forward, backward, optimizer) of each step in milliseconds, after the device waited."""
        if self.device != "cuda":
            marks: list[float] = []
            for _ in range(steps):
                self(lambda: marks.append(1e3 * time.perf_counter()))
            spans = [b - a for a, b in pairwise(marks)]
        else:
            events: list[torch.cuda.Event] = []

            def mark() -> None:
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()

            for _ in range(steps):
                self(mark)
            torch.cuda.synchronize()
            spans = [a.elapsed_time(b) for a, b in pairwise(events)]
        # Of every four spans the last is between two steps.
        return [tuple(spans[4 * i : 4 * i + 3]) for i in range(steps)]

    def first(self) -> float:
        """Seconds until the first step is done."""
        start = time.perf_counter()
        self.times(1)
        return time.perf_counter() - start

    def memory(self) -> dict[str, float]:
        """MiB of a GPU: before a step (the same for all arms of a cell, which share weights, their
        copies in 16 bits and the optimizer), and at its peak.
        """
        if self.device != "cuda":
            return {}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
        self.times(1)
        peak = torch.cuda.max_memory_allocated()
        return {"resting_mib": resting / 2**20, "peak_mib": peak / 2**20}


def overrides_of(cell: dict[str, Any], dims: DictConfig, batch: int) -> list[str]:
    """What a cell asks of train.py."""
    return [
        *dims[str(cell["head_dim"])],
        f"objective.jvp.mode={cell['mode']}",
        f"compile={str(cell['compiled']).lower()}",
        f"data.tokens={cell['tokens']}",
        f"data.batch_size={batch}",
    ]


def arms_of(config: DictConfig) -> dict[str, list[str]]:
    return {name: list(given) for name, given in config.comparison.arms.items() if given}


class Cell:
    """The arms of a cell, on the same parameters, optimizer and batch."""

    def __init__(self, configs: dict[str, DictConfig], device: str) -> None:
        first = next(iter(configs.values()))
        data = build_data(first)
        module = build_module(first, data).to(device)
        parameters = list(module.net.parameters())
        optimizer, _ = module.optimizer(parameters, max(1, first.trainer.max_steps))
        if not data.drawn:
            raise ValueError("data: speed is measured on drawn images of any size; use data=blobs")
        batch = data.draw(data.batch_size, generator(first.seed, 0, 0, "data"))
        self.batch = tuple(x.to(device) for x in batch)
        self.steppers = {}
        for name, config in configs.items():
            with torch.device("meta"):
                net = build_module(config, data).net
            _share(net, module.net)
            self.steppers[name] = Stepper(config, net, optimizer, self.batch, device)
        self.module, self.head_dim = module, _head_dim(module.net)

    def flops(self) -> int:
        return step_flops(self.module.net, self.module.objective, *self.batch)


def _share(net: nn.Module, other: nn.Module) -> None:
    """Give a network the parameters and buffers of another one: the same tensors."""
    for mine, theirs in zip(net.modules(), other.modules(), strict=True):
        mine._parameters.update(theirs._parameters)
        mine._buffers.update(theirs._buffers)


def _head_dim(net: Any) -> int:
    attention = net.blocks[0].attention
    return attention.qkv.in_features // attention.heads


def clear() -> None:
    """Forget compiled code and cached memory of an earlier cell."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    configs: dict[str, DictConfig], head_dim: int, options: DictConfig, device: str
) -> dict[str, dict[str, Any]]:
    """Arm -> what was measured, on one batch size, the arms taking turns."""
    found: dict[str, dict[str, Any]] = {name: {"status": MEASURED} for name in configs}
    try:
        cell = Cell(configs, device)
    except torch.cuda.OutOfMemoryError:
        return {name: {"status": OUT_OF_MEMORY} for name in configs}
    if cell.head_dim != head_dim:
        raise ValueError(
            f"comparison.speed.head_dims.{head_dim}: its overrides make a model of head dim"
            f" {cell.head_dim}; set model.width and model.heads so that width / heads = {head_dim}"
        )
    for name, stepper in cell.steppers.items():
        found[name] |= _prepare(stepper, options.warmup)
    ready = [name for name in cell.steppers if found[name]["status"] == MEASURED]
    spans: dict[str, list[tuple[float, ...]]] = {name: [] for name in ready}
    for number in range(options.rounds):
        for name in list(ready if number % 2 == 0 else ready[::-1]):
            stepper = cell.steppers[name]
            turn = _attempt(stepper, lambda s=stepper: {"spans": s.times(options.steps_per_round)})
            if "status" in turn:  # beside what the other arms keep
                found[name] = turn
                ready.remove(name)
            else:
                spans[name] += turn["spans"]
    config = next(iter(configs.values()))
    peak = config.callbacks.throughput.peak_tflops
    peak = peak or peak_tflops(torch.device(device), precision(config.trainer))
    images, flops = len(cell.batch[0]), cell.flops()
    for name in ready:
        found[name] |= _numbers(np.array(spans[name]), images, flops, peak)
        found[name]["batch"] = images
    return found


def _prepare(stepper: Stepper, warmup: int) -> dict[str, Any]:
    """First step, warm-up and peak memory of an arm that is alone on the device."""

    def prepared() -> dict[str, Any]:
        first = stepper.first()
        stepper.times(warmup)
        return {"first_step_s": first, **stepper.memory()}

    return _attempt(stepper, prepared)


def _attempt(stepper: Stepper, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns; where it fails, the status of the arm, its memory free again."""
    try:
        return work()
    except Exception as error:
        failure = _failure(error)  # and no more: the error holds what filled the memory
    stepper.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure


def _failure(error: Exception) -> dict[str, Any]:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    # cuBLAS, kernels that are loaded and compiled code say it in words of their own.
    full = "out of memory" in reason.lower() or "ALLOC_FAILED" in reason
    if full or isinstance(error, torch.cuda.OutOfMemoryError):
        return {"status": OUT_OF_MEMORY}
    if "CUDA error" in reason:  # the device is lost to this process: nothing is said of the arm
        raise error
    return {"status": UNSUPPORTED, "reason": reason}


def _numbers(spans: np.ndarray, images: int, flops: int, peak: float | None) -> dict[str, Any]:
    """(steps, 3) -> the row of an arm."""
    times = spans.sum(1)
    p10, median, p90 = np.quantile(times, [0.1, 0.5, 0.9])
    forward, backward, optimizer = np.median(spans, axis=0)
    tflops = flops / median / 1e9
    return {
        "ms": float(median),
        "ms_p10": float(p10),
        "ms_p90": float(p90),
        "images_per_s": float(1e3 * images / median),
        "forward_ms": float(forward),
        "backward_ms": float(backward),
        "optimizer_ms": float(optimizer),
        "tflops": float(tflops),
        "mfu": float(tflops / peak) if peak else None,
        "times_ms": times.round(4).tolist(),
    }


def largest_batch(
    compose: Compose, arm: list[str], cell: dict[str, Any], options: DictConfig, start: int,
    device: str,
) -> int:  # fmt: skip
    """The most images that fit, to within a factor of 1.25: doubled until memory runs out, then
    halved between; 0 where not even one does.
    """

    def fits(batch: int) -> bool:
        clear()
        config = compose([*arm, *overrides_of(cell, options.head_dims, batch)])
        try:
            stepper = Cell({"": config}, device).steppers[""]
        except torch.cuda.OutOfMemoryError:
            return False
        return _prepare(stepper, 1).get("status") is None

    low, high = 0, start
    while high <= options.largest_limit and fits(high):
        low, high = high, 2 * high
    if high > options.largest_limit:
        return low
    while high - low > max(1, low // 4):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def compare_cells(config: DictConfig, compose: Compose, output: Path) -> list[dict[str, Any]]:
    """Every cell that speed.jsonl does not hold yet; a comparison that was cut off goes on."""
    options, arms = config.comparison.speed, arms_of(config)
    check_arms(compose, list(arms.items()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = output / "speed.jsonl"
    settings, measured = settings_of(config), read_jsonl(path)
    if any(row["settings"] != settings for row in measured):
        raise ValueError(
            f"hydra.run.dir: {path} was measured with another model, objective, data or precision;"
            " give another directory"
        )
    done = {tuple(row[name] for name in CELL) for row in measured}
    dims = [dim for dim, given in options.head_dims.items() if given]
    grid = product(options.compiled, options.batches, options.modes, dims, options.tokens)
    cells = [
        {"tokens": n, "head_dim": int(dim), "mode": mode, "compiled": compiled, "batches": batches}
        for compiled, batches, mode, dim, n in grid
    ]
    for number, cell in enumerate(tracked(cells, "cells", len(cells), lines=False), 1):
        if tuple(cell.values()) in done:
            continue
        named = ", ".join(f"{name} {value}" for name, value in cell.items())
        print(f"cell {number} of {len(cells)}: {named}", flush=True)
        rows = _rows(cell, arms, options, compose, device)
        append_jsonl(({**row, "settings": settings} for row in rows), path)
        for row in rows:
            print(f"  {_line(row)}", flush=True)
    return read_jsonl(path)


def _line(row: dict[str, Any]) -> str:
    """An arm of a cell on the terminal."""
    if row["status"] != MEASURED:
        return f"{row['arm']}: {row['status']} {row.get('reason', '')}".rstrip()
    peak = row.get("peak_mib")
    memory = f", {peak:.0f} MiB" if peak else ""
    return f"{row['arm']}: {row['ms']:.1f} ms, {row['images_per_s']:.1f} images/s{memory}"


def settings_of(config: DictConfig) -> str:
    """A hash of everything that a time depends on, but for what makes a cell or an arm."""
    names = ("model", "objective", "data", "optimizer", "trainer")
    text = json.dumps([OmegaConf.to_container(config[name]) for name in names])
    return f"{zlib.crc32(text.encode()):08x}"


def _rows(
    cell: dict[str, Any], arms: dict[str, list[str]], options: DictConfig, compose: Compose,
    device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    equal = max(1, options.tokens_per_batch // cell["tokens"])
    configs = {
        name: compose([*arm, *overrides_of(cell, options.head_dims, equal)])
        for name, arm in arms.items()
    }
    reason = _unsupported(configs, cell, device)
    if reason:
        return [cell | {"arm": a, "status": UNSUPPORTED, "reason": reason} for a in arms]
    if cell["batches"] == "equal":
        clear()
        found = measure(configs, cell["head_dim"], options, device)
        return [cell | {"arm": name} | row for name, row in found.items()]
    rows = []
    for name, arm in arms.items():
        batch = largest_batch(compose, arm, cell, options, equal, device)
        row: dict[str, Any] = {"status": OUT_OF_MEMORY}
        if batch:
            clear()
            alone = {name: compose([*arm, *overrides_of(cell, options.head_dims, batch)])}
            row = measure(alone, cell["head_dim"], options, device)[name]
        rows.append(cell | {"arm": name} | row)
    return rows


def _unsupported(configs: dict[str, DictConfig], cell: dict[str, Any], device: str) -> str | None:
    if cell["batches"] == "largest" and device != "cuda":
        return "the largest batch that fits is a question to a GPU"
    for config in configs.values():
        try:
            check(config)
        except NotImplementedError as error:
            return str(error)
    return None
