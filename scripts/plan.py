"""What a training step takes of each GPU's memory: ``python scripts/plan.py model=dit_xl2
data=blobs data.channels=4 trainer.devices=8 trainer.precision=bf16-mixed``. Needs no GPU.
"""

import json
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from training.build import build_data, build_net, settle_batch
from training.cli import one_line_errors, run
from training.config_checks import no_cuda_graphs, precision
from training.objectives.teachers import FixedTeacher
from training.planner import Plan, count, plans, saved_bytes
from training.renamed import composed
from training.validation import between, positive_integer

WIDTH = 132  # of the table, however narrow the terminal
COLUMNS = ("parameters", "gradients", "optimizer", "averages", "gathered", "activations")
COLUMNS += ("working", "total")


def plan(config: DictConfig) -> tuple[str, list[Plan]]:
    """A line that says what was planned, and the plans."""
    nodes, devices = config.trainer.num_nodes, config.trainer.devices
    positive_integer("trainer.devices", devices)
    positive_integer("trainer.num_nodes", nodes)
    between("plan.gpu_gib", config.plan.gpu_gib, 0, open_low=True)
    settle_batch(config, nodes * devices)
    data = build_data(config)
    batch, half = config.data.batch_size, precision(config.trainer) in ("bf16-mixed", "16-mixed")

    def build() -> tuple[nn.Module, Any]:
        net = build_net(config, data.shape, data.num_classes)
        objective = instantiate(config.objective)
        objective.setup(net)
        if isinstance(objective, FixedTeacher) and objective.load_teacher is not None:
            teacher = build_net(config, data.shape, data.num_classes)  # taken to be as large
            objective.teacher = [teacher.requires_grad_(False)]
        return net, objective

    saved = saved_bytes(build, batch, data.shape, half, config.compile is not False)
    with torch.device("meta"):  # else the weights would be there
        counted = count(*build())
    title = (
        f"{counted.all / 1e6:.1f} M parameters, {batch} images {tuple(data.shape)} a GPU,"
        f" {precision(config.trainer)}, GiB of each of {nodes * devices} GPUs"
    )
    accumulate = config.trainer.accumulate_grad_batches
    graphs = config.cuda_graphs is not False and not no_cuda_graphs(config)
    kept = averages(config)
    found = plans(counted, saved, nodes * devices, nodes, kept, half, accumulate, graphs)
    return title, found


def averages(config: DictConfig) -> int:
    ema = config.callbacks.get("ema")
    return len(instantiate(ema).averages) if ema else 0


def table(title: str, found: list[Plan], gib: float) -> Table:
    result = Table("sharding", "checkpointing", *COLUMNS, f"fits {gib:g} GiB", title=title)
    for row in found:
        sizes = [f"{getattr(row, name) / 2**30:.2f}" for name in COLUMNS]
        fits = "yes" if row.total <= gib * 2**30 else "no"
        result.add_row(row.sharding, row.checkpointing, *sizes, fits)
    return result


@hydra.main(version_base="1.3", config_path="../configs", config_name="plan")
def main(config: DictConfig) -> None:
    with one_line_errors():
        title, found = plan(composed(config))
        Console(width=WIDTH).print(table(title, found, config.plan.gpu_gib))
        if config.plan.output:
            rows = [row._asdict() for row in found]
            Path(config.plan.output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
