"""The comparison judges rightly: statistics against known values, a tiny comparison from end to
end, in which a wrong attention is found out.
"""

import csv
import json
import re
import sys

import hydra
import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from scripts.compare import compare
from scripts.dashboard import build
from tests import processes
from tests.commands import ROOT, call, in_process, succeed
from training.attentions import sdpa, sdpa_fused
from training.comparison import crossover as crossovers
from training.comparison import dashboard, lockstep, parallel_runs, speed
from training.comparison.arms import (
    Run,
    check_arms,
    check_comparable,
    check_fingerprints,
    name_arms,
    placed,
)
from training.comparison.crossover import crossings, crossover, ratios
from training.comparison.parallel_runs import train_in_parallel
from training.document import Heading, Judgement, Pictures, Table, Text, markdown, page
from training.images import write_png
from training.objectives.meanflow import MeanFlow

TINY = [
    "trainer=cpu",
    "logger=csv",
    "callbacks.page=null",
    "data.batch_size=8",
    "model.depth=2",
    "model.width=32",
    "trainer.max_steps=6",
    "optimizer.warmup_steps=0",
    "comparison.lockstep.steps=4",
    "comparison.lockstep.every=2",
    "comparison.fingerprint_every_n_steps=2",
]
CONFIGS = ROOT / "configs"
WRONG = '+comparison.arms.wrong=["attention=sdpa","+attention.scale=1.0"]'


# A test of another package's deprecations this is not.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """jvp, sdpa, sdpa again, and an attention that scales wrongly, six steps each."""
    where = tmp_path_factory.mktemp("compared")
    arms = ["comparison.seeds=1", "comparison.arms.double=null", "comparison.arms.float32=null"]
    arguments = ["experiment=loss_matching_smoke", *TINY, *arms, WRONG]
    done = succeed("compare.py", *arguments, f"hydra.run.dir={where / 'out'}", cwd=where)
    return where / "out", done.stdout


def write_or_fail(config, directory):
    """A training that a process of its own can import."""
    if config.fails:
        raise ValueError("asked to")
    (directory / "done").touch()


def results(output):
    return json.loads((output / "results.json").read_text())


def test_the_crossover_is_interpolated_between_lengths():
    tokens, words = crossover([(64, 0.5), (256, 2.0), (1024, 4.0)])
    assert tokens == pytest.approx(128)
    assert "about 128 tokens" in words
    assert crossover([(64, 1.1), (256, 2.0)])[0] == 64
    assert crossover([(64, 0.5), (256, 0.9)])[0] is None
    assert crossover([]) == (None, "not measured")
    assert crossover([(64, 1.1), (256, 2.0)])[1] == (
        "faster at every length measured, 64 to 256 tokens"
    )
    assert crossover([(256, 2.0)])[1] == "faster at the only length measured, 256 tokens"
    assert crossover([(256, 0.5)])[1] == "not faster at the only length measured, 256 tokens"


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({64: {256: 2.0}}, "in 1 of 1 settings, at the only length measured, 256 tokens; at best"),
        (
            {64: {64: 1.5, 1024: 2.0}, 72: {256: 1.2, 1024: 1.9}, 128: {256: 1.1, 1024: 1.5}},
            "in 3 of 3 settings: at every length measured, 64 to 1024 tokens (head dim 64), and at"
            " every length measured, 256 to 1024 tokens (head dim 72 and head dim 128); at best",
        ),
        (
            {64: {64: 0.5, 256: 2.0}, 128: {64: 0.5, 256: 0.6}},
            "in 1 of 2 settings: from about 128 tokens on (between 64 and 256) (head dim 64); in"
            " the others it is not, at the longest length measured; at best",
        ),
        ({64: {64: 0.5, 256: 0.9}}, "at the longest length measured, in any of 1 settings; at"),
    ],
)
def test_the_verdict_on_speeds_says_what_was_measured(measured, words):
    setting = {"against": "sdpa", "mode": "single", "compiled": False, "batches": "equal"}
    setting |= {"candidate_fits": True, "baseline_fits": True, "low": None, "high": None}
    rows = [
        setting | {"head_dim": dim, "tokens": tokens, "ratio": ratio}
        for dim, lengths in measured.items()
        for tokens, ratio in lengths.items()
    ]
    assert words in crossovers.verdict(crossings(rows), "jvp", "sdpa")["words"]


