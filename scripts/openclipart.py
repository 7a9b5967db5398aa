"""What ten minutes of one GPU buy with either attention: MeanFlow on drawings of 64 x 64 pixels.

    CUDA_VISIBLE_DEVICES=0 python scripts/openclipart.py --arm jvp --pack PACK.npz --output OUT &
    CUDA_VISIBLE_DEVICES=1 python scripts/openclipart.py --arm sdpa --pack PACK.npz --output OUT
    python scripts/openclipart.py --report OUT/jvp.json OUT/sdpa.json \
        --output docs/results/openclipart_h200.json --document docs/training/experiments.md

An arm is a run of ``experiment=openclipart`` with that attention, ended by its time; further
arguments are its overrides (``compile=true``). Then its averaged network is judged in one and two
evaluations, and its snapshots in one: the Fréchet distance over the features of one classifier,
trained on the drawings' own labels, which both arms share (not FID). OUT/ARM.json, .npz and .png
are what is found. Whatever is there is not made again, and a run that was interrupted goes on.

The report puts arms beside each other, if all but the attention agrees: tables, the picture of
samples (OUTPUT.png), the curves over time (OUTPUT_curves.png).
"""

import argparse
import fcntl
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from scripts.fashion_mnist import cells, table, thinned, write_block
from scripts.fashion_mnist_plots import Strip
from scripts.openclipart_plots import curves, sample_sheet
from training.arguments import CONFIGS
from training.build import build_data
from training.callbacks.ema import with_weights
from training.cli import one_line_errors, run
from training.comparison.arms import placed, read_run
from training.comparison.files import finite
from training.comparison.plots import save
from training.data.packed import Packed
from training.environment import environment
from training.fit import train
from training.loading import Trained, load_trained
from training.metrics.classifier import load_classifier
from training.metrics.evaluator import Features
from training.metrics.frechet import frechet_distance
from training.renamed import command_line
from training.samplers.generate import generate

NFE = (1, 2)
SPLITS = ("train", "val")
# Classes of the picture, as far as the pack has them; else its first ones.
COLUMNS = ("flags", "cards", "flat-theme", "lemon-theme", "map_symbols", "patterns", "people")
COLUMNS += ("animals", "fruit", "music", "buttons", "arrows", "shapes", "plants")
SAME = ("environment", "pack", "classifier", "minutes", "samples", "real", "columns")
SAME_ROWS = ("batch_size", "parameters", "average", "precision", "compile")  # of the arms' rows
SCORES = {
    "frechet_distance": ("Fréchet distance (classifier), training drawings", "{:.2f}"),
    "frechet_held_out": ("... held-out drawings", "{:.2f}"),
    "precision": ("precision", "{:.2f}"),
    "recall": ("recall", "{:.2f}"),
    "accuracy": ("class accuracy", "{:.1%}"),
}
COSTS = {
    "seconds": ("seconds", "{:.0f}"),
    "steps": ("steps", "{:,}"),
    "images": ("images seen", "{:,}"),
    "images_per_s": ("images/s, whole run", "{:.0f}"),
    "step_ms": ("ms a step (median)", "{:.1f}"),
    "mfu": ("MFU", "{:.1%}"),
    "memory_gib": ("peak memory, GiB", "{:.1f}"),
}


