"""Names that changed work for one release: on the command line, in files, in Python."""

from typing import Any

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from tests.commands import FAST, in_process, rows
from tests.test_configs import composed
from training import registry, renamed
from training.checkpoints import AtomicCheckpointIO, load_checkpoint
from training.loading import load_trained
from training.objectives.alphaflow import AlphaFlow
from training.objectives.flow_map import FlowMap
from training.objectives.imf import IMF
from training.objectives.meanflow import MeanFlow
from training.objectives.meanflow_distillation import MeanFlowDistillation
from training.objectives.objective import Objective
from training.objectives.shortcut import Shortcut
from training.randomness import Draws


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(renamed, "_said", set())


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("objective.equal_share=0.5", "objective.data_proportion=0.5"),
        ("++objective.finest=8,16", "++objective.denoise_timesteps=8,16"),
        ("optimizer.floor=0.1", "optimizer.min_lr_ratio=0.1"),
        ("ckpt_changes=[a, data.held_out]", "allow_config_changes=[a, data.val_fraction]"),
        ("data.held_out=0.2", "data.val_fraction=0.2"),
        ("data.held_out_split=null", "data.val_split=null"),
        ("~callbacks.guard", "~callbacks.non_finite_guard"),
        ("callbacks.accuracy.n=9", "callbacks.sample_quality.n=9"),
        ("callbacks.buckets=null", "callbacks.loss_by_timestep=null"),
        ("a.b=[x=jvp,objective.equal_share=0]", "a.b=[x=jvp,objective.data_proportion=0]"),
    ],
)
def test_a_former_key_of_the_command_line_is_read_and_named(capsys, given, read):
    assert renamed.command_line([given]) == [read]
    line, *more = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "is now" in line
    assert len(more) == given.startswith("ckpt")


def test_other_arguments_stay_as_they_are(capsys):
    given = ["-m", "data=digits", "callbacks.guardian=1", "output=a/optimizer.floor.json", "x"]
    given += ["trusted=[mine.finest]", "hydra.run.dir=/a=b", "~callbacks.samples"]
    assert renamed.command_line(given) == given
    assert capsys.readouterr().err == ""


def test_a_key_under_both_names_is_refused():
    says = r"optimizer\.floor is the former name of optimizer\.min_lr_ratio; give .* alone"
    with pytest.raises(ValueError, match=says):
        renamed.command_line(["optimizer.min_lr_ratio=0", "optimizer.floor=0.1"])
    config = composed("++optimizer.floor=0.1")  # as a file of the user's would say it
    with pytest.raises(ValueError, match=says):
        renamed.composed(config, ["optimizer.min_lr_ratio=0"])


def test_a_users_own_file_under_former_names_is_read(capsys):
    config = composed(
        "++objective.equal_share=0.125",
        "++callbacks.guard.patience=3",
        "++callbacks.accuracy=null",
        "++callbacks.mine._target_=training.callbacks.buckets.TimeBuckets",
    )
    found = renamed.composed(config)
    assert found.objective.data_proportion == 0.125
    assert found.callbacks.non_finite_guard.patience == 3
    assert found.callbacks.non_finite_guard._target_.endswith(".NonFiniteGuard")
    assert found.callbacks.sample_quality is None
    assert found.callbacks.mine._target_.endswith(".LossByTimestep")
    assert not {"guard", "accuracy"} & set(found.callbacks)
    (line,) = capsys.readouterr().err.splitlines()
    assert "objective.equal_share is now objective.data_proportion" in line
    assert "training.callbacks.buckets.TimeBuckets is now" in line
    assert OmegaConf.is_struct(found)
    plain = composed()
    assert renamed.composed(plain) is plain


def test_every_present_name_is_there():
    configs = [composed(f"objective={o}", f"data={d}") for o, d in
               (("meanflow", "hugging_face"), ("shortcut", "digits"))]  # fmt: skip
    for old in renamed.KEYS:
        new = renamed.key(old)
        assert new != old
        assert any(OmegaConf.select(c, new, default=c) is not c for c in configs), new
        assert all(OmegaConf.select(c, old) is None for c in configs), old
    known = set().union(*registry._TARGETS.values())
    for new in renamed.TARGETS.values():
        assert new in known
        assert callable(get_object(new))
    for old, new in renamed.STATES.items():
        assert any(target.endswith(f".{old}") for target in renamed.TARGETS)
        assert any(target.endswith(f".{new}") for target in renamed.TARGETS.values())