def test_a_ratio_of_speeds_has_an_interval_from_paired_steps():
    cell = {"tokens": 64, "head_dim": 64, "mode": "single", "compiled": False, "batches": "equal"}
    shared = np.random.default_rng(4).uniform(1, 3, size=30)  # a disturbed machine
    rows = [
        cell | {"arm": "jvp", "status": "measured", "batch": 8, "images_per_s": 200.0}
        | {"times_ms": shared.tolist()},
        cell | {"arm": "sdpa", "status": "measured", "batch": 8, "images_per_s": 100.0}
        | {"times_ms": (2 * shared).tolist()},
    ]  # fmt: skip
    (found,) = ratios(rows, "jvp", "sdpa")
    assert found["ratio"] == pytest.approx(2)
    assert (found["low"], found["high"]) == pytest.approx((2, 2))
    rows[1] = cell | {"arm": "sdpa", "status": "out of memory"}
    (found,) = ratios(rows, "jvp", "sdpa")
    assert (found["ratio"], found["baseline_fits"]) == (None, False)


def run(tmp_path, arm="jvp", seed=0, weights="a", **config):
    whole = {"seed": seed, "attention": {"_target_": arm}, "trainer": {"precision": "32-true"}}
    prints = {"weights": weights, "batches": {0: "x", 10: "y"}}
    steps = np.arange(3)
    return Run(arm, tmp_path, OmegaConf.create(whole | config), steps, {}, {}, prints)


def test_runs_that_differ_in_more_than_they_may_are_refused(tmp_path):
    check_comparable([run(tmp_path), run(tmp_path, "sdpa", 1)])
    with pytest.raises(ValueError, match=r"data\.batch_size is None in one and 8 in the other"):
        check_comparable([run(tmp_path), run(tmp_path, "sdpa", data={"batch_size": 8})])


def test_arms_are_checked_before_any_is_trained():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        compose = lambda more: placed(hydra.compose("compare", [*TINY, *more]), "unused")  # noqa: E731
        good = [("jvp", ["attention=jvp"]), ("sdpa", ["attention=sdpa"])]
        check_arms(compose, good)
        for wrong, says in (
            (["objective.jvp.mode=triple"], r"objective\.jvp\.mode must be one of"),
            (["model.heads=5"], r"model\.heads must divide"),
            (["trainer.precision=33"], r"trainer\.precision must be one of"),
        ):
            with pytest.raises(ValueError, match=rf"arm third \(.*\): {says}"):
                check_arms(compose, [*good, ("third", wrong)])


def test_other_weights_are_found_out(tmp_path):
    rows = check_fingerprints([run(tmp_path), run(tmp_path, "sdpa", weights="b")])
    assert [row["same_weights"] for row in rows] == [True, False]
    assert all(row["same_batches"] for row in rows)


def test_found_runs_are_named_after_what_differs(tmp_path):
    half = {"trainer": {"precision": "bf16-mixed"}}
    named = name_arms([run(tmp_path), run(tmp_path), run(tmp_path, **half)])
    assert [r.arm for r in named] == ["jvp", "jvp again", "jvp precision=bf16-mixed"]