def configured(arm: str, options: argparse.Namespace) -> DictConfig:
    """What scripts/train.py is given for an arm."""
    directory = options.runs / arm
    seconds = round(60 * options.minutes)
    given = ["experiment=openclipart", f"attention={arm}", "logger=csv", "callbacks.samples=null"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = placed(compose("train", [*given, *command_line(options.overrides)]), directory)
    config.data.path = str(options.pack.resolve())
    config.ckpt_path = "auto"
    hours, rest = divmod(seconds, 3600)
    config.trainer.max_time = f"00:{hours:02}:{rest // 60:02}:{rest % 60:02}"
    config.callbacks.snapshots = {
        "_target_": "training.callbacks.snapshots.Snapshots",
        "directory": str(directory / "snapshots"),
        "seconds": seconds / options.snapshots,
    }
    return config


def run_arm(arm: str, options: argparse.Namespace) -> Path:
    """Trains, judges and writes; returns the path of the result."""
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = configured(arm, options)
    data: Packed = build_data(config)
    kept = options.classifier or options.runs / "classifier.pt"
    shared_classifier(kept, data, options.classifier_steps, device)
    prepared = time.perf_counter()
    (options.runs / arm).mkdir(parents=True, exist_ok=True)
    train(config, options.runs / arm)
    trained_at, memory = time.perf_counter(), None
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        torch.set_float32_matmul_precision("high")  # no derivative is taken from here on
    evaluators = {
        split: Features(data, None, 3, kept, options.classifier_steps, device, split)
        for split in SPLITS
    }
    columns = [name for name in COLUMNS if name in data.classes] or data.classes[: len(COLUMNS)]
    trained = load_trained(options.runs / arm / "checkpoints" / "last.ckpt")
    trained.net.to(device)
    row, strips = evaluated(arm, trained, evaluators, data, columns, options)
    row |= {"memory_gib": memory, "preparing_s": prepared - began}
    row["judging_s"] = time.perf_counter() - trained_at
    result = {
        "environment": environment(),
        "pack": {"sha256": digest(options.pack), "classes": data.classes, **data.about},
        "classifier": {"sha256": digest(kept), "steps": options.classifier_steps},
        "minutes": options.minutes,
        "samples": options.n,
        "real": floors(data, evaluators),
        "columns": columns,
        "rows": [row],
    }
    return write_result(result, strips, options.output / f"{arm}.json")


def shared_classifier(path: Path, data: Packed, steps: int, device: str) -> None:
    """Trained by the first process that comes; another one waits for its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        load_classifier(path, data, steps, device)


def evaluated(
    arm: str,
    trained: Trained,
    evaluators: dict[str, Features],
    data: Packed,
    columns: Sequence[str],
    options: argparse.Namespace,
) -> tuple[dict[str, Any], list[Strip]]:
    """An arm's row and its strips of the picture."""
    config, net, found = trained.config, trained.net, read_run(options.runs / arm)
    labels = data.examples("train")[1]  # as many of each class as the drawings have
    y = labels.repeat(math.ceil(options.n / len(labels)))[: options.n]
    shown = torch.tensor([data.classes.index(name) for name in columns]).repeat(options.rows)
    scores, strips = {}, real_strip(data, columns, options.rows)
    for nfe in NFE:
        sampler = instantiate(config.sampler, nfe=nfe)
        # Other noise than the picture's: what is judged was not looked at.
        x = generate(net, sampler, y, trained.shape, config.seed + 1)
        scores[str(nfe)] = evaluators["train"].scores([(x, y)], len(y))
        scores[str(nfe)]["frechet_held_out"] = evaluators["val"].distance(x)
        x = generate(net, sampler, shown, trained.shape, config.seed)
        strips.append(Strip(f"{arm}\n{nfe} NFE", x))
    batch = config.data.batch_size * config.trainer.accumulate_grad_batches
    seconds = float(found.metrics["perf/seconds"][-1])
    points = over_time(arm, trained, evaluators["train"], y, options)
    last = {"seconds": seconds, "step": trained.step}
    points.append(last | {"frechet_distance": scores["1"]["frechet_distance"]})
    row = {
        "arm": arm,
        "overrides": list(options.overrides),
        "parameters": sum(p.numel() for p in net.parameters()),
        "average": config.callbacks.ema.use,
        "batch_size": batch,
        "precision": config.trainer.precision,
        "compile": config.compile,
        "steps": trained.step,
        "images": trained.step * batch,
        "seconds": seconds,
        "images_per_s": trained.step * batch / seconds,
        **{key: found.summary.get(key) for key in ("step_ms", "samples_per_s", "mfu")},
        "scores": scores,
        "over_time": points,
        "curve": thinned(found, seconds="perf/seconds", loss="train/loss"),
    }
    return row, strips


def over_time(
    arm: str, trained: Trained, evaluator: Features, y: torch.Tensor, options: argparse.Namespace
) -> list[dict[str, float]]:
    """The distance of one-step samples at each earlier snapshot, all from the same noise."""
    sampler, points = instantiate(trained.config.sampler, nfe=1), []
    for path in sorted((options.runs / arm / "snapshots").glob("*.pt")):
        snapshot = torch.load(path, weights_only=True)
        if snapshot["step"] == trained.step:  # the end is judged already
            continue
        net = with_weights(trained.net, snapshot["weights"])
        x = generate(net, sampler, y, trained.shape, trained.config.seed + 1)
        where = {key: snapshot[key] for key in ("seconds", "step")}
        points.append(where | {"frechet_distance": evaluator.distance(x)})
    return points


def floors(data: Packed, evaluators: dict[str, Features]) -> dict[str, Any]:
    """What real drawings reach: held-out ones, and one half of the training drawings against the
    other, which are about as many as the samples.
    """
    x, y = data.examples("val")
    train = evaluators["train"].real
    half = len(train) // 2
    held_out = evaluators["train"].scores([(x, y)], len(y))
    halves = frechet_distance(train[:half], train[half:])
    return {
        "held_out": held_out,
        "halves": halves,
        "counts": {"train": len(train), "held_out": len(y)},
    }


def real_strip(data: Packed, columns: Sequence[str], rows: int) -> list[Strip]:
    """Held-out drawings of these classes."""
    x, y = data.examples("val")
    some = [x[y == data.classes.index(name)] for name in columns]
    images = [part[row % len(part)] for row in range(rows) for part in some]
    return [Strip("real", torch.stack(images))]


def write_result(result: dict[str, Any], strips: Sequence[Strip], path: Path) -> Path:
    """The result, its pictures as arrays of bytes, and as one that can be looked at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(result), indent=1, allow_nan=False) + "\n")
    arrays: dict[str, Any] = {
        strip.title: ((strip.images.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
        for strip in strips
    }
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    sample_sheet(strips, result["columns"]).save(path.with_suffix(".png"), optimize=True)
    return path


def read_result(path: Path) -> tuple[dict[str, Any], list[Strip]]:
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
        strips = [Strip(name, torch.from_numpy(file[name]) / 127.5 - 1) for name in file.files]
    return json.loads(path.read_text()), strips


def merged(paths: Sequence[Path]) -> tuple[dict[str, Any], list[Strip]]:
    """Arms beside each other; ``ValueError`` where they differ in more than the attention."""
    whole, strips = read_result(paths[0])
    first = whole["rows"][0]
    for path in paths[1:]:
        other, more = read_result(path)
        pairs = [(key, whole[key], other[key]) for key in SAME]
        pairs += [(key, first[key], row[key]) for row in other["rows"] for key in SAME_ROWS]
        for key, a, b in pairs:
            if a != b:
                raise ValueError(f"{paths[0]} and {path} differ in {key}: {a} and {b}")
        whole["rows"] += other["rows"]
        strips += [strip for strip in more if strip.title != "real"]
    return whole, strips


def markdown(result: dict[str, Any]) -> str:
    """The tables: scores of the samples, then costs of the runs."""
    real = result["real"]
    rows = [["real, held out", "", *cells(SCORES, real["held_out"] | {"frechet_held_out": None})]]
    rows.append(
        ["real, half of the training drawings", "", f"{real['halves']:.2f}", "", "", "", ""]
    )
    for row in result["rows"]:
        for nfe, scores in row["scores"].items():
            rows.append([f"`attention={row['arm']}`", nfe, *cells(SCORES, scores)])
    costs = [[f"`attention={row['arm']}`", *cells(COSTS, row)] for row in result["rows"]]
    first = table(["samples", "NFE", *(title for title, _ in SCORES.values())], rows)
    return f"{first}\n\n{table(['run', *(title for title, _ in COSTS.values())], costs)}"


def block(result: dict[str, Any], path: Path) -> str:
    """The block of docs/training/experiments.md: pictures, tables, and where they come from."""
    about, counts = result["environment"], result["real"]["counts"]
    notes = [f"{about['gpu'] or about['cpu']}, torch {about['torch']}, triton {about['triton']}"]
    notes += [f"commit {about['commit']}", f"{result['minutes']:g} minutes an arm"]
    notes += [f"{result['samples']} samples against {counts['train']} training drawings"]
    notes += [f"{counts['held_out']} held out", f"[{path.name}](../results/{path.name})"]
    parts = [
        f"![Samples](../results/{path.stem}.png)",
        "*A class a column, both attentions from the same noise; real drawings are held out.*",
        markdown(result),
        f"*{'; '.join(notes)}.*",
        f"![Curves](../results/{path.stem}_curves.png)",
        "*Distance of one-step samples, and the unweighted error (running median), over the time.*",
    ]
    return "".join(f"\n{part}\n" for part in parts) + "\n"


def report(paths: Sequence[Path], output: Path, document: Path | None) -> None:
    result, strips = merged(paths)
    write_result(result, strips, output)
    print(save(curves(result), output.with_name(f"{output.stem}_curves.png")))
    print(markdown(result))
    if document:
        write_block(document, block(result, output), "openclipart")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Drawings by MeanFlow with either attention.")
    parser.add_argument("overrides", nargs="*", help="of the arms' runs, as scripts/train.py's")
    parser.add_argument("--arm", action="append", default=[], help="attention to train with")
    parser.add_argument("--report", nargs="+", type=Path, default=[], help="results to merge")
    parser.add_argument("--output", type=Path, required=True, help="folder; file of a report")
    parser.add_argument("--runs", type=Path, default=None, help="folder of runs (OUTPUT/runs)")
    parser.add_argument("--pack", type=Path, default=None, help="of scripts/pack_pictures.py")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--snapshots", type=int, default=10, help="points of the curve over time")
    parser.add_argument("--n", type=int, default=2560, help="samples that are judged")
    parser.add_argument("--rows", type=int, default=2, help="rows of the picture for each NFE")
    parser.add_argument("--classifier", type=Path, default=None, help="its file, kept or made")
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--document", type=Path, default=None, help="page to write the block to")
    options = parser.parse_intermixed_args()
    if bool(options.arm) == bool(options.report):
        parser.error("give either --arm or --report")
    if options.report:
        with one_line_errors():
            report(options.report, options.output, options.document)
        return
    if options.pack is None:
        parser.error("--arm needs --pack, the file that scripts/pack_pictures.py wrote")
    options.runs = options.runs or options.output / "runs"

    def work() -> None:
        with one_line_errors():
            for arm in options.arm:
                path = run_arm(arm, options)
                print(markdown(json.loads(path.read_text())))
                print(path)

    run(work)


if __name__ == "__main__":
    main()
