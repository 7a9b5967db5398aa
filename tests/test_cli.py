"""The command line as users type it: files, values, names, errors, interrupts."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from tests.commands import FAST, ROOT, call, column, in_process, rows, succeed
from training.checkpoints import load_checkpoint
from training.data.infinite_sampler import InfiniteSampler
from training.data.module import split
from training.loading import load_trained

SMALL = ["trainer=cpu", "model.depth=2", "model.width=48", "data.batch_size=32"]
SMALL += ["callbacks.sample_quality.n=100"]
METRICS = {
    "train/loss",
    "train/error",
    "train/v_loss",
    "train/dudt_rms",
    "train/tangent_norm",
    "train/weight",
    "train/grad_norm",
    "train/lr",
    "perf/step_ms",
    "perf/step_ms_p10",
    "perf/step_ms_p90",
    "perf/samples_per_s",
    "perf/tflops",
    "error_t/0.00-0.25",
    "error_t/0.75-1.00",
    "sample_accuracy",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Thirty steps with each attention, every step logged; the first one logs to W&B too."""
    folder = tmp_path_factory.mktemp("runs")
    outputs = {}
    for attention in ("jvp", "sdpa", "reference"):
        arguments = [*SMALL, "trainer.max_steps=30", "trainer.log_every_n_steps=1"]
        arguments += ["callbacks.page=null"]
        arguments += ["logger=wandb_offline" if attention == "jvp" else "logger=csv"]
        arguments += [
            f"attention={attention}",
            f"hydra.run.dir={folder / attention}",
        ]
        if attention == "jvp":
            outputs[attention] = succeed("train.py", *arguments, cwd=folder).stdout
        else:
            outputs[attention] = in_process("train.py", *arguments)
    return folder, outputs


def test_without_the_checkpoint_callback_no_checkpoint_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where Lightning would write its own
    off = ["callbacks.checkpoint=null", "callbacks.sample_quality=null", "logger=csv"]
    in_process("train.py", *FAST, "trainer.max_steps=2", *off, f"hydra.run.dir={tmp_path}/run")
    assert (tmp_path / "run" / "summary.json").is_file()
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("attention", ["jvp", "sdpa", "reference"])
def test_thirty_steps_leave_all_files_and_a_table(runs, attention):
    folder, outputs = runs
    run = folder / attention
    for name in ("config.yaml", "checkpoints/last.ckpt", "samples/step_000030.png"):
        assert (run / name).stat().st_size > 100, name
    assert (run / "samples/step_000030.png").read_bytes().startswith(b"\x89PNG")
    assert set(rows(run)[0]) >= METRICS
    errors = column(run, "train/error")
    assert len(errors) == 30
    assert errors[-1] < errors[0]  # it learns
    summary = json.loads((run / "summary.json").read_text())
    assert summary["sample_accuracy"] == column(run, "sample_accuracy")[-1]
    assert summary["steps"] == 30
    for title in ("error (unweighted)", "du/dt RMS", "accuracy of samples"):
        assert title in outputs[attention]
    assert "ms per step (median of the last 19)" in outputs[attention]  # without ten of warm-up
    assert "samples per second (the last 19 steps)" in outputs[attention]


def test_wandb_logs_offline_beside_the_rest(runs):
    assert list((runs[0] / "jvp" / "wandb").glob("offline-run-*"))
    assert not (runs[0] / "sdpa" / "wandb").exists()