def test_the_toughest_baseline_has_the_numbers_of_sdpa():
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    assert torch.allclose(sdpa_fused(*inputs), sdpa(*inputs))
    for mine, theirs in zip(
        torch.func.jvp(sdpa_fused, inputs, tangents),
        torch.func.jvp(sdpa, inputs, tangents),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_the_toughest_baseline_compiles(tiny, batch, draws):
    net, objective = tiny(sdpa_fused, depth=1), MeanFlow(data_proportion=0.5, label_dropout=0.0)
    sample = objective.sample(*batch, net.null_label, draws)
    torch.compiler.reset()
    compiled = torch.compile(objective.loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(net, sample).loss, objective.loss(net, sample).loss)
    torch.compiler.reset()


def test_the_page_needs_nothing_else_and_escapes(tmp_path):
    picture = write_png(tmp_path / "a.png", torch.zeros(2, 2, 1, dtype=torch.uint8))
    blocks = [
        Heading("A <b>"),
        Text("x < y"),
        Judgement("Verdict", "fine", True),
        Table(("a", "b"), [[1.23456, None], [True, "s"]]),
        Pictures([(picture, "caption")]),
    ]
    text = page("Title", blocks)
    assert "A &lt;b&gt;" in text
    assert 'class="judgement passed"' in text
    assert not re.search(r'<script|src="(?!data:)|https?://', text)
    assert "![caption](a.png)" in markdown("Title", blocks, tmp_path)


def test_a_comparison_leaves_a_page_and_its_data(compared):
    output, told = compared
    assert str(output / "report.html") in told
    text = (output / "report.html").read_text()
    assert text.count("data:image/png;base64,") >= 4
    assert 'name="viewport"' in text
    assert "sdpa again" in (output / "report.md").read_text()
    with (output / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"jvp", "sdpa", "sdpa again", "wrong"}
    assert len(rows) == 4 * 6


def test_arms_start_from_the_same_weights_and_see_the_same_batches(compared):
    prints = results(compared[0])["fingerprints"]
    assert len(prints) == 4
    for row in prints:
        assert (row["source"], row["batches"]) == ("recorded", 3)
        assert row["same_weights"]
        assert row["same_batches"]


def test_the_lock_step_finds_a_wrong_attention_and_passes_the_right_one(compared):
    found = results(compared[0])
    assert found["lockstep"]["passed"] is True
    errors = {
        (row["quantity"], row["arm"]): row["median"]
        for row in found["lockstep_errors"]
        if row["against"] == lockstep.TRUTH
    }
    for quantity in ("u", "du/dt", "gradient", "attention", "its tangent"):
        assert errors[quantity, "jvp"] < 1e-5, quantity
    assert errors["attention", "wrong"] > 1e-4
    assert errors["its tangent", "wrong"] > 1e-2
    again = [
        r for r in found["lockstep_errors"] if (r["arm"], r["against"]) == ("sdpa again", "sdpa")
    ]
    assert again
    assert all(row["largest"] == 0 for row in again)


def test_without_three_seeds_there_is_no_verdict(compared):
    free = results(compared[0])["free_run"]
    assert free["equivalent"] is None
    assert free["repeat_difference"] == 0


def test_runs_that_exist_already_are_compared(compared, tmp_path):
    output, _ = compared
    runs = [output / "runs" / f"{arm}_seed0" for arm in ("sdpa", "jvp")]
    given = f"runs=[{','.join(map(str, runs))}]"
    (runs[0] / "fingerprint.jsonl").rename(tmp_path / "away")  # a run that recorded none
    arguments = [given, "logger=csv", "comparison.lockstep.steps=0"]
    succeed("compare.py", *arguments, f"hydra.run.dir={tmp_path / 'out'}", cwd=tmp_path)
    (tmp_path / "away").rename(runs[0] / "fingerprint.jsonl")
    found = results(tmp_path / "out")
    assert {row["source"] for row in found["fingerprints"]} == {"recomputed"}
    assert all(row["same_weights"] and row["same_batches"] for row in found["fingerprints"])
    recorded = {row["weights"] for row in results(output)["fingerprints"]}
    assert {row["weights"] for row in found["fingerprints"]} == recorded


def errors_of(output):
    with (output / "curves.csv").open() as file:
        rows = csv.DictReader(file)
        return {(r["arm"], r["seed"], r["step"]): r["train/error"] for r in rows}


@pytest.fixture
def imported(monkeypatch):
    """Processes of runs begin with everything imported."""
    monkeypatch.setattr(parallel_runs.multiprocessing, "get_context", lambda kind: processes.FORKS)
    monkeypatch.setattr(sys, "argv", ["compare.py"])  # pytest's own are no keys


@pytest.mark.slow
@pytest.mark.usefixtures("imported")
def test_runs_beside_each_other_are_those_after_each_other(compared, tmp_path):
    arms = [f"comparison.arms.{arm}=null" for arm in ("double", "float32")]
    arms += ["comparison.parallel=3", "comparison.seeds=1", "comparison.lockstep.steps=0"]
    arguments = ["experiment=loss_matching_smoke", *TINY, *arms]
    printed = in_process("compare.py", *arguments, f"hydra.run.dir={tmp_path / 'out'}")
    assert "jvp_seed0: done" in printed
    assert "samples per second" not in printed
    assert "samples per second" in (tmp_path / "out/runs/jvp_seed0/log.txt").read_text()
    expected = {k: v for k, v in errors_of(compared[0]).items() if k[0] != "wrong"}
    assert errors_of(tmp_path / "out") == expected


@pytest.mark.usefixtures("imported")
def test_a_run_that_fails_beside_others_is_named_when_they_are_done(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # as a script's main leaves it
    jobs = []
    for name in ("fails", "other"):
        (tmp_path / name).mkdir()
        jobs.append((OmegaConf.create({"fails": name == "fails"}), tmp_path / name))
    with pytest.raises(ChildProcessError, match=r"1 of 2 runs failed: see \S*fails/log.txt;"):
        train_in_parallel(write_or_fail, jobs, 1)
    assert (tmp_path / "fails" / "log.txt").read_text() == "error: asked to\n"
    assert (tmp_path / "other" / "done").is_file()


def test_errors_of_single_numbers_are_shown_and_not_judged():
    medians = {("du/dt", "a"): 1.2, ("du/dt", "b"): 1.0, ("loss", "a"): 9.0, ("loss", "b"): 1.0}
    rows = [
        {"quantity": quantity, "arm": arm, "against": lockstep.TRUTH, "error": error}
        for (quantity, arm), error in medians.items()
    ]
    judged = lockstep.verdict(rows, "a", "b", 1.5)
    assert judged["passed"]
    assert judged["ratios"] == {"du/dt": pytest.approx(1.2)}
    assert len(lockstep.summary(rows)) == 4


def test_an_arm_that_runs_out_of_memory_leaves_the_others_measured(tmp_path, monkeypatch):
    """At its first step, and at one of the rounds, where the others hold memory too."""
    overrides = ["experiment=speed_matching_smoke", "trainer=cpu", "logger=csv"]
    overrides += ["data.tokens=16", "data.batch_size=4", "comparison.speed.rounds=2"]
    overrides += ["model.width=32", "model.heads=2", "model.depth=1"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("compare", overrides)
    configs = {name: placed(config, tmp_path) for name in ("fine", "first", "later", "cannot")}
    calls = {}
    real = speed.Stepper.times

    def times(self, steps):
        name = next(n for n, c in configs.items() if c is self.config)
        calls[name] = calls.get(name, 0) + 1
        found = real(self, steps)
        if name == "first" or (name == "later" and calls[name] == 4):
            for parameter in self.net.parameters():
                parameter.grad = torch.ones_like(parameter)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if name == "cannot":
            raise NotImplementedError("no such derivative")
        assert all(p.grad is None for p in self.net.parameters())
        return found

    monkeypatch.setattr(speed.Stepper, "times", times)
    found = speed.measure(configs, 16, config.comparison.speed, "cpu")
    status = {name: row["status"] for name, row in found.items()}
    assert status == {
        "fine": "measured",
        "first": "out of memory",
        "later": "out of memory",
        "cannot": "unsupported",
    }
    assert len(found["fine"]["times_ms"]) == 2 * config.comparison.speed.steps_per_round
    assert found["cannot"]["reason"] == "no such derivative"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("CUDA error: out of memory", "out of memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "out of memory"),
        ("out of resource: shared memory", "unsupported"),
    ],
)
def test_what_failed_is_told_apart(words, status):
    assert speed._failure(RuntimeError(words))["status"] == status
    with pytest.raises(RuntimeError, match="illegal"):
        speed._failure(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_speeds_are_compared(tmp_path):
    small = [
        "tokens=[16]",
        "modes=[single]",
        "rounds=2",
        "steps_per_round=1",
        "tokens_per_batch=64",
    ]
    options = [f"comparison.speed.{option}" for option in small]
    options += ["comparison.speed.head_dims.24=null", "comparison.speed.batches=[equal,largest]"]
    arguments = ["experiment=speed_matching_smoke", "trainer=cpu", "logger=csv", *options]
    succeed("compare.py", *arguments, f"hydra.run.dir={tmp_path / 'out'}", cwd=tmp_path)
    lines = (tmp_path / "out" / "speed.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    equal = [row for row in rows if row["batches"] == "equal"]
    assert {row["arm"] for row in equal} == {"jvp", "sdpa", "sdpa_fused"}
    for row in equal:
        parts = row["forward_ms"] + row["backward_ms"] + row["optimizer_ms"]
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        assert parts == pytest.approx(row["ms"], rel=0.5)
        assert row["batch"] == 4
        assert row["first_step_s"] > 0
    numerators = [row["tflops"] * row["ms"] for row in equal]
    assert max(numerators) == pytest.approx(min(numerators)), "one numerator for all arms"
    assert {row["status"] for row in rows if row["batches"] == "largest"} == {"unsupported"}
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["comparison.kind=size"], "comparison.kind must be one of loss, speed"),
        (["comparison.candidate=flash"], "comparison.candidate must be one of jvp, sdpa"),
        (["runs=[nowhere]"], "nowhere has no config.yaml"),
        (["comparison.seeds=0"], "comparison.seeds must be an integer >= 1"),
        (["comparison.parallel=0"], "comparison.parallel must be an integer >= 1"),
        (["comparison.window=2"], "comparison.window must be"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(arguments, message, tmp_path):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("compare", arguments)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            compare(config, arguments, tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_error_is_one_clear_line(tmp_path):
    done = call("compare.py", "comparison.sede=3", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "unknown configuration key 'comparison.sede'" in line


class TestDashboard:
    @pytest.fixture(autouse=True)
    def needs_the_package(self):
        pytest.importorskip("wandb_workspaces")

    def test_panels_show_what_runs_log(self, compared):
        output, _ = compared
        with (output / "runs" / "jvp_seed0" / "metrics.csv").open() as file:
            logged = set(next(csv.reader(file)))
        sections = dashboard.panels()
        lines = [p for p in sections["Loss matching"] if p.y]
        assert {name for p in lines for name in p.y} <= logged
        assert all(p.groupby == "JobType" for p in lines)
        pictures = {path.stem for path in (output / "plots").glob("*.png")}
        (curves, *_) = sections["Comparison"]
        assert {f"comparison/{name}" for name in pictures} == set(curves.media_keys)

    def test_the_workspace_shows_one_pair(self):
        space = dashboard.workspace("us", "flash-jvp", "loss-1234")
        assert [s.name for s in space.sections] == list(dashboard.panels())
        assert "loss-1234" in str(space.runset_settings.filters)
        assert space._to_model() is not None

    def test_the_report_says_the_verdicts(self, compared):
        verdicts = dashboard.verdicts(results(compared[0]))
        made = dashboard.report("us", "flash-jvp", "loss-1234", verdicts)
        words = [getattr(block, "text", "") for block in made.blocks]
        assert any("No verdict" in str(text) for text in words)
        assert any("As accurate" in str(text) for text in words)

    def test_what_would_be_saved_is_shown_without_login(self, compared, capsys):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = hydra.compose("dashboard", [f"comparison={compared[0]}", "save=false"])
        build(config)
        assert "LinePlot: Unweighted error" in capsys.readouterr().out

    def test_saving_without_login_says_what_to_do(self, monkeypatch):
        import wandb

        def api():
            raise wandb.errors.UsageError("No API key configured.")

        monkeypatch.setattr(wandb, "Api", api)
        with pytest.raises(ValueError, match="run 'wandb login' and upload the offline runs"):
            dashboard.entity_or_raise(None)
