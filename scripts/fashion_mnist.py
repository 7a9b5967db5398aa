"""Collects runs on Fashion-MNIST into one result file, prints tables and draws pictures.

    python scripts/train.py experiment=fashion_mnist_scm trainer=gpu hydra.run.dir=RUN
    python scripts/fashion_mnist.py RUN RUN RUN --output docs/results/fashion_mnist_h100.json
    python scripts/fashion_mnist.py --output docs/results/fashion_mnist_*.json \
        --document docs/training/experiments.md

For each run: what it cost, its curve, and, at several numbers of evaluations of the averaged
network, how good its samples are by one classifier that all runs share (`metrics.evaluator`), from
the same noise. The pictures lie beside the result file. Without runs: the tables and curves of
files that are there; with ``--document``, written between its two lines
`<!-- begin fashion_mnist -->` and `<!-- end fashion_mnist -->`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate

from scripts.digits_objectives import name
from scripts.fashion_mnist_plots import TITLES, Strip, curves, sample_grid
from training.build import build_data
from training.checkpoints import load_rest
from training.cli import one_line_errors
from training.comparison.arms import Run, read_run
from training.comparison.files import finite
from training.comparison.plots import save
from training.environment import environment
from training.loading import load_trained
from training.metrics.evaluator import Evaluator, Options, build_evaluator
from training.samplers.generate import balanced_labels, generate

FEW = (1, 2, 4)  # evaluations of the network; beside them, those that the run's own sampler takes
POINTS = 200  # of a curve in the result file
SCORES = {
    "frechet_distance": ("Fréchet distance (classifier)", "{:.2f}"),
    "precision": ("precision", "{:.2f}"),
    "recall": ("recall", "{:.2f}"),
    "accuracy": ("class accuracy", "{:.1%}"),
}
COSTS = {
    "steps": ("steps", "{}"),
    "images": ("images seen", "{:,}"),
    "seconds": ("seconds", "{:.0f}"),
    "step_ms": ("ms a step (median)", "{:.1f}"),
    "samples_per_s": ("images/s at the median", "{:.0f}"),
}


def collect(
    runs: Sequence[Path], output: Path, arguments: argparse.Namespace
) -> tuple[dict, list[Strip]]:
    """The result, written to `output` after every run, and the strips of the grid of samples."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # TF32: there are many evaluations, and no derivative among them
        torch.set_float32_matmul_precision("high")
    data = build_data(load_trained(runs[0] / "checkpoints" / "last.ckpt").config)
    path = arguments.classifier or runs[0] / "evaluation" / "classifier.pt"
    evaluator = build_evaluator(
        data, Options("classifier", arguments.n, 3, path, arguments.classifier_steps, None, device)
    )
    real, y = data.examples("val", arguments.n)
    result: dict[str, Any] = {
        "environment": environment(),
        "note": arguments.note,
        "samples": arguments.n,
        "classifier_steps": arguments.classifier_steps,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "real": evaluator.scores([(real, y)], len(y)) | {"n": len(y)},
        "rows": [],
    }
    strips = [Strip("real", torch.stack([real[y == label][0] for label in range(10)]))]
    for run in runs:
        row, drawn = evaluated(read_run(run), evaluator, balanced_labels(arguments.n, 10), device)
        result["rows"].append(row)
        strips += drawn
        text = json.dumps(finite(result), indent=1, allow_nan=False)
        output.write_text(text + "\n")
        print(f"{run}: {row['objective']}", flush=True)
    return result, strips


def evaluated(
    run: Run, evaluator: Evaluator, y: torch.Tensor, device: str
) -> tuple[dict, list[Strip]]:
    """A run's row, and one sample of each class for each number of evaluations."""
    trained = load_trained(run.directory / "checkpoints" / "last.ckpt")
    config, net = trained.config, trained.net.to(device)
    scores, strips = {}, []
    for nfe in sorted({*FEW, config.sampler.nfe}):
        sampler = instantiate(config.sampler, nfe=nfe)
        # Other noise than the picture's: what is judged was not looked at.
        images = generate(net, sampler, y, trained.shape, config.seed + 1)
        scores[str(nfe)] = evaluator.scores([(images, y)], len(y))
        images = generate(net, sampler, torch.arange(10), trained.shape, config.seed)
        strips.append(Strip(f"{TITLES.get(name(config), name(config))}, {nfe} NFE", images))
    ema = config.callbacks.ema
    batch = config.data.batch_size * config.trainer.accumulate_grad_batches
    row = {
        "objective": name(config),
        "parameters": sum(p.numel() for p in net.parameters()),
        "average": (ema and ema.use) or (trained.averages or ["net"])[0],
        "batch_size": batch,
        "steps": trained.step,
        "images": trained.step * batch,
        **{key: run.summary.get(key) for key in ("seconds", "step_ms", "samples_per_s")},
        "precision": config.trainer.precision,
        "compile": config.compile,
        "scores": scores,
        "curve": thinned(run),
    }
    return row, strips