@pytest.mark.parametrize("attention", ["jvp", "reference"])
@pytest.mark.parametrize("name", ["train/loss", "train/error", "train/dudt_rms"])
def test_the_first_twenty_losses_agree_with_sdpa(runs, attention, name):
    ours, theirs = (column(runs[0] / a, name)[:20] for a in (attention, "sdpa"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(set(theirs)) > 10


@pytest.mark.parametrize(
    "arguments", [["nfe=1", "n=64"], ["nfe=2", "n=5", "label=3", "weights=net"]]
)
def test_sample_writes_a_grid_from_a_checkpoint(runs, tmp_path, monkeypatch, arguments):
    folder, _ = runs
    path = tmp_path / "grid.png"
    ckpt = folder / "jvp" / "checkpoints" / "last.ckpt"
    arguments = [f"ckpt={ckpt}", f"output={path}", *arguments]
    monkeypatch.chdir(tmp_path)
    if "nfe=1" in arguments:
        printed = succeed("sample.py", *arguments, cwd=tmp_path).stdout
    else:
        printed = in_process("sample.py", *arguments)
    assert printed.strip() == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]  # and nothing else


def test_pictures_of_different_settings_have_different_names(runs):
    run = runs[0] / "reference"
    ckpt = f"ckpt={run / 'checkpoints' / 'last.ckpt'}"
    many = [[], ["weights=net"], ["seed=1"], ["label=3"], ["nfe=2"], ["sampler.nfe=3"]]
    many += [["sampler.nfe=2", "sampler.times=[0.3]"], ["sampler=euler", "nfe=2"]]
    names = [in_process("sample.py", ckpt, "n=5", *more).strip() for more in many]
    assert len({*names}) == len(names)
    assert names[0] == str(run / "samples" / "step000030_ema_nfe1_n5_seed0.png")
    assert names[-2].endswith("_nfe2_n5_seed0_times[0.3].png")
    assert "_nfe2_n5_seed0_FlowSampler_methodeuler" in names[-1]


@pytest.fixture
def exported(runs, tmp_path):
    path = tmp_path / "model.safetensors"
    ckpt = runs[0] / "jvp" / "checkpoints" / "last.ckpt"
    in_process("export.py", f"ckpt={ckpt}", f"output={path}")
    return ckpt, path


def test_an_exported_network_is_loaded_as_the_documentation_says(exported, monkeypatch):
    """The block of docs/training/runs.md, run where there is a model.safetensors."""
    ckpt, path = exported
    page = (ROOT / "docs" / "training" / "runs.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len([line for line in block.splitlines() if line and "import" not in line]) == 3
    monkeypatch.chdir(path.parent)
    namespace = {}
    exec(block, namespace)
    assert namespace["images"].shape == (10, 1, 8, 8)
    ema, net = (load_trained(ckpt, weights).net.state_dict() for weights in ("ema", "net"))
    for name, weight in namespace["trained"].net.state_dict().items():
        assert torch.equal(weight, ema[name]), name
    assert any(not torch.equal(ema[name], net[name]) for name in ema)


def test_a_file_that_was_not_exported_is_refused(tmp_path):
    for content, says in ((b"no", "not a readable safetensors"), (save({}), "not written by")):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=says):
            load_trained(tmp_path / "x.safetensors")


def test_evaluation_scores_every_average_at_every_nfe(exported, tmp_path):
    ckpt, path = exported
    options = ["n=200", "nfe=[1,2]", "classifier_steps=30", f"classifier={tmp_path / 'c.pt'}"]
    output = tmp_path / "scores.json"
    more = [f"output={output}", "weights=[0.9999,net]"]
    table = in_process("evaluate.py", f"ckpt={ckpt}", *options, *more)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["weights"], row.get("nfe")) for row in rows] == [
        ("real, held out", None),
        *((weights, nfe) for weights in ("0.9999", "net") for nfe in (1, 2)),
    ]
    for row in rows[1:]:
        assert row["frechet_distance"] > 3 * rows[0]["frechet_distance"]  # after thirty steps
        assert 0 <= row["precision"] <= 1
    assert "FID" not in table
    assert "class accuracy" in table
    in_process("evaluate.py", f"ckpt={path}", *options, f"output={output}")
    again = json.loads(output.read_text())["rows"]
    # Of the export: the same.
    assert [row | {"weights": "0.9999"} for row in again[1:]] == rows[1:3]


def test_flow_matching_trains_and_samples(tmp_path):
    arguments = ["objective=flow_matching", "trainer.max_steps=5", "sampler.nfe=4", *FAST]
    arguments += ["callbacks.sample_quality.n=50", "callbacks.ema=null"]
    in_process("train.py", *arguments, f"hydra.run.dir={tmp_path}")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 5
    assert column(tmp_path, "step") == [4, 5]  # the last step, and the accuracy after it
    assert all(error > 0 for error in column(tmp_path, "train/error"))
    trained = load_trained(tmp_path / "checkpoints" / "last.ckpt")  # without averages: as trained
    assert trained.averages == []


