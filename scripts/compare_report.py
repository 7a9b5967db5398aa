"""What comparisons found, as files small enough to keep, and the section drawn from them.

    python scripts/compare_report.py OUTPUT --name loss_bfloat16_h100 --title "MeanFlow, bfloat16"
    python scripts/compare_report.py            # pictures and section anew, from the files alone

The first keeps what scripts/compare.py left in OUTPUT as docs/results/compare_NAME.json; both draw
docs/results/compare_*.png and write the blocks of docs/comparison.md and README.md between two
lines `<!-- begin comparison -->` and `<!-- end comparison -->`.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from scripts.fashion_mnist import table, write_block
from training.cli import one_line_errors
from training.comparison import lockstep, plots
from training.comparison.arms import Run
from training.comparison.crossover import crossings, verdict
from training.comparison.curves import ERROR, curves
from training.comparison.files import finite, read_jsonl
from training.comparison.statistics import in_words, paired_p
from training.document import cell

ROOT = Path(__file__).parents[1]
PATHS = ("hydra.run.dir=", "data.path=", "runs=")  # arguments that say something of a machine only
RATIO_TITLES = ("tokens, head dim 64, eager", "images/s", "peak memory")
LOSS_TITLES = (
    "run",
    "seeds",
    "final error, jvp − sdpa",
    "90 % interval",
    "margin: 1 std of a seed",
    "equivalent (TOST p)",
    "paired t test p",
    "error ratio vs float64",
)
SPEED = ("tokens", "head dim", "", "images", "arm", "images/s", "ms", "GiB", "MFU", "speed", "95 %")


def kept(output: Path, title: str, note: str | None) -> dict[str, Any]:
    """The result file of a comparison: its results.json, curves and errors, or cells."""
    if not (output / "results.json").is_file():
        raise FileNotFoundError(
            f"OUTPUT: {output} has no results.json; give the hydra.run.dir of a finished comparison"
        )
    result = json.loads((output / "results.json").read_text())
    measured_in_parts = not (output / "curves.csv").is_file()  # the arguments are the last part's
    dropped = (*PATHS, "comparison.") if measured_in_parts else PATHS
    result["arguments"] = [a for a in result["arguments"] if not a.startswith(dropped)]
    result = {"title": title, "note": note} | {k: v for k, v in result.items() if k != "title"}
    if measured_in_parts:
        left_out = ("times_ms", "settings")
        rows = read_jsonl(output / "speed.jsonl")
        result["rows"] = [{k: v for k, v in r.items() if k not in left_out} for r in rows]
    else:
        result["curves"] = _curves(output / "curves.csv")
        result["lockstep_rows"] = _condensed(read_jsonl(output / "lockstep.jsonl"))
    return result


def _curves(path: Path) -> list[dict[str, Any]]:
    """The unweighted error of every run, {arm, seed, step: [...], error: [...]}."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["arm"], int(row["seed"])
            start = {"arm": key[0], "seed": key[1], "step": [], "error": []}
            run = found.setdefault(key, start)
            run["step"].append(int(row["step"]))
            run["error"].append(float(f"{float(row[ERROR]):.7g}"))
    return list(found.values())


def _condensed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Against float64: what belongs to the network by step, what lies in it by layer, the median
    over the steps.
    """
    groups: dict[tuple[str, str, str, int | None], list[float]] = {}
    for row in rows:
        if row["against"] == lockstep.TRUTH:
            step = None if row["layer"] else row["step"]
            key = row["quantity"], row["arm"], row["layer"], step
            groups.setdefault(key, []).append(row["error"])
    names = ("quantity", "arm", "layer", "step")
    return [
        dict(zip(names, key, strict=True))
        | {"against": lockstep.TRUTH, "error": float(f"{np.median(errors):.4g}")}
        for key, errors in groups.items()
    ]


def text_of(result: dict[str, Any]) -> str:
    """JSON with a line for each row of a list."""
    lines = []
    for key, value in finite(result).items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
            text = f"[\n  {rows}\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def pictures(result: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """End of the file's name -> (what it shows, the figure)."""
    candidate, baseline = result["candidate"], result["baseline"]
    if "rows" in result:
        rows = [r for r in result["rows"] if r["batches"] == "equal"]
        if len({r["tokens"] for r in rows if r.get("ms")}) < 2:  # the table says it
            return {}
        shown = {
            "": (
                "Images per second; a cross: out of memory",
                plots.over_tokens(rows, "images_per_s", "images/s"),
            )
        }
        if any(r.get("peak_mib") for r in rows):
            figure = plots.over_tokens(rows, "peak_mib", "peak GiB", 1024)
            shown["_memory"] = ("Peak memory; a cross: out of memory", figure)
        return shown
    runs = [
        Run(
            row["arm"],
            Path(),
            OmegaConf.create({"seed": row["seed"]}),
            np.array(row["step"]),
            {ERROR: np.array(row["error"])},
            {},
        )
        for row in result["curves"]
    ]
    drawn = plots.error_curves(runs, curves(runs, candidate, baseline), candidate, baseline)
    shown = {"": (f"Unweighted error; {candidate} minus {baseline}", drawn)}
    if result["lockstep_rows"]:
        figure = plots.lockstep_errors(result["lockstep_rows"], lockstep.TRUTH)
        shown["_lockstep"] = ("Relative errors against float64", figure)
    return shown


