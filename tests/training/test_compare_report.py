"""What comparisons found is kept in small files, and the section is drawn from these alone."""

import csv
import json
import sys
from pathlib import Path

import pytest

from scripts import compare_report
from training.comparison import lockstep, plots

ROOT = Path(__file__).parents[2]
PAGE = "a\n<!-- begin comparison -->\nold\n<!-- end comparison -->\nb\n"
ENVIRONMENT = {"gpu": "A GPU", "cpu": "x86_64", "torch": "2.11", "commit": "abc"}
ARGUMENTS = [
    "experiment=x",
    "comparison.speed.tokens=[]",
    "data.path=/somewhere",
    "hydra.run.dir=/elsewhere",
]


TOST = {"n": 3, "mean": 2.0, "std": 3**0.5, "margin": 10.0, "p": 0.01, "low": -1.0, "high": 5.0}
FREE_RUN = {
    "words": "Equivalent: nothing.",
    "equivalent": True,
    "baseline_mean": 100.0,
    "tost": TOST | {"equivalent": True},
}


def write_loss(output, steps=20):
    """As scripts/compare.py leaves it: jvp, sdpa and sdpa again, two seeds, two blocks."""
    arms = [("sdpa", 0), ("jvp", 0), ("sdpa", 1), ("jvp", 1), ("sdpa again", 0)]
    quantities = {"loss": [""], "du/dt": [""], "attention": ["00", "01"]}
    places = [(q, layer, step) for q in quantities for layer in quantities[q] for step in (9, 19)]
    rows = [
        {"quantity": q, "layer": layer, "step": step, "arm": arm, "against": against}
        | {"error": (1 + (arm == "jvp")) * 1e-3 * (step + 1)}
        for q, layer, step in places
        for arm in ("sdpa", "jvp")
        for against in (lockstep.TRUTH, "sdpa")
        if (arm, against) != ("sdpa", "sdpa")
    ]
    fingerprint = {"same_weights": True, "same_batches": True}
    results = {
        "title": "Loss matching: jvp against sdpa",
        "environment": ENVIRONMENT,
        "arguments": ARGUMENTS,
        "candidate": "jvp",
        "baseline": "sdpa",
        "free_run": FREE_RUN,
        "lockstep": lockstep.verdict(rows, "jvp", "sdpa", 1.5),
        "lockstep_errors": lockstep.summary(rows),
        "runs": [{"arm": arm, "seed": seed, "train/error": 2.5} for arm, seed in arms],
        "fingerprints": [fingerprint] * len(arms),
    }
    output.mkdir()
    (output / "results.json").write_text(json.dumps(results))
    (output / "lockstep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (output / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "step", "train/error"])
        for arm, seed in arms:
            writer.writerows([arm, seed, i, 1 / (i + seed + 1)] for i in range(steps))


def write_speed(output):
    """256 and 4096 tokens; at the longer one sdpa is out of memory."""
    rows, ratios = [], []
    for tokens in (256, 4096):
        cell = {"tokens": tokens, "head_dim": 64, "mode": "single", "compiled": False}
        cell |= {"batches": "equal", "settings": "x"}
        for arm, ms, mib in (("jvp", 10.0, 1000.0), ("sdpa", 20.0, 3000.0)):
            row = cell | {"arm": arm, "status": "out of memory"}
            if (tokens, arm) != (4096, "sdpa"):
                row |= {"status": "measured", "batch": 4, "ms": ms, "images_per_s": 4e3 / ms}
                row |= {"peak_mib": mib, "mfu": 0.25, "times_ms": [ms] * 9}
            rows.append(row)
        fits = tokens == 256
        ratio = {"ratio": 2.0, "low": 1.9, "high": 2.1, "memory_ratio": 3.0}
        ratios.append(
            {k: v for k, v in cell.items() if k != "settings"}
            | (ratio if fits else dict.fromkeys(ratio))
            | {"against": "sdpa", "baseline_fits": fits, "candidate_fits": True}
        )
    results = {
        "title": "Speed matching",
        "environment": ENVIRONMENT,
        "arguments": ARGUMENTS,
        "candidate": "jvp",
        "baseline": "sdpa",
        "verdicts": {"sdpa": {"words": "jvp is faster.", "passed": True}},
        "ratios": ratios,
    }
    output.mkdir()
    (output / "results.json").write_text(json.dumps(results))
    (output / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """A folder of documents, and what the script makes of arguments there."""
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    (docs / "comparison.md").write_text(PAGE)
    (tmp_path / "README.md").write_text(PAGE)

    def run(*arguments):
        command = ["", *map(str, arguments), "--docs", str(docs)]
        monkeypatch.setattr(sys, "argv", command)
        compare_report.main()
        return (docs / "comparison.md").read_text()

    return docs, run


def test_a_comparison_of_losses_is_kept_and_drawn(docs, tmp_path):
    docs, run = docs
    write_loss(tmp_path / "out")
    page = run(tmp_path / "out", "--name", "loss_x", "--title", "T", "--note", "a note")
    assert "### T" in page
    assert "a note" in page
    assert "| du/dt | 0.01 | 0.02 | 2.00 |" in page
    assert "| sdpa again | 2.5 |  |" in page
    assert "`experiment=x comparison.speed.tokens=[]`" in page
    path = docs / "results" / "compare_loss_x.json"
    assert "somewhere" not in path.read_text()
    assert "elsewhere" not in path.read_text()
    result = json.loads(path.read_text())
    assert result["curves"][0]["error"][3] == 0.25
    assert {row["step"] for row in result["lockstep_rows"] if row["layer"]} == {None}
    pictures = [path.with_suffix(".png"), path.with_name("compare_loss_x_lockstep.png")]
    for picture in pictures:
        assert f"](results/{picture.name})" in page
        picture.unlink()
    assert run() == page, "from the file alone"
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert page.startswith("a\n<!-- begin comparison -->\n\n### T")
    assert page.endswith("\n<!-- end comparison -->\nb\n")
    readme = (docs.parent / "README.md").read_text()
    told = "| 3 | +2.0 % | -1.0 to +5.0 % | ±10.0 % | yes (0.01) | 0.18 | 2.00 |"  # t = 2
    assert f"| [T](docs/results/compare_loss_x.json) {told}" in readme


def test_a_comparison_of_speeds_is_kept_and_drawn_as_ratios(docs, tmp_path):
    docs, run = docs
    write_speed(tmp_path / "out")
    page = run(tmp_path / "out", "--name", "speed_x", "--title", "T")
    assert "| tokens, head dim 64, eager | images/s | peak memory |" in page
    assert "| 4096 | sdpa is out of memory | sdpa is out of memory |" in page
    assert "`experiment=x`" in page, "the arguments of the last part say nothing of the others"
    assert "| 4096 | 64 | single, eager |  | sdpa | out of memory |" in page
    assert "2.00 | 1.90 to 2.10 |" in page
    assert "times_ms" not in (docs / "results" / "compare_speed_x.json").read_text()
    assert (docs / "results" / "compare_speed_x_memory.png").is_file()


def test_crosses_lie_above_the_frame_and_are_named(tmp_path):
    cell = {"head_dim": 64, "compiled": False, "batches": "equal"}
    rows = [
        cell | {"tokens": tokens, "mode": mode, "arm": arm, "status": "out of memory"}
        for tokens in (256, 4096)
        for mode in ("single", "double")
        for arm in ("jvp", "sdpa")
    ]
    for row in rows:
        if row["mode"] == "single" and (row["tokens"], row["arm"]) != (4096, "sdpa"):
            row |= {"status": "measured", "peak_mib": 3072.0}
    figure = plots.over_tokens(rows, "peak_mib", "peak GiB", 1024)
    assert plots.save(figure, tmp_path / "x.png").is_file(), "although one mode never fitted"
    single = figure.axes[0]
    lines = {line.get_label(): line for line in single.get_lines()}
    assert set(lines["jvp"].get_ydata()) == {3.0}
    cross = lines["sdpa: out of memory"]
    assert list(cross.get_xdata()) == [4096]
    height = cross.get_transform().transform([[4096, 1]])[0, 1]
    assert height > single.get_window_extent().y1
    (legend,) = figure.legends
    assert "sdpa: out of memory" in [text.get_text() for text in legend.get_texts()]


def test_ratios_are_of_the_candidate_over_the_baseline():
    cell = {"tokens": 1024, "head_dim": 64, "mode": "single", "compiled": False}
    row = cell | {"batches": "equal", "against": "sdpa", "ratio": 1.5, "memory_ratio": 1.25}
    row |= {"baseline_fits": True, "candidate_fits": True}
    unmeasured = row | {"head_dim": 72}
    found = compare_report.ratios({"baseline": "sdpa", "ratios": [unmeasured, row]})
    assert found == [["1024", "1.50 x", "0.80 x"]]


def test_the_section_of_the_documents_is_that_of_the_result_files():
    results = compare_report.read(ROOT / "docs" / "results")
    drawn = {
        path: [
            (caption, path.with_name(f"{path.stem}{end}.png"))
            for end, (caption, _) in compare_report.pictures(result).items()
        ]
        for path, result in results.items()
    }
    block = compare_report.block(results, drawn)
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert f"<!-- begin comparison -->\n{block}<!-- end comparison -->" in page
    summary = f"<!-- begin comparison -->\n{compare_report.summary(results)}<!-- end comparison -->"
    assert summary in (ROOT / "README.md").read_text()
    assert all(picture.is_file() for shown in drawn.values() for _, picture in shown)
