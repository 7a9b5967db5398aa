"""Evaluate: ``python scripts/evaluate.py ckpt=RUN/checkpoints/last.ckpt nfe=[1,2]`` prints a table
and writes it as JSON.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from training.build import build_data
from training.cli import one_line_errors, run
from training.environment import environment
from training.loading import load_trained, sampler_of
from training.metrics.classifier import FEATURES
from training.metrics.evaluator import Options, build_evaluator
from training.progress import tracked
from training.registry import trust
from training.samplers.generate import balanced_labels, stream
from training.validation import one_of, positive_integer, seed
from training.whole_files import replaced

TITLES = {
    "weights": "weights",
    "nfe": "NFE",
    "frechet_distance": "Fréchet distance (classifier)",
    "fid": "FID",
    "inception_distance": "Fréchet distance (Inception)",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "class accuracy",
    "energy_distance": "energy distance",
}


def evaluate(config: DictConfig) -> None:
    for name in ("n", "k", "classifier_steps"):
        positive_integer(name, config[name])
    seed(config.seed)
    one_of("features", config.features, ("classifier", "inception"))
    counts = list(config.nfe) if isinstance(config.nfe, ListConfig) else [config.nfe]
    for nfe in counts or [None]:
        positive_integer("nfe", nfe)
    trust(config.trusted)
    path = Path(config.ckpt)
    trained = load_trained(path)
    sampler = sampler_of(trained.config, config.get("sampler"))
    chosen = [config.weights] if isinstance(config.weights, str) else config.weights
    names = [str(name) for name in chosen or trained.averages or ["net"]]
    data_config = config.get("data") or trained.config.data
    data = build_data(DictConfig({"data": data_config, "seed": trained.config.seed}))
    if data.shape != trained.shape or data.num_classes != trained.num_classes:
        raise ValueError(
            f"data: the network was trained on images {trained.shape} of {trained.num_classes}"
            f" classes; this data set has {data.shape} and {data.num_classes}"
        )
    folder = path.resolve().parent
    folder = (folder if path.suffix == ".safetensors" else folder.parent) / "evaluation"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluator = build_evaluator(
        data,
        Options(
            config.features,
            config.n,
            config.k,
            Path(config.classifier or folder / "classifier.pt"),
            config.classifier_steps,
            config.inception,
            device,
            Path(config.reference) if config.reference else None,
        ),
    )
    numbers = (f"scores_{i}.json" if i > 1 else "scores.json" for i in itertools.count(1))
    free = next(folder / name for name in numbers if not (folder / name).exists())
    output = Path(config.output or free)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"ckpt": str(path), "step": trained.step, "features": config.features, "k": config.k}
    about |= {"seed": config.seed, "sampler": OmegaConf.to_container(sampler)}
    about |= {"environment": environment()}
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)  # written at once: the next one may take an hour, and fail
        with replaced(output) as temporary:
            temporary.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")

    if config.features != "inception" or data.images:
        # Real examples that nobody trained on: the best that can be reached with this many.
        n = config.n if data.drawn else min(config.n, len(data.sources["val"]))
        scores = evaluator.scores(data.parts("val", n), n)
        add({"weights": "real, held out", "n": n} | scores)
    y = balanced_labels(config.n, data.num_classes)
    for name in names:
        net = load_trained(path, name, config.get("attention")).net.to(device)
        for nfe in counts:
            sampler.nfe = nfe
            parts = stream(net, instantiate(sampler), y, data.shape, config.seed)
            what = f"samples of {name}, NFE {nfe}"
            parts = tracked(parts, what, config.n, size=lambda part: len(part[1]))
            scores = evaluator.scores(parts, config.n)
            add({"weights": name, "nfe": nfe, "n": config.n} | scores)

    Console().print(table_of(rows))
    few = min(len(data.sources["train"]) if not data.drawn else config.n, config.n)
    if config.features == "classifier" and "frechet_distance" not in rows[-1] and data.images:
        print(f"no Fréchet distance: {FEATURES} features need more than {few} images")
    print(output)


def table_of(rows: list[dict[str, Any]]) -> Table:
    keys = [key for key in TITLES if any(key in row for row in rows)]
    table = Table(*(TITLES[key] for key in keys))
    for row in rows:
        cells = [row.get(key, "") for key in keys]
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    with one_line_errors():
        evaluate(config)


if __name__ == "__main__":
    run(main, adopted="sampler")