def draw(path: Path, result: dict[str, Any]) -> list[tuple[str, Path]]:
    """The pictures beside the result file: (what it shows, its path)."""
    found = []
    for end, (caption, figure) in pictures(result).items():
        found.append((caption, plots.save(figure, path.with_name(f"{path.stem}{end}.png"))))
    return found


def loss_tables(result: dict[str, Any]) -> list[str]:
    """Verdicts, errors of the lock-step, and the final errors of the runs."""
    candidate, baseline = result["candidate"], result["baseline"]
    agree = all(row["same_weights"] and row["same_batches"] for row in result["fingerprints"])
    agreed = "agree" if agree else "DO NOT agree"
    parts = [
        f"- **Free run.** {in_words(result['free_run'])}\n"
        f"- **Lock-step.** {result['lockstep']['words']}\n"
        f"- **Same input.** Initial weights and batches of the runs of each seed {agreed}."
    ]
    errors = {
        (row["quantity"], row["arm"]): row["median"]
        for row in result["lockstep_errors"]
        if row["against"] == lockstep.TRUTH
    }
    arms = list(dict.fromkeys(arm for _, arm in errors))
    rows = []
    for quantity in dict.fromkeys(quantity for quantity, _ in errors):
        ratio = result["lockstep"]["ratios"].get(quantity)
        values = [errors.get((quantity, arm)) for arm in arms]
        shown = ["" if value is None else f"{value:.2g}" for value in values]
        rows.append([quantity, *shown, "" if ratio is None else f"{ratio:.2f}"])
    if rows:
        titles = ["median error against float64", *arms, f"{candidate} / {baseline}"]
        parts.append(table(titles, rows))
    finals: dict[str, dict[int, str]] = {}
    for row in result["runs"]:
        finals.setdefault(row["arm"], {})[row["seed"]] = cell(row[ERROR])
    seeds = sorted({row["seed"] for row in result["runs"]})
    titles = ["error in the final window", *(f"seed {seed}" for seed in seeds)]
    parts.append(table(titles, [[a, *(f.get(s, "") for s in seeds)] for a, f in finals.items()]))
    return parts


def ratios(result: dict[str, Any]) -> list[list[str]]:
    """(tokens, speed, memory) of candidate over baseline at head dim 64, eager, single, equal
    batch."""
    setting = (64, "single", False, "equal", result["baseline"])
    names = ("head_dim", "mode", "compiled", "batches", "against")
    rows = []
    for row in sorted(result["ratios"], key=lambda row: row["tokens"]):
        if tuple(row[n] for n in names) != setting or not row["candidate_fits"]:
            continue
        lost = f"{result['baseline']} is out of memory"
        values = row["ratio"], _inverse(row["memory_ratio"])
        missing = "" if row["baseline_fits"] else lost
        shown = [missing if value is None else f"{value:.2f} x" for value in values]
        rows.append([str(row["tokens"]), *shown])
    return rows


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def speed_tables(result: dict[str, Any]) -> list[str]:
    """Verdicts, ratios and cells."""
    crossed = crossings(result["ratios"])
    judged = {arm: verdict(crossed, result["candidate"], arm) for arm in result["verdicts"]}
    parts = ["\n".join(f"- **Against {arm}.** {found['words']}" for arm, found in judged.items())]
    if found := ratios(result):
        parts.append(f"{result['candidate']} over {result['baseline']}:")
        parts.append(table(RATIO_TITLES, found))
    return [*parts, cells(result)]