@pytest.mark.parametrize("objective", ["imf", "tvm", "scd"])
def test_an_objective_goes_on_and_is_exported_evaluated_and_sampled(tmp_path, capfd, objective):
    """What it keeps, a second head or a teacher, is no hindrance."""
    fast = [*FAST, "callbacks.sample_quality.n=20"]
    options, run = [f"objective={objective}"], tmp_path / objective
    if objective == "scd":
        more = ["objective=flow_matching", "trainer.max_steps=2", f"hydra.run.dir={tmp_path}"]
        in_process("train.py", *fast, *more)
        options += [f"objective.teacher.ckpt={tmp_path / 'checkpoints' / 'last.ckpt'}"]
        options += ["trainer.precision=64-true"]  # another one than the teacher's
    for steps in (2, 3):
        more = [f"trainer.max_steps={steps}", "ckpt_path=auto", f"hydra.run.dir={run}"]
        in_process("train.py", *fast, *options, *more)
    assert column(run, "step") == [1, 2, 3]  # each last step, and the samples at the end
    if objective == "scd":
        (tmp_path / "checkpoints").rename(tmp_path / "gone")  # no teacher is needed any more
    ckpt = f"ckpt={run / 'checkpoints' / 'last.ckpt'}"
    scores = ["n=80", "nfe=1", "classifier_steps=2", f"output={run / 'scores.json'}"]
    in_process("evaluate.py", ckpt, *scores)
    if objective == "imf":  # its sampler without being named
        for script in ("evaluate.py", "sample.py"):
            with pytest.raises(SystemExit):
                in_process(script, ckpt, "sampler.guidance=100")
            assert "must be <= objective.guidance_max=8, the most" in capfd.readouterr().err
        in_process("evaluate.py", ckpt, *scores[:-1], "sampler.guidance=3")
        name = in_process("sample.py", ckpt, "n=10", "sampler.guidance=3", "weights=net").strip()
        assert name.endswith("step000003_net_nfe1_n10_seed0_guidance3.png")
        in_process("evaluate.py", ckpt, *scores[:-1])
        files = [run / "evaluation" / name for name in ("scores.json", "scores_2.json")]
        first, second = (json.loads(file.read_text())["sampler"]["guidance"] for file in files)
        assert (first, second) == (3, 1.5)
    in_process("export.py", ckpt, f"output={run / 'model.safetensors'}")
    for path in ("checkpoints/last.ckpt", "model.safetensors"):
        in_process("sample.py", f"ckpt={run / path}", "n=10", f"output={run / 'grid.png'}")
    assert (run / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("train.py", ["attention=flash9"], "attention must be one of jvp, reference, sdpa"),
        ("train.py", ["experiment=nothing"], "experiment must be one of alphaflow_b2, "),
        (
            "train.py",
            ["experiment=loss_matching_smoke", *FAST],
            "experiment=loss_matching_smoke is scripts/compare.py's; run python scripts/compare.py",
        ),
        ("train.py", ["attentoin=jvp"], "key 'attentoin'; did you mean attention?"),
        ("train.py", ["objective.q=1"], "key 'objective.q'; objective has jvp, data_proportion"),
        ("train.py", ["trainer.max_step=1"], "did you mean trainer.max_steps?"),
        ("train.py", ["max_steps=1"], "did you mean trainer.max_steps?"),
        ("train.py", ["lr=1e-4", "traner=cpu"], "did you mean optimizer.lr?"),
        ("train.py", ["objective=scm", "objectiv.denoiser_step=1"], "mean objective.denoiser_st"),
        ("sample.py", ["ckpt=x", "wieghts=net"], "did you mean weights?"),
        ("compare.py", ["comparison.seed=1"], "did you mean comparison.seeds?"),
        ("train.py", ["objective.p=-1"], "objective.p must be >= 0"),
        ("train.py", ["objective.jvp.mode=triple"], "objective.jvp.mode must be one of"),
        ("train.py", ["model.size=H/2"], "model.size must be one of"),
        ("train.py", ["data.batch_size=5000"], "data.batch_size"),
        ("train.py", ["trainer.precision=33"], "trainer.precision must be one of"),
        ("train.py", ["trainer.precision=bf16-true"], "trainer.precision must be one of"),
        ("train.py", ["trainer=cpu", "trainer.precision=16-mixed"], "use bf16-mixed"),
        (
            "train.py",
            ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1", "optimizer.fused=true"],
            "under trainer.precision=bf16-mixed with trainer.gradient_clip_val",
        ),
        ("train.py", ["trainer.strategy=fsdp"], "trainer.strategy=fsdp: only this project's"),
        ("train.py", ["compile=ja"], "compile must be true or false; got 'ja'"),
        ("train.py", ["callbacks.samples=on"], "callbacks.samples must be null (off) or have"),
        ("train.py", ["seed=abc"], "seed must be an integer; got 'abc'"),
        ("train.py", ["seed=-1"], "seed must be an integer >= 0 and < 2^32; got -1"),
        ("sample.py", ["ckpt=x", "seed=-1"], "seed must be an integer >= 0 and < 2^32; got -1"),
        ("evaluate.py", ["ckpt=x", "nfe=1.5"], "nfe must be an integer >= 1; got 1.5"),
        ("train.py", ["trainer.max_steps=many"], "trainer.max_steps must be an integer"),
        ("train.py", ["ckpt_path=last"], "ckpt_path=last: there is no"),
        ("train.py", ["ckpt_path=nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        ("train.py", ["optimizer.lr=0"], "optimizer.lr must be > 0"),
        ("train.py", ["optimizer.lr=1e38", *FAST], "not finite (NaN or infinite) for 10 steps"),
        # An infinite error of weight 0 has a gradient of exactly 0: the run must not succeed.
        ("train.py", ["optimizer.lr=1e30", *FAST], "the loss or its gradient was not finite"),
        ("train.py", ["objective=scd", *FAST], "objective.teacher.ckpt must name the checkpoint"),
        ("train.py", ["sampler.guidance=3"], "train with guidance in the target (objective.omega"),
        (
            "train.py",
            ["objective=imf", "objective.guidance_max=1"],
            "sampler.guidance must be null where objective.guidance_max=1: the network is not told",
        ),
        ("train.py", ["objective=imf", "model=dit_tiny"], "objective=imf needs a model that is"),
        (
            "train.py",
            ["objective=imf", "objective.guidance_max=4", "sampler.guidance=4.5"],
            "sampler.guidance must be <= objective.guidance_max=4, the most that the network is",
        ),
        (
            "train.py",
            ["objective=flow_matching", "objective.label_dropout=0", "sampler.guidance=2"],
            "train with objective.label_dropout=0.1",
        ),
        (
            "train.py",
            ["objective.omega=2"],
            "objective.label_dropout must be > 0 with objective.omega=2 objective.kappa=0.0",
        ),
        ("train.py", ["objective=tvm", "objective.omega=2"], "must be > 0 with objective.omega=2"),
        ("train.py", ["data=image_folder", "trainer.max_steps=1"], "data.path"),
        ("train.py", ["data=image_folder"], "trainer.max_steps must be given"),
        (
            "train.py",
            ["data=image_folder", "data.path=no", "trainer.max_steps=1"],
            "data.path: there is no directory no",
        ),
        ("train.py", ["data=fashion_mnist", "data.path=no"], "there is no train-images-idx3-ubyte"),
        (
            "train.py",
            ["data=latents", "data.path=no", "trainer.max_steps=1"],
            "data.path: there is no meta.json in no",
        ),
        (
            "train.py",
            ["experiment=meanflow_b2", "objective=alphaflow"],
            "the experiment is the recipe of objective=meanflow",
        ),
        (
            "train.py",
            ["experiment=meanflow_b2", "data=blobs", "data.batch_size=32"],
            "data.batch_size=32 with 1 process(es) x trainer.accumulate_grad_batches=1 is a step",
        ),
        ("encode_latents.py", ["data=blobs", "output=x"], "data: latents are encoded from colour"),
        ("sample.py", ["ckpt=nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        ("sample.py", [], "ckpt must be given: ckpt=RUN/checkpoints/last.ckpt, or a file that"),
        ("sample.py", ["a/b.ckpt"], "a/b.ckpt: arguments are KEY=VALUE; write ckpt=a/b.ckpt"),
        ("train.py", ["jvp/sdpa"], "jvp/sdpa: arguments are KEY=VALUE; write KEY=jvp/sdpa"),
        ("sample.py", ["ckpt=a=1/[b].ckpt"], "no checkpoint a=1/[b].ckpt"),
        ("sample.py", ["ckpt=~/no such.ckpt"], f"no checkpoint {Path.home()}/no such.ckpt"),
        ("train.py", ["model.norm=a=1"], """give it in quotes: 'model.norm="a=1"'"""),
        ("train.py", ["trainer.max_steps", "20"], "max_steps 20: write trainer.max_steps=20"),
        ("train.py", ["--max_steps=20"], "keys have no dashes; write trainer.max_steps=20"),
        ("train.py", ["--seed=2"], "keys have no dashes; write seed=2"),
        ("train.py", ["model.hidden_size=64"], "'model.hidden_size'; model has attention, size, p"),
        ("train.py", ["sampler.num=2"], "unknown configuration key 'sampler.num'; sampler has nfe"),
        ("train.py", ["data.path=pictures"], "name the kind of yours too, as data=image_folder"),
        ("train.py", ["trainer.limit_val=2"], "key 'trainer.limit_val'; trainer has accelerator"),
        (
            "train.py",
            ["experiment=meanflow_b4"],
            "the experiment is a published recipe of 400,320 steps, and digits are not its data",
        ),
        ("encode_latents.py", [], "output must be given: output=VALUE"),
        ("evaluate.py", ["ckpt=nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        ("evaluate.py", ["ckpt=x", "nfe=0"], "nfe must be an integer >= 1"),
        ("evaluate.py", ["ckpt=x", "features=fid"], "features must be one of classifier"),
        ("export.py", ["ckpt=no.safetensors"], "there is no file no.safetensors"),
        ("export.py", ["ckpt=x", "dtype=int8"], "dtype must be one of float32"),
        ("sample.py", ["ckpt=x", "n=0"], "n must be an integer >= 1"),
    ],
    ids=lambda x: "_".join(x)[:40] if isinstance(x, list) else None,
)
def test_a_mistake_gives_one_line_and_exit_code_1(
    tmp_path, monkeypatch, capfd, script, arguments, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as stopped:
        in_process(script, *arguments)
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert says in lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sampler.guidance=3"], "error: sampler.guidance must be null for a network that"),
        (["sampler.guidence=3"], "error: sampler.guidence: MeanFlowSampler has nfe, times, guid"),
        (["sampler=euler", "sampler.guidance=3"], "error: sampler.guidance must be 1 for a netw"),
    ],
)
def test_a_sampler_that_does_not_fit_the_network_is_refused(runs, capfd, arguments, says):
    ckpt = f"ckpt={runs[0] / 'sdpa' / 'checkpoints' / 'last.ckpt'}"
    for script in ("sample.py", "evaluate.py"):
        with pytest.raises(SystemExit):
            in_process(script, ckpt, *arguments)
        error = capfd.readouterr().err
        assert says in error
        assert len(error.splitlines()) == 1


def test_a_run_instead_of_its_checkpoint_is_told_the_file(runs, capfd):
    run = runs[0] / "sdpa"
    last = run / "checkpoints" / "last.ckpt"
    for script, key in (("sample.py", "ckpt"), ("train.py", "ckpt_path")):
        for given in (run, last.parent):
            with pytest.raises(SystemExit):
                in_process(script, f"{key}={given}")
            error = capfd.readouterr().err
            assert error == f"error: {key}: {given} is a directory; give {last}\n"


def test_an_unreadable_image_ends_a_run_with_one_line_that_names_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(16):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(b"not an image")
    arguments = ["data=image_folder", f"data.path={tmp_path / 'images'}", "data.num_workers=1"]
    arguments += ["trainer.max_steps=9"]
    result = call("train.py", *FAST, *arguments, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert re.match(r"error: data\.path: \S+\.png is not a readable image", result.stderr)


def test_an_unreadable_image_met_late_leaves_a_checkpoint(tmp_path):
    folder, run = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for i in range(64):
        Image.new("L", (8, 8), i).save(folder / f"{i:02}.png")
    data = ["data=image_folder", f"data.path={folder}", "data.image_size=8", "data.channels=1"]
    train = ["train.py", *FAST, *data, "data.num_workers=0", f"hydra.run.dir={run}"]
    train += ["callbacks.samples=null", "optimizer.schedule=constant", "data.batch_size=8"]
    order = InfiniteSampler(58, 8, seed=0)  # of the 64, six are held out
    late = split(64, 0.1)[0][list(itertools.islice(order, 5))[-1].indices[0]]
    picture = folder / f"{late:02}.png"
    whole = picture.read_bytes()
    picture.write_bytes(b"not an image")
    result = call(*train, "trainer.max_steps=8", cwd=tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
    step = load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"]
    assert step in (3, 4)  # batches are read ahead
    told = [line for line in result.stdout.splitlines() if line.startswith(("stopped", "wrote"))]
    assert told[0].startswith(f"stopped: data.path: {picture} is not a readable image")
    assert told[1].startswith(f"wrote last.ckpt after step {step}; resume with python ")
    assert " ckpt_path=last hydra.run.dir=" in told[1]
    picture.write_bytes(whole)
    in_process(*train, "trainer.max_steps=8", "ckpt_path=last")
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 8


@pytest.mark.parametrize("data", ["eight_gaussians", "blobs", "gaussian"])
def test_distributions_train_and_are_judged(tmp_path, data):
    arguments = [f"data={data}", "trainer.max_steps=2", "callbacks.sample_quality.n=100"]
    arguments += ["model.patch=1"] if data == "eight_gaussians" else []
    arguments += ["data.tokens=64"] if data == "blobs" else []
    in_process("train.py", *FAST, *arguments, f"hydra.run.dir={tmp_path / 'run'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    if data == "blobs":
        assert summary["real_accuracy"] > 0.5
    else:
        assert summary["energy_distance"] > 5 * abs(summary["real_energy_distance"])
    assert list((tmp_path / "run" / "samples").glob("*.png"))


def test_a_run_that_has_made_its_steps_says_so(runs):
    run = runs[0] / "reference"
    written = (run / "metrics.csv").read_text()
    arguments = [*SMALL, "trainer.max_steps=30", "ckpt_path=last", f"hydra.run.dir={run}"]
    says = "has made 30 steps; raise trainer.max_steps to go on"
    assert says in in_process("train.py", *arguments, "attention=reference")
    assert (run / "metrics.csv").read_text() == written


@pytest.mark.parametrize("limit", ["trainer.max_steps=3", "trainer.max_time=00:00:00:02"])
def test_a_run_whose_end_failed_is_finished_by_resuming_it(tmp_path, limit):
    train = ["train.py", *FAST, limit, f"hydra.run.dir={tmp_path}", "callbacks.sample_quality.n=20"]
    train += ["optimizer.schedule=constant", "trainer.log_every_n_steps=1"]
    (tmp_path / "samples").write_text("in the way")
    with pytest.raises(SystemExit):
        in_process(*train, "callbacks.samples.every_n_steps=1000000")
    (tmp_path / "samples").unlink()
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    before, step = checkpoint.read_bytes(), load_checkpoint(checkpoint)["global_step"]
    says = in_process(*train, "ckpt_path=last")
    assert f"the {step} steps are made; what follows them is missing and is made now" in says
    assert checkpoint.read_bytes() == before
    assert (tmp_path / "samples" / f"step_{step:06d}.png").is_file()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == step
    errors = column(tmp_path, "train/error")[-100:]
    assert summary["error"] == pytest.approx(sum(errors) / len(errors))
    assert column(tmp_path, "sample_accuracy") == [summary["sample_accuracy"]]
    assert "nothing to do" in in_process(*train, "ckpt_path=last")


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train_and_draw(tmp_path, precision):
    arguments = [
        "trainer.max_steps=3",
        f"trainer.precision={precision}",
        "callbacks.sample_quality.n=20",
    ]
    in_process("train.py", *FAST, *arguments, f"hydra.run.dir={tmp_path}")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3