def test_a_run_that_was_written_under_former_names_goes_on(tmp_path, capsys):
    run = tmp_path / "run"
    light = [*FAST, "callbacks.sample_quality=null", "callbacks.samples=null"]
    light += [
        "objective.data_proportion=0.25",
        "optimizer.min_lr_ratio=0.5",
        "data.val_fraction=0.3",
    ]
    light += ["callbacks.non_finite_guard.patience=7", "trainer.log_every_n_steps=1"]
    in_process("train.py", *light, "trainer.max_steps=2", f"hydra.run.dir={run}")
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    order = list(checkpoint["config"]["callbacks"])
    checkpoint["config"] = formerly(checkpoint["config"])
    checkpoint["callbacks"]["Guard"] = checkpoint["callbacks"].pop("NonFiniteGuard") | {
        "skipped": 5
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    OmegaConf.save(checkpoint["config"], run / "config.yaml")
    assert "equal_share: 0.25" in (run / "config.yaml").read_text()
    capsys.readouterr()

    trained = load_trained(path, weights="net")
    assert trained.config.objective.data_proportion == 0.25
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: ")
    assert "objective.equal_share is now objective.data_proportion" in line

    again = tmp_path / "again"
    in_process(
        "train.py", *light, f"ckpt_path={path}", "trainer.max_steps=3", f"hydra.run.dir={again}"
    )
    in_process("train.py", f"resume={run}", "trainer.max_steps=3")
    for folder in (again, run):
        assert "equal_share" not in (folder / "config.yaml").read_text()
        config = OmegaConf.load(folder / "config.yaml")
        assert config.objective.data_proportion == 0.25
        assert config.callbacks.non_finite_guard.patience == 7
        assert list(config.callbacks) == order
        assert float(rows(folder)[-1]["train/skipped"]) == 5
        state = load_checkpoint(folder / "checkpoints" / "last.ckpt")["callbacks"]
        assert "Guard" not in state


def formerly(config: dict[str, Any]) -> dict[str, Any]:
    """As the release before wrote it."""
    targets = {new: old for old, new in renamed.TARGETS.items()}
    for old, last in renamed.KEYS.items():
        group, _, word = old.rpartition(".")
        node = config[group] if group else config
        items = [(word if name == last else name, value) for name, value in node.items()]
        node.clear()
        node.update(items)
    for node in config["callbacks"].values():
        if node:
            node["_target_"] = targets.get(node["_target_"], node["_target_"])
    return config


def test_former_arguments_in_python():
    with pytest.warns(FutureWarning, match="equal_share is now data_proportion"):
        assert MeanFlow(equal_share=0.5).data_proportion == 0.5
    for kind in (AlphaFlow, FlowMap, IMF, lambda **o: MeanFlowDistillation(lambda: None, **o)):
        with pytest.warns(FutureWarning, match="equal_share"):
            assert kind(equal_share=0.125).data_proportion == 0.125
    with pytest.warns(FutureWarning, match="finest is now denoise_timesteps"):
        assert Shortcut(finest=8).denoise_timesteps == 8
    with pytest.raises(TypeError, match="finest is the former name"):
        Shortcut(finest=8, denoise_timesteps=16)


def test_former_methods_of_an_objective_of_ones_own():
    with pytest.warns(FutureWarning, match="Mine.draw is now sample"):

        class Mine(Objective):
            def draw(self, x, y, null_label, draws):
                return x

    assert Mine().sample(3, None, 0, None) == 3


def test_former_methods_may_ask_those_of_a_class_of_ours():
    with pytest.warns(FutureWarning, match=r"Mine\.draw is now sample"):

        class Mine(MeanFlow):
            def draw(self, *given):
                return super().draw(*given)

    x, y = torch.zeros(4, 1, 2, 2), torch.zeros(4).long()
    assert Mine().sample(x, y, 10, Draws(0, 0, 0, 1, x.device)).z.shape == x.shape


def test_the_arguments_of_a_class_of_ones_own_keep_their_names():
    config = {"data": {"_target_": "mine.Data", "held_out": 0.1}}
    assert renamed._update(config, set()) == []
    assert config["data"]["held_out"] == 0.1


def test_the_former_module_of_trained_networks():
    with pytest.warns(FutureWarning, match=r"training\.trained is now training\.loading"):
        import training.trained

    assert training.trained.load_trained is load_trained