def thinned(run: Run, **more: str) -> dict[str, list[float]]:
    """The unweighted error over the steps, in means of neighbours: at most ``POINTS`` of them.

    ``more``: names of other metrics of the run, beside it.
    """
    parts = min(POINTS, len(run.steps))

    def means(values: np.ndarray) -> list[np.ndarray]:
        return [part.mean() for part in np.array_split(values, parts)]

    curve = {"step": [round(float(mean), 1) for mean in means(run.steps + 1)]}
    for key, metric in {"error": "train/error", **more}.items():
        curve[key] = [float(f"{mean:.5g}") for mean in means(run.metrics[metric])]
    return curve


def markdown(result: dict) -> str:
    """The tables of docs/training/experiments.md: scores of the samples, then costs of the runs."""
    rows = [["real, held out", "", *cells(SCORES, result["real"])]]
    for row in result["rows"]:
        for nfe, scores in row["scores"].items():
            rows.append([f"`{row['objective']}`", nfe, *cells(SCORES, scores)])
    runs = [[f"`{row['objective']}`", *cells(COSTS, row)] for row in result["rows"]]
    first = table(["samples", "NFE", *(title for title, _ in SCORES.values())], rows)
    return f"{first}\n\n{table(['run', *(title for title, _ in COSTS.values())], runs)}"


def block(result: dict, path: Path) -> str:
    """The block of docs/training/experiments.md: pictures, tables, and where they come from."""
    about = result["environment"]
    notes = [f"{about['gpu'] or about['cpu']}, torch {about['torch']}", result["note"]]
    notes += [f"{result['samples']} samples", f"[{path.name}](../results/{path.name})"]
    parts = [
        f"![Samples](../results/{path.stem}.png)",
        "*A class a column, every row but the first from the same noise.*",
        markdown(result),
        f"*{'; '.join(filter(None, notes))}.*",
        f"![Curves](../results/{path.stem}_curves.png)",
        "*Unweighted error: means of neighbouring logged steps, and a running median of those.*",
    ]
    return "".join(f"\n{part}\n" for part in parts) + "\n"


def write_block(document: Path, text: str, name: str = "fashion_mnist") -> None:
    pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
    page, found = re.subn(
        pattern, lambda m: m[1] + text + m[2], document.read_text(), flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"{document} has {found} blocks named {name}, not one")
    document.write_text(page)


def cells(columns: dict[str, tuple[str, str]], row: dict) -> list[str]:
    found = [(row.get(key), form) for key, (_, form) in columns.items()]
    return ["" if value is None else form.format(value) for value, form in found]


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs on Fashion-MNIST as tables and pictures.")
    parser.add_argument("runs", nargs="*", type=Path, help="run directories of scripts/train.py")
    parser.add_argument(
        "--output", type=Path, nargs="+", required=True, help="JSON file to write, or files to read"
    )
    parser.add_argument("--document", type=Path, default=None, help="page to write the block to")
    parser.add_argument("--n", type=int, default=2000, help="samples, and images to compare with")
    parser.add_argument("--classifier", type=Path, default=None, help="its file, kept or made")
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--note", default=None, help="what else a reader must know of the runs")
    arguments = parser.parse_args()
    with one_line_errors():
        report(parser, arguments)


def report(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for path in () if arguments.runs else arguments.output:
        if not path.is_file():
            raise FileNotFoundError(f"--output: there is no file {path}; without runs it is read")
    for run in arguments.runs:
        read_run(run)  # before minutes are spent on the first ones
        load_rest(run / "checkpoints" / "last.ckpt")
    results: dict[Path, dict] = {}
    if arguments.runs:
        if len(arguments.output) != 1:
            parser.error("--output must be one file for the runs")
        (output,) = arguments.output
        results[output], strips = collect(arguments.runs, output, arguments)
        print(save(sample_grid(strips), output.with_suffix(".png")))
    else:
        results = {path: json.loads(path.read_text()) for path in arguments.output}
    for path, result in results.items():
        print(markdown(result))
        print(save(curves(result["rows"]), path.with_name(f"{path.stem}_curves.png")))
    if arguments.document:
        blocks = "".join(block(result, path) for path, result in results.items())
        write_block(arguments.document, blocks)


if __name__ == "__main__":
    main()
