"""Few-step objectives on eight Gaussians in the plane, beside flow matching: a minute of CPU each.

    python scripts/eight_gaussians.py --output docs/results/eight_gaussians.json

Data: eight Gaussians of std 0.1 on a circle of radius 1.38. Network: a perceptron of three hidden
layers of 128 units that sees (z, t, t - r), the same for every objective. Measured: the energy
distance 2 E‖X - Y‖ - E‖X - X'‖ - E‖Y - Y'‖ between samples and data; that of data to other data is
the floor. With few dimensions the adaptive weight with p = 1 seeks modes: here p = 0.
"""

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from training.callbacks.ema import with_weights
from training.environment import environment
from training.metrics.energy import energy_distance
from training.objectives.alphaflow import AlphaFlow
from training.objectives.flow_matching import FlowMatching
from training.objectives.meanflow import MeanFlow
from training.objectives.objective import Objective
from training.objectives.shortcut import Shortcut
from training.objectives.tangents import Jvp
from training.objectives.teachers import AveragedTeacher
from training.objectives.tvm import TVM
from training.optimizers import adamw
from training.randomness import Draws, generator
from training.samplers.flow import FlowSampler
from training.samplers.meanflow import MeanFlowSampler

RADIUS, STD, NULL = 1.38, 0.1, 1
PLAIN = {"p": 0.0, "reduce": "mean", "time_sampler": "uniform", "label_dropout": 0.0}


def objectives(steps: int) -> dict[str, Objective]:
    uniform = {"time_sampler": "uniform", "label_dropout": 0.0}
    return {
        "flow_matching": FlowMatching(**uniform),
        "meanflow": MeanFlow(data_proportion=0.5, **PLAIN),
        "meanflow, finite_difference": MeanFlow(Jvp("finite_difference"), 0.5, **PLAIN),
        "alphaflow": AlphaFlow(data_proportion=0.5, start=0, end=round(0.8 * steps), **PLAIN),
        "tvm": TVM(gap_sampler="uniform", **uniform),
        "shortcut": Shortcut(consistency_share=0.25, denoise_timesteps=32, **uniform),
    }


class Perceptron(nn.Module):
    """(z, t, t - r) -> (B, 2); there are no labels."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = [4, width, width, width]
        layers = [f for a, b in pairwise(sizes) for f in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(
        self, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        return self.layers(torch.cat([z, t[:, None], (t - r)[:, None]], dim=1))


def data(n: int, seed: int, step: int) -> torch.Tensor:
    g = generator(seed, step, 0, "data")
    angle = torch.randint(8, (n,), generator=g) * (math.pi / 4)
    centre = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + STD * torch.randn(n, 2, generator=g)


def train(objective: Objective, steps: int, batch: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = Perceptron()
    objective.setup(net)
    average = AveragedTeacher(net, 0.999)
    optimizer, scheduler = adamw(net.parameters(), steps, lr=2e-3, schedule="cosine")
    y = torch.zeros(batch, dtype=torch.int64)
    for step in range(steps):
        draws = Draws(seed, step)
        sample = objective.sample(data(batch, seed, step), y, NULL, draws)
        optimizer.zero_grad()
        objective.loss(net, sample).loss.backward()
        optimizer.step()
        scheduler.step()
        objective.after_step(net)
        average.follow(net)
    return with_weights(net, dict(average.net.named_parameters()))


@torch.no_grad()
def measure(net: nn.Module, objective: Objective, nfe: int, n: int = 4096) -> float:
    # A velocity, which knows r = t alone, takes Euler's steps.
    sampler = FlowSampler if isinstance(objective, FlowMatching) else MeanFlowSampler
    noise = torch.randn(n, 2, generator=generator(0, 0, 0, "samples"))
    samples = sampler(nfe=nfe)(net, noise, torch.zeros(n, dtype=torch.int64))
    return energy_distance(samples, data(n, 10**6, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Few-step objectives on eight Gaussians.")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--objectives", nargs="*", default=None, help="default: all")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, batch = arguments.steps, arguments.batch

    rows, floor = [], energy_distance(data(4096, 10**6, 1), data(4096, 10**6, 0))
    for name in arguments.objectives or objectives(steps):
        for seed in range(arguments.seeds):
            start = time.perf_counter()
            objective = objectives(steps)[name]
            net = train(objective, steps, batch, seed)
            seconds = round(time.perf_counter() - start, 1)
            distances = {str(nfe): round(measure(net, objective, nfe), 5) for nfe in (1, 2, 4, 32)}
            rows.append({"objective": name, "seed": seed, "seconds": seconds, "nfe": distances})
    print(markdown(rows))
    print(f"floor {floor:.5f}")
    if arguments.output:
        result = {"environment": environment(), "steps": steps, "batch": batch, "floor": floor}
        arguments.output.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


def markdown(rows: list[dict]) -> str:
    """The table of docs/training/experiments.md."""
    lines = ["| objective | seed | 1 NFE | 2 NFE | 4 NFE | 32 NFE |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{d:.4f}" for d in row["nfe"].values()]
        lines.append("| " + " | ".join([row["objective"], str(row["seed"]), *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