def cells(result: dict[str, Any]) -> str:
    """The cells with the equal batch; ``speed`` is the candidate's over the arm's."""
    where = ("head_dim", "mode", "compiled", "tokens", "batches")
    ratios = {(*(row[n] for n in where), row["against"]): row for row in result["ratios"]}
    rows = []
    for row in sorted(result["rows"], key=lambda row: [row[n] for n in where]):
        place = [str(row["tokens"]), str(row["head_dim"])]
        how = f"{row['mode']}, {'compiled' if row['compiled'] else 'eager'}"
        if row["batches"] != "equal":
            continue
        if not row.get("ms"):
            rows.append([*place, how, "", row["arm"], row["status"], *[""] * 5])
            continue
        ratio = ratios.get((*(row[n] for n in where), row["arm"]), {})
        ends = [ratio.get("low"), ratio.get("high")]
        rows.append(
            [
                *place,
                how,
                str(row["batch"]),
                row["arm"],
                f"{row['images_per_s']:.0f}",
                f"{row['ms']:.1f}",
                f"{row['peak_mib'] / 1024:.2f}" if row.get("peak_mib") else "",
                f"{row['mfu']:.1%}" if row.get("mfu") else "",
                f"{ratio['ratio']:.2f}" if ratio.get("ratio") else "",
                "{:.2f} to {:.2f}".format(*ends) if None not in ends else "",
            ]
        )
    return table(SPEED, rows)


def block(results: dict[Path, dict[str, Any]], drawn: dict[Path, list[tuple[str, Path]]]) -> str:
    """What docs/comparison.md shows of the files."""
    parts = []
    for path, result in results.items():
        about = result["environment"]
        notes = [f"{about['gpu'] or about['cpu']}, torch {about['torch']}", result["note"]]
        notes += [f"commit {about['commit']}", f"`{' '.join(result['arguments'])}`"]
        notes.append(f"[{path.name}](results/{path.name})")
        parts += [
            f"### {result['title']}",
            f"*{' · '.join(filter(None, notes)).replace('; ', ' · ')}.*",
        ]
        parts += speed_tables(result) if "rows" in result else loss_tables(result)
        parts += [f"![{caption}](results/{picture.name})" for caption, picture in drawn[path]]
    return "".join(f"\n{part}\n" for part in parts) + "\n" * bool(parts)


def summary(results: dict[Path, dict[str, Any]]) -> str:
    """What the README shows: the losses compared on a GPU, a row each."""
    rows = []
    for path, result in results.items():
        if not result["environment"]["gpu"] or "rows" in result:
            continue
        free, test = result["free_run"], result["free_run"]["tost"]
        percent = 100 / free["baseline_mean"]
        ratios = result["lockstep"]["ratios"].values()
        rows.append(
            [
                f"[{result['title']}](docs/results/{path.name})",
                str(test["n"]),
                f"{test['mean'] * percent:+.1f} %",
                f"{test['low'] * percent:+.1f} to {test['high'] * percent:+.1f} %",
                f"±{test['margin'] * percent:.1f} %",
                f"{'yes' if test['equivalent'] else 'not shown'} ({test['p']:.2g})",
                f"{paired_p(test):.2g}",
                f"{max(ratios):.2f}" if ratios else "",
            ]
        )
    return f"\n{table(LOSS_TITLES, rows)}\n\n" if rows else ""


def read(folder: Path) -> dict[Path, dict[str, Any]]:
    """The result files, those of GPUs first."""
    paths = sorted(folder.glob("compare_*.json"))
    results = [(path, json.loads(path.read_text())) for path in paths]
    return dict(sorted(results, key=lambda item: not item[1]["environment"]["gpu"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Keeps and shows what comparisons found.")
    parser.add_argument("output", nargs="?", type=Path, help="hydra.run.dir of a comparison")
    parser.add_argument("--name", help="of the result file, compare_NAME.json")
    parser.add_argument("--title", help="what was compared, in words")
    parser.add_argument("--note", default=None, help="what else a reader must know of the runs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    with one_line_errors():
        report(parser, arguments)


def report(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    folder = arguments.docs / "results"
    if not folder.is_dir():
        raise FileNotFoundError(f"--docs: there is no directory {folder}")
    if arguments.output:
        if not (arguments.name and arguments.title):
            parser.error("OUTPUT needs --name and --title")
        result = kept(arguments.output, arguments.title, arguments.note)
        (folder / f"compare_{arguments.name}.json").write_text(text_of(result))
    results = read(folder)
    drawn = {path: draw(path, result) for path, result in results.items()}
    write_block(arguments.docs / "comparison.md", block(results, drawn), "comparison")
    write_block(arguments.docs.parent / "README.md", summary(results), "comparison")
    for path in results:
        print(path)


if __name__ == "__main__":
    main()
