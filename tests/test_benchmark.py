"""The benchmark: FLOPs by hand, clocks, errors, tables and documents of a fixed result, the
commands.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jvp_flash_attention.workloads import MASKS, WORKLOADS, Workload
from scripts.benchmarks import (
    accuracy,
    documents,
    flops,
    headline,
    host,
    implementations,
    legacy_table,
    plots,
    report,
    tables,
    targets,
    timing,
)
from scripts.benchmarks import measure as measuring
from scripts.benchmarks.peak import Peak
from scripts.benchmarks.problem import draw

ROOT = Path(__file__).parents[1]
PEAK = Peak({"bfloat16": 800.0, "float32": 50.0}, 8192, 2500.0)
CPU = measuring.Settings("cpu", budget_ms=1.0)
SMALL = Workload(2, 3, 24, 8)


# FLOPs and bounds


@pytest.mark.parametrize(
    ("workload", "name", "expected"),
    [
        (Workload(4, 16, 4096, 128), "forward", 4 * 4 * 16 * 4096**2 * 128),
        (Workload(4, 16, 4096, 128), "jvp", 1.649267441664e12),
        (Workload(4, 16, 4096, 128, "causal"), "jvp", 0.824633720832e12),
        (Workload(4, 16, 4096, 128), "backward", 10 * 4 * 16 * 4096**2 * 128),
        (Workload(4, 16, 4096, 128), "full", 30 * 4 * 16 * 4096**2 * 128),
        (Workload(64, 16, 256, 72), "jvp", 12 * 64 * 16 * 256**2 * 72),  # D is not padded
        (Workload(1, 1, 100, 8, "bool"), "forward", 4 * 100**2 * 8),  # masks are not credited
    ],
)
def test_flops_are_those_of_the_useful_products(workload, name, expected):
    assert flops.flops(workload, name) == expected


def test_traffic_is_every_operand_and_result_and_the_mask_once():
    B, H, L, D = SMALL[:4]
    bf16 = torch.bfloat16
    assert flops.traffic(SMALL, "forward", bf16) == 4 * B * H * L * D * 2
    assert flops.traffic(SMALL, "full", torch.float32) == 16 * B * H * L * D * 4
    for mask, scores in (("bool", L * L), ("padding", B * L), ("additive", 2 * H * L * L)):
        extra = flops.traffic(SMALL._replace(mask=mask), "jvp", bf16) - flops.traffic(
            SMALL, "jvp", bf16
        )
        assert extra == scores, mask


def test_the_bound_is_the_larger_of_compute_and_memory():
    long = flops.bound(WORKLOADS["long_4k_128"], "jvp", torch.bfloat16, 800.0, 2500.0)
    assert long.by == "compute"
    assert long.ms == pytest.approx(2.0616, rel=1e-4)
    short = flops.bound(WORKLOADS["dit_l_256"], "jvp", torch.bfloat16, 800.0, 3000.0)
    assert short.by == "memory"
    assert short.ms == pytest.approx(0.0447, rel=1e-2)


# clocks


def test_the_median_is_that_of_the_calls():
    assert 2.0 <= timing.median_ms(lambda: time.sleep(2e-3), "cpu", 5, 1) < 100.0
    assert 1.0 <= timing.mean_ms(lambda: time.sleep(1e-3), "cpu", 1, 5) < 100.0
    assert 1000 <= timing.host_us(lambda: time.sleep(1e-3), "cpu", 5, 2) < 100000


def test_a_slow_call_is_timed_a_few_times_a_fast_one_for_the_budget():
    calls = []
    timing.median_ms(lambda: (calls.append(0), time.sleep(5e-3)), "cpu", budget_ms=1, warmup_ms=1)
    assert len(calls) == 1 + 3 + 5
    calls.clear()
    timing.median_ms(lambda: calls.append(0), "cpu", budget_ms=1, warmup_ms=1)
    assert 20 < len(calls) <= 2 * 1000 + 4


def test_the_cpu_has_neither_memory_nor_host_figures():
    assert timing.peak_mib(lambda: None, "cpu") is None
    assert host.measure("cpu") == []


# problems, implementations, errors


@pytest.mark.parametrize("mask", MASKS)
def test_masks_have_the_declared_shape_and_broadcast(mask):
    p = draw(SMALL._replace(mask=mask), torch.float32, "cpu")
    assert (None if p.mask is None else tuple(p.mask.shape)) == p.workload.mask_shape
    if p.mask is not None:
        p.mask.expand(2, 3, 24, 24)
        assert (p.mask.dtype == torch.bool) == (mask in ("bool", "padding", "bool-full"))


LEGACY = "jvp_flash_attention.jvp_attention:JVPAttn.fwd_dual"  # causal= and dual tensors
TORCH = "torch.nn.functional:scaled_dot_product_attention"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", flops.PASSES)
def test_every_implementation_computes_the_pass(name, mask):
    p = draw(SMALL._replace(mask=mask), torch.float32, "cpu")
    sample = accuracy.Sample(p, rows=7)
    for implementation in ("ours", "sdpa-math", LEGACY):
        if (implementation, name) == ("sdpa-math", "full") and mask.startswith("bool"):
            continue  # NaN where a row attends nothing
        found = implementations.find(implementation)
        with found.around():
            results = implementations.prepare(found, name, p)()
        errors = sample.errors(name, results)
        assert tuple(errors) == accuracy.RESULTS[name]
        assert max(errors.values()) < 2e-6, (implementation, errors)


def test_math_multiplies_in_float32_unless_its_16_bit_form_is_asked_for():
    p = draw(SMALL, torch.bfloat16, "cpu")
    sample, errors = accuracy.Sample(p), {}
    for name in ("sdpa-math", "sdpa-math-16bit"):
        found = implementations.find(name)
        with found.around():
            results = implementations.prepare(found, "jvp", p)()
        errors[name] = max(sample.errors("jvp", results).values())
    assert 1.3 * errors["sdpa-math"] < errors["sdpa-math-16bit"] < 1e-2
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_an_error_is_seen_in_the_result_that_has_it():
    p = draw(SMALL, torch.float32, "cpu")
    sample = accuracy.Sample(p)
    out, t_out = implementations.prepare(implementations.find("ours"), "jvp", p)()
    errors = sample.errors("jvp", (out, 1.01 * t_out))
    assert errors["t_out"] == pytest.approx(0.01, rel=1e-3)
    assert not accuracy.accurate(errors, "bfloat16")
    assert accuracy.accurate({"out": 2e-3, "t_out": 2.3e-3, "d_q": 2.4e-3}, "bfloat16")
    assert not accuracy.accurate({"out": float("nan")}, "bfloat16")
    few = {"d_q": 2.9e-3}
    assert accuracy.accurate(few, "bfloat16", queries=31)
    assert not accuracy.accurate(few, "bfloat16", queries=32)
    assert not accuracy.accurate({"out": 2.6e-3}, "bfloat16", queries=31)


def test_errors_of_a_result_file_are_judged_by_the_tolerances_of_today(tmp_path):
    rows = [row("long_4k_128", "jvp", "ours", 1.0, errors={"out": e}) for e in (2.4e-3, "nan")]
    report.write_json(tmp_path / "docs/results/targets_x.json", {"rows": rows})
    (found,) = documents.load("targets", tmp_path).values()
    assert [r["accurate"] for r in found["rows"]] == [True, False]


def test_a_result_file_under_former_names_is_read(tmp_path):
    content = {"suite": "readme", "roof": PEAK._asdict(), "rows": []}
    report.write_json(tmp_path / "docs/results/readme_x.json", content)
    (found,) = documents.load("legacy_table", tmp_path).values()
    assert found == {"suite": "legacy_table", "peak": PEAK._asdict(), "rows": []}


def test_what_has_no_forward_derivative_says_so_and_the_benchmark_goes_on():
    cases = [
        measuring.Case("small", SMALL, "float32", name, implementation)
        for name, implementation in (("jvp", "flash"), ("jvp", "ours"), ("forward", TORCH))
    ]
    rows = list(measuring.measure(cases, PEAK, CPU))
    assert [row["status"] for row in rows] == [measuring.UNSUPPORTED, "ok", "ok"]
    assert rows[0]["reason"] == "NotImplementedError: it has no forward-mode derivative"
    assert rows[1]["tflops"] == pytest.approx(12 * 6 * 24**2 * 8 / rows[1]["ms"] / 1e9, rel=1e-3)
    assert rows[1]["accurate"]
    assert rows[1]["mib"] is None
    assert rows[1]["graph_ms"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", flops.PASSES)
def test_on_a_gpu_a_short_call_has_a_graph_and_a_peak(name):
    workload = Workload(2, 4, 256, 64)
    peers = ["ours", "sdpa-math"] + ["flash", "cudnn"] * (name in ("forward", "backward"))
    cases = [measuring.Case("small", workload, "bfloat16", name, peer) for peer in peers]
    with torch.cuda.stream(torch.cuda.Stream()):
        rows = list(measuring.measure(cases, PEAK, CPU._replace(device="cuda")))
    for row in rows:
        assert row["status"] == "ok", row
        assert row["accurate"], row
        assert row["mib"] > 0
        assert row["ms"] >= measuring.GRAPH_BELOW_MS or row["graph_ms"] > 0


def test_out_of_memory_and_failures_are_rows():
    def exhausted():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    assert measuring.guarded(exhausted) == {"status": measuring.OUT_OF_MEMORY}
    found = measuring.guarded(lambda: {}["x"])
    assert found == {"status": measuring.FAILED, "reason": "KeyError: 'x'"}


# suites


def test_the_targets_name_workloads_and_peers_that_exist():
    cases = targets.cases()
    assert {case.implementation for case in cases} <= set(implementations.BUILT_IN)
    measured = {(case.name, case.pass_name, case.implementation) for case in targets.cases()}
    for goal in (goal for target in targets.TARGETS for goal in target.goals):
        assert goal.to is None or goal.to in measured


def test_the_legacy_table_has_28_configurations_and_follows_its_script():
    assert len(legacy_table.LENGTHS) * len(legacy_table.MASKS) == 28
    rows = list(legacy_table.measure("float32", "cpu", lengths=[8], calls=(0, 1)))
    assert [row["mask"] for row in rows[::2]] == list(legacy_table.MASKS)
    assert all(row["accurate"] for row in rows), rows
    assert len(legacy_table.speedups(rows)) == 4


# tables of a fixed result


def row(workload, name, implementation, ms, **more):
    w = WORKLOADS[workload]
    figures = {"status": "ok", "ms": ms, "mib": 130.0, "tflops": 560.4, "of_bound": 0.708}
    figures |= {
        "graph_ms": None,
        "bound_by": "compute",
        "errors": {"out": 2.2e-3},
        "accurate": True,
    }
    head = {"workload": workload, "shape": list(w[:4]), "mask": w.mask, "dtype": "bfloat16"}
    return head | {"pass": name, "implementation": implementation} | figures | more


LOST = {"status": measuring.OUT_OF_MEMORY}
ENVIRONMENT = {"gpu": "Some GPU", "cpu": "x", "torch": "2", "triton": "3", "commit": "abc"}
TARGETS_RESULT = {
    "suite": "targets",
    "environment": ENVIRONMENT,
    "peak": PEAK._asdict(),
    "host": [{"call": "attention_jvp", "us": 55.2, "goal": 60}],
    "rows": [
        row("long_4k_128", "jvp", "ours", 2.943),
        row("long_4k_128", "jvp", "sdpa-math", 79.77, mib=21506.0),
        row("long_4k_128", "backward", "ours", 2.7),
        row("long_4k_128", "backward", "cudnn", 2.61),
        row("long_4k_128", "full", "ours", 9.2, errors={"d_q": 3e-3}, accurate=False),
        {"workload": "long_4k_128", "shape": [4, 16, 4096, 128], "mask": "none"}
        | {"dtype": "bfloat16", "pass": "full", "implementation": "sdpa-math", **LOST},
        row("bool_4k_128", "jvp", "ours", 5.886),
    ],
}


def test_the_table_of_targets_judges_every_goal():
    table, goals_of_the_host, summary = tables.of(TARGETS_RESULT)
    title, jvp, backward, full, masked = table
    at = {name: i for i, name in enumerate(title)}
    assert "graph ms" not in at  # empty everywhere
    assert jvp[at["goal"]] == "≥ 700 TFLOP/s, ≥ 0.9 of bound"
    assert jvp[at["met"]] == "no 560.4, no 0.7080"
    assert (jvp[at["MATH ms"]], jvp[at["MATH MiB"]]) == ("79.8", "21506")
    assert backward[at["goal"]] == "≤ 1.03 × cudnn"
    assert backward[at["met"]] == "no 1.034"
    assert (full[at["met"]], full[at["MATH ms"]]) == ("yes 9.200", "out of memory")
    assert full[at["error"]] == "3.0e-3 ✗"
    assert masked[at["(B, H, L, D)"]] == "(4, 16, 4096, 128) bool"
    assert masked[at["met"]] == "no 2.000"
    assert summary == "goals met: 2 of 6"
    assert goals_of_the_host[1] == ["attention_jvp", "55.2", "≤ 60"]


def test_the_statistics_of_the_legacy_table():
    def of(length, mask, method, ms, mib, accurate):
        head = {"shape": [2, 12, length, 64], "mask": mask, "dtype": "float16", "pass": "jvp"}
        figures = {"status": "ok", "ms": ms, "mib": mib, "tflops": 1.0, "accurate": accurate}
        return head | {"implementation": method, "errors": {"out": 1e-4}} | figures

    rows = [
        of(2048, "none", "sdpa-math", 6.0, 2000.0, True),
        of(2048, "none", "ours", 0.5, 48.0, True),
        of(2048, "bool-full", "sdpa-math", 8.0, 2000.0, True),
        of(2048, "bool-full", "ours", 2.0, 72.0, False),
    ]
    assert legacy_table.speedups(rows) == [12.0, 4.0]
    speed, math, math_memory, ours, ours_memory = legacy_table.statistics_lines(rows)
    assert "average 8.00x" in speed
    assert "minimum 4.00x" in speed
    assert "maximum 12.00x" in speed
    assert math.endswith("sdpa-math 2/2")
    assert ours.endswith("ours 1/2")
    assert math_memory.endswith("41.67x")
    assert ours_memory.endswith("1.50x")  # six clones and two results are 48 MiB
    table = report.cells(legacy_table.COLUMNS, legacy_table.pairs(rows))
    assert table[0][:6] == ["tokens", "mask", "ms", "MATH ms", "speed-up", "MiB"]
    assert table[1][:6] == ["2048", "none", "0.500", "6.00", "12.0x", "48.0"]
    assert table[2][1:5] == ["bool", "2.00", "8.00", "4.0x"]
    assert [line[-2:] for line in table[1:]] == [["1.0e-4", "1.0e-4"], ["1.0e-4 ✗", "1.0e-4"]]
    assert report.text(table).splitlines()[2].startswith("2048    none  0.500")
    assert report.markdown(table).splitlines()[1] == "|" + "---|" * 9


@pytest.mark.parametrize(
    ("x", "shown"),
    [
        (None, ""),
        (0.0, "0.0"),
        (2.943, "2.94"),
        (0.0553, "0.0553"),
        (21506.0, "21506"),
        (2e-4, "2.00e-4"),
    ],
)
def test_numbers_have_three_digits(x, shown):
    assert report.number(x) == shown


def test_json_is_valid_where_an_error_is_not_finite(tmp_path):
    path = tmp_path / "x.json"
    report.write_json(path, {"rows": [{"errors": {"out": float("nan")}}]})
    errors = json.loads(path.read_text(), parse_constant=pytest.fail)["rows"][0]["errors"]
    assert report.worst({"errors": {"out": 1.0, **errors}, "accurate": False}) == "nan ✗"


# documents


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=str)
def test_documents_equal_what_the_report_writes(document):
    assert documents.regenerate(document) == (ROOT / document).read_text(), (
        "run python scripts/benchmark_report.py"
    )


def test_pictures_of_committed_results_are_committed():
    for suite in documents.SUITES:
        for path, result in documents.load(suite).items():
            for picture in plots.pictures(result, ROOT / path.with_suffix("")):
                assert picture.is_file(), "run python scripts/benchmark_report.py"
    assert all(picture.is_file() for picture in headline.pictures(ROOT))


def test_the_headline_has_the_ratios_of_the_files(tmp_path):
    assert headline.lines(tmp_path) == [], "no file, no line"
    pair = [
        row("long_4k_128", "jvp", "ours", 2.0, tflops=700.0, mib=100.0),
        row("long_4k_128", "jvp", "sdpa-math", 50.0, mib=2100.0),
        row("long_4k_128", "full", "ours", 4.0, mib=10.0),
        row("long_4k_128", "full", "sdpa-math", 24.0, mib=70.0),
        row("long_8k_64", "jvp", "ours", 1.0, mib=10.0),
        row("long_8k_64", "jvp", "sdpa-math", 9.0, mib=30.0),
        row("long_16k_128", "jvp", "ours", 8.0, mib=10.0),
        row("long_16k_128", "jvp", "sdpa-math", None, mib=None) | LOST,
    ]
    targets = TARGETS_RESULT | {"rows": pair}
    gpu = ENVIRONMENT["gpu"]
    step = {
        "images_per_s": 2000.0,
        "step_ms": 50.0,
        "mfu": 0.41,
        "batch": 64,
        "first_step_s": 9.0,
        "reserved_mib": 2048,
        "environment": {"gpu": gpu},
    }
    steps: dict[str, dict] = dict.fromkeys((headline.B2, headline.XL2, headline.LONG), step)
    for name, ms in ((headline.B2_SDPA, 80.0), (headline.XL2_SDPA, 75.0)):
        steps[name] = step | {"step_ms": ms}
    steps[headline.LONG_SDPA] = step | {"step_ms": 120.0}
    report.write_json(tmp_path / headline.TARGETS, targets)
    report.write_json(tmp_path / headline.STEP, steps)
    told = "\n".join(headline.lines(tmp_path))
    assert "25x faster and 21x less memory** than SDPA" in told
    assert "9x and 3x at" in told
    assert "The backward at the first: 6x and 7x" in told
    assert "1.60x faster at 256 tokens, 2.40x at 1024**" in told
    assert "2,000 images/s, 41% of the GPU's peak" in told
    assert "DiT-XL/2: 1.50x, 2000 images/s, 41%" in told
    assert f"On one {gpu}, in bfloat16" in told
    ((picture, draw),) = headline.pictures(tmp_path).items()
    draw(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| 64 | 2,000 | 50.0 | 41.0% | 9.00 | 2.00 |" in headline.steps(tmp_path)[1]

    other = step | {"step_ms": 40.0, "environment": {"gpu": "NVIDIA H200"}}
    more = dict.fromkeys((headline.B2, f"{headline.B2}, residual_in_fp32=false"), other)
    report.write_json(tmp_path / headline.STEPS[1], more)
    (table,) = headline.steps_by_gpu(tmp_path)
    title, _, first, *_ = table.splitlines()
    assert "H200: ms | H200: images/s | H200: MFU" in title
    assert "| 50.0 | 2,000 | 41.0% | 40.0 | 2,000 | 41.0% |" in first
    assert "residual_in_fp32=false | 64 |  |  |  | 40.0 |" in table, "of one GPU alone"
    report.write_json(tmp_path / headline.STEP, dict.fromkeys(steps, other))
    with pytest.raises(ValueError, match="the headline is of one kind of GPU"):
        headline.lines(tmp_path)


def test_a_document_is_written_from_files_and_a_section_without_files_is_left_out(tmp_path):
    (tmp_path / "docs").mkdir()
    blocks = "<!-- begin figures -->\nold\n<!-- end figures -->\n"
    (tmp_path / "README.md").write_text(f"before\n{blocks}after\n")
    page = "".join(f"<!-- begin {s} -->\n<!-- end {s} -->\n" for s in documents.SUITES)
    (tmp_path / "docs" / "benchmarks.md").write_text(page)

    empty = documents.regenerate(Path("README.md"), tmp_path)
    assert empty == f"before\n{blocks.replace('old', '').replace(chr(10) * 2, chr(10))}after\n"
    assert documents.regenerate(Path("docs/benchmarks.md"), tmp_path) == page

    report.write_json(tmp_path / "docs/results/targets_some.json", TARGETS_RESULT)
    assert documents.regenerate(Path("README.md"), tmp_path) == empty  # of another GPU
    report.write_json(tmp_path / headline.TARGETS, TARGETS_RESULT)
    readme = documents.regenerate(Path("README.md"), tmp_path)
    cells = "| forward + JVP | 2.94 | 560 | 79.8 | 27x | 130 | 21506 | 165x |"
    assert f"| (4, 16, 4096, 128) {cells}" in readme
    assert "| out of memory |" in readme
    assert "Some GPU" in readme
    assert readme.endswith("after\n")
    found = documents.regenerate(Path("docs/benchmarks.md"), tmp_path)
    assert found.count("## ") == 1
    assert "[targets_some.json](results/targets_some.json)" in found
    assert "| attention_jvp | 55.2 |\n" in found
    assert "goal" not in found


def test_a_picture_marks_lengths_that_ran_out_of_memory(tmp_path):
    rows = []
    for i, length in enumerate((256, 512, 1024)):
        at = {"shape": [1, 16, length, 128]}
        rows.append(row("long_16k_128", "jvp", "ours", 0.1 * 4**i, **at))
        slow = {"ms": None, "mib": None, **LOST} if i == 2 else {}
        rows.append(row("long_16k_128", "jvp", "sdpa-math", 1.0 * 4**i, **at) | slow)
    (path,) = plots.draw({"environment": ENVIRONMENT, "rows": rows}, tmp_path / "lengths_x")
    assert path == tmp_path / "lengths_x.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plots.pictures({"environment": ENVIRONMENT, "rows": rows[:4]}, path) == {}


def test_the_report_is_a_command():
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_report.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
