"""Collects runs on digits into one result file and prints them as a table.

    python scripts/digits_objectives.py RUNS --train --output docs/results/digits_objectives.json
    python scripts/digits_objectives.py RUN RUN ... --output docs/results/digits_objectives.json

The first line trains every objective below RUNS, one after the other, and goes on where it was cut
off; the second one reads runs that are there.

For each run: steps and seconds of its summary.json, and, at several numbers of evaluations of the
averaged network, the class accuracy of 1000 samples under the support vector machine, and their
energy distance to the training images, which sees a lack of diversity that the accuracy does not.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from training.build import build_data
from training.cli import one_line_errors
from training.environment import environment
from training.loading import load_trained
from training.metrics.energy import energy_distance
from training.metrics.svm import SVM
from training.samplers.generate import balanced_labels, generate

N = 1000
TEACHER = "flow_matching"
DISTILLATIONS = ("scd", "meanflow_distillation", "dmf_distillation")
OBJECTIVES = ("meanflow", "imf", "tvm", "alphaflow", "shortcut", "lsd", "esd", "psd", "dmf", "scm")
OBJECTIVES += (*DISTILLATIONS, TEACHER)


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
        "real_distance": round(energy_distance(data.val[0], real), 4),
        "sample_accuracy": accuracy,
        "energy_distance": distance,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs on digits as one table.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of scripts/train.py")
    parser.add_argument(
        "--train",
        nargs="*",
        choices=OBJECTIVES,
        default=None,
        help="train these first (without names all of them) below the directory RUNS",
    )
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="for train.py")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.train is not None:
        arguments.train = arguments.train or list(OBJECTIVES)
        if len(arguments.runs) != 1:
            parser.error("--train needs one directory for all runs")
    torch.set_num_threads(1)
    with one_line_errors():
        if arguments.train:
            train_all(arguments.train, arguments.runs[0], arguments.overrides)
            arguments.runs = [arguments.runs[0] / name for name in arguments.train]
        for run in arguments.runs:
            if not (run / "summary.json").is_file():
                raise FileNotFoundError(f"{run} has no summary.json; give runs that have ended")
        rows = [row(run) for run in arguments.runs]
        if arguments.output:
            result = {"environment": environment(), "samples": N, "rows": rows}
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(markdown(rows))


def train_all(names: Sequence[str], folder: Path, overrides: Sequence[str]) -> None:
    """One run after the other; a distillation has the run of flow matching beside it as teacher.
    A run that has ended is left as it is, one that was cut off goes on.
    """
    script = Path(__file__).with_name("train.py")
    for name in sorted(names, key=lambda name: name != TEACHER):
        run = folder / name
        if (run / "summary.json").is_file():
            continue
        given = [f"objective={name}", "attention=jvp", "ckpt_path=auto", f"hydra.run.dir={run}"]
        if name in DISTILLATIONS:
            teacher = folder / TEACHER / "checkpoints" / "last.ckpt"
            if not teacher.is_file():
                raise FileNotFoundError(f"{name} needs its teacher {teacher}; train {TEACHER} too")
            given.append(f"objective.teacher.ckpt={teacher}")
        print(f"{name} -> {run}", flush=True)
        subprocess.run([sys.executable, str(script), *given, *overrides], check=True)


def markdown(rows: list[dict]) -> str:
    """The table of docs/training/experiments.md: accuracy and energy distance."""
    lines = [
        "| objective | 1 NFE | 2 NFE | 4 NFE | more |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        cells = {
            n: f"{a:.1%}, {r['energy_distance'][n]:.4f}" for n, a in r["sample_accuracy"].items()
        }
        more = [f"{n} NFE: {cell}" for n, cell in cells.items() if int(n) > 4]
        cells = [f"`{r['objective']}`", *(cells[n] for n in ("1", "2", "4")), ", ".join(more)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
