"""Collects runs on digits into one result file and prints them as a table.

    python scripts/train.py objective=tvm attention=jvp hydra.run.dir=RUN
    python scripts/digits_objectives.py RUN RUN ... --output docs/results/digits_objectives.json

For each run: steps and seconds of its summary.json, and, at several numbers of evaluations of the
averaged network, the class accuracy of 1000 samples under the support vector machine, and their
energy distance to the training images, which sees a lack of diversity that the accuracy does not.
"""

import argparse
import json
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from scripts.environment import environment
from training.build import build_data
from training.metrics.energy import energy_distance
from training.metrics.svm import SVM
from training.samplers.generate import balanced_labels, generate
from training.trained import load_trained

N = 1000


def name(config: DictConfig) -> str:
    """The objective's name on the command line."""
    objective = config.objective
    module: str = objective._target_.split(".")[-2]
    if module == "flow_map":
        return f"{objective.kind[0]}sd"
    if objective.get("teacher"):
        return {"scm": "scd", "dmf": "dmf_distillation"}.get(module, module)
    return module


def row(run: Path) -> dict:
    summary = json.loads((run / "summary.json").read_text())
    trained = load_trained(run / "checkpoints" / "last.ckpt")
    config, data = trained.config, build_data(trained.config)
    svm, y = SVM(*data.train), balanced_labels(N, data.num_classes)
    real = data.train[0]
    accuracy, distance = {}, {}
    for nfe in sorted({1, 2, 4, config.sampler.nfe}):
        sampler = instantiate(config.sampler, nfe=nfe)
        images = generate(trained.net, sampler, y, data.shape, config.seed + 1)
        accuracy[str(nfe)] = round(svm.accuracy(images, y), 4)
        distance[str(nfe)] = round(energy_distance(images.clamp(-1, 1), real), 4)
    return {
        "objective": name(config),
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "step_ms": round(summary["step_ms"], 1),
        "error": round(summary["error"], 4),
        "real_accuracy": round(summary["real_accuracy"], 4),
        "real_distance": round(energy_distance(data.held_out[0], real), 4),
        "sample_accuracy": accuracy,
        "energy_distance": distance,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs on digits as one table.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of scripts/train.py")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(run) for run in arguments.runs]
    if arguments.output:
        result = {"environment": environment(), "samples": N, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(rows))


def markdown(rows: list[dict]) -> str:
    """The table of docs/training/experiments.md: accuracy and energy distance."""
    lines = [
        "| objective | steps | seconds | 1 NFE | 2 NFE | 4 NFE | more |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = {
            n: f"{a:.1%}, {r['energy_distance'][n]:.4f}" for n, a in r["sample_accuracy"].items()
        }
        more = [f"{n} NFE: {cell}" for n, cell in cells.items() if int(n) > 4]
        head = [f"`{r['objective']}`", str(r["steps"]), f"{r['seconds']:.0f}"]
        few = [cells[n] for n in ("1", "2", "4")]
        lines.append("| " + " | ".join([*head, *few, ", ".join(more)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
