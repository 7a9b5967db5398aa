"""Objectives with a state of their own through Lightning: teachers, schedules, checkpoints."""

from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, Trainer
from omegaconf import OmegaConf

from training.attentions import sdpa
from training.background_checkpoints import BackgroundCheckpointIO
from training.callbacks.checkpoint import LastCheckpoint
from training.callbacks.ema import EMA
from training.checkpoints import find_checkpoint, load_checkpoint
from training.config_checks import warning
from training.data.digits import Digits
from training.loading import load_flow
from training.models.dit import DiT
from training.module import GenerativeModule
from training.objectives.alphaflow import AlphaFlow
from training.objectives.dmf import DMF
from training.objectives.flow_map import FlowMap
from training.objectives.flow_matching import FlowMatching
from training.objectives.imf import IMF
from training.objectives.scm import SCM
from training.objectives.shortcut import Shortcut
from training.objectives.tvm import TVM
from training.optimizers import adamw
from training.registry import register

MODEL = {"depth": 1, "width": 32, "guided": True, "second_head": 0, "log_variance": True}
OBJECTIVES = {
    "scm": lambda: SCM(warmup_steps=6),
    "tvm": TVM,
    "alphaflow": lambda: AlphaFlow(start=0, end=8, gamma=10, clamp=0.3),
    "shortcut": Shortcut,
    "imf": IMF,
    "flow_map": FlowMap,
    "dmf": DMF,
}
STATEFUL = ("scm", "tvm", "alphaflow", "shortcut", "imf")


def composed(*overrides):
    configs = str(Path(__file__).parents[2] / "configs")
    with initialize_config_dir(configs, version_base="1.3"):
        return compose("train", list(overrides))


class Errors(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["metrics"]["error"]))


def train(folder, objective, steps, resume=None, compile=False, config=None, keep=None, **options):
    """The errors and the module of a short run of a schedule of 8 steps."""
    errors = Errors()
    L.seed_everything(3, verbose=False)
    net = DiT(sdpa, image_size=8, channels=1, num_classes=10, **MODEL)
    schedule = lambda p, _: adamw(p, 8, lr=1e-2, warmup_steps=2)  # noqa: E731
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[errors, EMA(), LastCheckpoint(folder / "checkpoints", 500, keep)],
        plugins=[BackgroundCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    data = Digits(seed=3, batch_size=16)
    module = GenerativeModule(
        net, objective, schedule, 3, compile, config=config, data=data.description
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return errors.values, module


@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_continues_exactly_with_its_teacher_and_schedule(tmp_path, name):
    build = OBJECTIVES[name]
    whole, module = train(tmp_path, build(), 8, accumulate_grad_batches=2)
    first, _ = train(tmp_path, build(), 5, accumulate_grad_batches=2)
    path = find_checkpoint("last", tmp_path)
    second, resumed = train(tmp_path, build(), 8, resume=path, accumulate_grad_batches=2)
    assert first + second == whole
    a, b = module.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key])), key


def test_checkpoints_are_kept_on_the_way_and_are_not_written_over(tmp_path):
    train(tmp_path, FlowMatching(), 5, keep=2)
    folder = tmp_path / "checkpoints"
    steps = {path.name: load_checkpoint(path)["global_step"] for path in folder.glob("*.ckpt")}
    assert steps == {"step_0000002.ckpt": 2, "step_0000004.ckpt": 4, "last.ckpt": 5}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_errors_and_times_are_given_sample_by_sample(batch, draws, name):
    net, objective = (
        DiT(sdpa, image_size=8, channels=1, num_classes=10, **MODEL),
        OBJECTIVES[name](),
    )
    objective.setup(net)
    for steps in (0, 100):  # of a schedule
        objective.steps = steps
        sample = objective.sample(*batch, net.null_label, draws)
        _, metrics, errors = objective.loss(net, sample)
        assert errors.shape == sample.t.shape == batch[1].shape
        assert not errors.requires_grad
        torch.testing.assert_close(errors.mean(), metrics["error"])


@pytest.mark.parametrize("name", ["tvm", "shortcut"])
def test_a_teacher_follows_once_a_step_and_is_not_trained(tmp_path, name):
    _, module = train(tmp_path, OBJECTIVES[name](), 4, accumulate_grad_batches=2)
    teacher = module.objective.teacher
    assert teacher.updates == 4
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    pairs = zip(teacher.net.parameters(), module.net.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_flow_is_distilled_from_its_checkpoint_and_other_checkpoints_are_refused(tmp_path):
    config = composed("objective=flow_matching", "attention=sdpa")
    config = OmegaConf.masked_copy(config, ["attention", "data", "model", "objective", "optimizer"])
    config = OmegaConf.to_container(config, resolve=True) | {"seed": 3, "compile": False}
    config["model"] |= MODEL
    _, module = train(tmp_path, FlowMatching(), 4, config=config)
    path = tmp_path / "checkpoints" / "last.ckpt"
    average = load_checkpoint(path)["ema"]["averages"]["0.9999"]
    for weights, expected in (("ema", average), ("net", module.net.state_dict())):
        teacher = load_flow(str(path), weights)
        for name, weight in teacher.named_parameters():
            assert torch.equal(weight, expected[name]), name

    student = SCM(teacher=lambda: load_flow(str(path)))
    errors, distilled = train(tmp_path / "student", student, 2)
    assert len(errors) == 2
    stored = load_checkpoint(tmp_path / "student" / "checkpoints" / "last.ckpt")
    assert not [key for key in stored["state_dict"] if "teacher" in key]
    assert not any(p.requires_grad for p in distilled.objective.teacher[0].parameters())

    for module, kind, share in (
        ("meanflow", "MeanFlow", 0.5),
        ("meanflow", "MeanFlow", 0.0),
        ("scm", "SCM", None),
        ("objective", "Objective", None),  # somebody's own, which promises nothing
    ):
        target = f"training.objectives.{module}.{kind}"
        register("objective", target)
        config["objective"] |= {"_target_": target, "data_proportion": share}
        train(tmp_path, FlowMatching(), 1, config=config)
        if share:
            load_flow(str(path))
            continue
        with pytest.raises(ValueError, match=rf"objective\.teacher\.ckpt.*last.ckpt is of {kind}"):
            load_flow(str(path))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        load_flow("nowhere.ckpt")
    with pytest.raises(ValueError, match=r"objective\.teacher\.ckpt must name"):
        load_flow(None)


@pytest.mark.parametrize(
    ("steps", "denoiser", "never"), [(20, 20, True), (21, 20, False), (-1, 20, False)]
)
def test_a_tangent_that_never_starts_is_warned_about(steps, denoiser, never):
    settings = [f"trainer.max_steps={steps}", f"objective.denoiser_steps={denoiser}"]
    says = warning(composed("objective=scm", *settings))
    assert says.startswith("objective.denoiser_steps=20: the tangent never starts") == never
    assert warning(composed("objective=meanflow", settings[0])) == ""
