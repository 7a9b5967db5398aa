"""A file is data: whatever its configuration names, nothing but this project's classes is built."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from tests.commands import FAST, in_process
from tests.test_configs import composed, training_part
from training import registry
from training.build import build_net
from training.comparison.arms import read_run
from training.loading import load_flow, load_trained
from training.registry import checked


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test registers is forgotten."""
    monkeypatch.setattr(registry, "_TARGETS", copy.deepcopy(registry._TARGETS))
    monkeypatch.setattr(registry, "_trusted", set())
    monkeypatch.setattr(registry, "_own", set())


def settings(*overrides):
    return training_part(composed("logger=csv", *FAST, *overrides))


@pytest.fixture(scope="module")
def plain():
    """Configuration, data description and weights of a network that was not trained."""
    config = settings("objective=flow_matching", "model.depth=1", "sampler.nfe=1")
    net = build_net(DictConfig(config), (1, 8, 8), 10)
    return config, {"shape": (1, 8, 8), "num_classes": 10, "latents": None}, net.state_dict()


def placed(config, key, value):
    """The configuration with another value at a dotted key; a number is a place in a list."""
    config = copy.deepcopy(config)
    *parents, last = key.split(".")
    part = config
    for name in parents:
        if not isinstance(part.get(name), dict):
            part[name] = {}
        part = part[name]
    part[last] = value
    return config


PICKLE = b"cos\nsystem\n(S'touch pwned'\ntR."  # of a file: `touch pwned` when it is unpickled
SHELL = ["touch pwned"]
# A key of the configuration, what stands there, the key that the message names and the target.
GADGETS = {
    "unpickle": (
        "sampler",
        {
            "_target_": "torch.load",
            "f": {"_target_": "io.BytesIO", "initial_bytes": PICKLE.decode()},
            "weights_only": False,
        },
        "sampler._target_=torch.load",
    ),
    "write_text": (
        "model",
        {
            "_target_": "pathlib.Path.write_text",
            "self": {"_target_": "pathlib.Path", "_args_": ["pwned"]},
            "data": "x",
        },
        "model._target_=pathlib.Path.write_text",
    ),
    "open": (
        "data",
        {"_target_": "builtins.open", "file": "pwned", "mode": "w"},
        "data._target_=builtins.open",
    ),
    "system_by_position": (
        "objective",
        {"_target_": "os.system", "_args_": SHELL},
        "objective._target_=os.system",
    ),
    "process_in_attention": (
        "model.attention",
        {"_target_": "subprocess.Popen", "args": ["touch", "pwned"]},
        "model.attention._target_=subprocess.Popen",
    ),
    "log_file": (
        "callbacks.samples",
        {"_target_": "logging.FileHandler", "filename": "pwned"},
        "callbacks.samples._target_=logging.FileHandler",
    ),
    "partial": (
        "attention",
        {"_target_": "os.system", "_partial_": True, "command": "touch pwned"},
        "attention._target_=os.system",
    ),
    "positional_of_a_known_class": (
        "model._args_",
        [{"_target_": "os.system", "command": "touch pwned"}],
        "model._args_=",
    ),
    "teacher": (
        "objective.teacher",
        {"_target_": "os.mkdir", "path": "pwned"},
        "objective.teacher._target_=os.mkdir",
    ),
    "in_a_list": (
        "sampler.times",
        [0.5, {"_target_": "os.system", "command": "touch pwned"}],
        "sampler.times.1._target_=os.system",
    ),
    "deep_inside": (
        "model.depth",
        {"a": [[{"b": {"_target_": "os.mkdir", "path": "pwned"}}]]},
        "model.depth.a.0.0.b._target_=os.mkdir",
    ),
    "get_method": (
        "model.norm",
        {"_target_": "hydra.utils.get_method", "path": "os.system"},
        "model.norm._target_=hydra.utils.get_method",
    ),
    "instantiate": (
        "data.batch_size",
        {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.mkdir", "path": "x"}},
        "data.batch_size._target_=hydra.utils.instantiate",
    ),
    "import": (
        "objective._target_",
        "antigravity.fly",
        "objective._target_=antigravity.fly",
    ),
    "interpolated_environment": (
        "data.name",
        "${oc.env:HOME}",
        "data.name in its configuration is an interpolation, ${oc.env:HOME}",
    ),
    "interpolated_target": (
        "sampler._target_",
        "${data.payload}",
        "sampler._target_ in its configuration is an interpolation",
    ),
    "interpolated_runtime": (
        "sampler.nfe",
        "${hydra:runtime.output_dir}",
        "sampler.nfe in its configuration is an interpolation",
    ),
    "known_class_in_the_wrong_place": (
        "sampler",
        {"_target_": "training.callbacks.checkpoint.LastCheckpoint", "directory": "pwned"},
        "sampler._target_=training.callbacks.checkpoint.LastCheckpoint",
    ),
    "not_recursive": ("model._recursive_", False, "model._recursive_=False"),
    "conversion": ("sampler._convert_", "object", "sampler._convert_=object"),
    "target_is_no_name": ("model._target_", {"_target_": "os.getcwd"}, "model._target_={"),
    "anywhere": (
        "notes",
        {"_target_": "os.mkdir", "path": "pwned"},
        "notes._target_=os.mkdir",
    ),
    "trainer": (
        "trainer.plugins",
        [{"_target_": "os.mkdir", "path": "pwned"}],
        "trainer.plugins.0._target_=os.mkdir",
    ),
}


def write(folder: Path, kind: str, config, data, state) -> Path:
    """As a checkpoint, an exported file, or a run directory."""
    if kind == "ckpt":
        path = folder / "file.ckpt"
        state = {f"net.{name}": value for name, value in state.items()}
        content = {"config": config, "data": data, "state_dict": state, "global_step": 3}
        torch.save(content, path)
        return path
    if kind == "safetensors":
        path = folder / "file.safetensors"
        meta = {"config": config, "data": data, "step": 3, "weights": "net"}
        save_file(state, path, {"flash_jvp": json.dumps(meta)})
        return path
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "metrics.csv").write_text("step,train/error\n0,1.0\n")
    return folder


READERS = {
    "sample": lambda path: in_process("sample.py", f"ckpt={path}", "n=1"),
    "evaluate": lambda path: in_process("evaluate.py", f"ckpt={path}", "n=1"),
    "export": lambda path: in_process("export.py", f"ckpt={path}"),
    "teacher": lambda path: in_process(
        "train.py", *FAST, "objective=scd", f"objective.teacher.ckpt={path}", "trainer.max_steps=1"
    ),
    "resume": lambda path: in_process("train.py", *FAST, f"ckpt_path={path}"),
    "resume_run": lambda path: in_process("train.py", f"resume={path}"),
    "init_from": lambda path: in_process("train.py", *FAST, f"init_from={path}"),
    "compare": lambda path: in_process("compare.py", f"runs=[{path},{path}]"),
}


def refused(path: Path, reader: str, says: str, monkeypatch, capfd) -> None:
    """One line that names file, key and target; nothing was executed or written."""
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    before = sorted(path.parent.rglob("*"))
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as stopped:
        READERS[reader](path)
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert str(path) in lines[0]
    left = [p for p in sorted(path.parent.rglob("*")) if p not in before]
    left = [p.relative_to(elsewhere) for p in left]
    # A run directory is made by Hydra before the run begins, and locked.
    assert not [
        p for p in left if p.parts[0] != "outputs" or (len(p.parts) > 3 and p.name != "run.lock")
    ]


@pytest.mark.parametrize("gadget", list(GADGETS))
def test_a_configuration_from_a_file_names_classes_of_this_project_only(
    plain, tmp_path, monkeypatch, gadget
):
    config, data, state = plain
    key, value, says = GADGETS[gadget]
    monkeypatch.chdir(tmp_path)
    hostile = placed(config, key, value)
    for kind in ("ckpt", "safetensors"):
        path = write(tmp_path, kind, hostile, data, state)
        for reader in (load_trained, lambda p: load_flow(str(p))):
            with pytest.raises(ValueError, match=re.escape(says)) as error:
                reader(path)
            assert str(path) in str(error.value)
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=re.escape(says)):
        read_run(write(tmp_path / "run", "run", hostile, data, state))
    assert not (tmp_path / "pwned").exists()
    left = {p.name for p in tmp_path.rglob("*")}
    assert left == {"file.ckpt", "file.safetensors", "run", "config.yaml", "metrics.csv"}


@pytest.mark.parametrize("reader", [name for name in READERS if name != "init_from"])
@pytest.mark.parametrize("gadget", ["process_in_attention", "log_file"])
def test_every_script_refuses_a_hostile_file_in_one_line(
    plain, tmp_path, monkeypatch, capfd, reader, gadget
):
    config, data, state = plain
    if reader.startswith("resume"):
        config = settings()
    key, value, says = GADGETS[gadget]
    folder = tmp_path / "from_someone"
    folder.mkdir()
    kind = "run" if reader in ("compare", "resume_run") else "ckpt"
    path = write(folder, kind, placed(config, key, value), data, state)
    refused(path, reader, says, monkeypatch, capfd)


class Pickled:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("pwned", "w")


@pytest.mark.parametrize("reader", ["sample", "evaluate", "teacher", "resume", "init_from"])
def test_no_script_runs_pickled_code(plain, tmp_path, monkeypatch, capfd, reader):
    config, data, _ = plain
    folder = tmp_path / "from_someone"
    folder.mkdir()
    path = folder / "file.ckpt"
    content = {"config": config, "data": data, "state_dict": Pickled(), "global_step": 3}
    torch.save(content, path)
    says = "not readable as weights alone" if reader == "init_from" else "is not a readable check"
    refused(path, reader, says, monkeypatch, capfd)


@pytest.mark.parametrize("reader", ["compare", "resume_run"])
def test_no_script_makes_the_objects_of_a_yaml_file(plain, tmp_path, monkeypatch, capfd, reader):
    folder = tmp_path / "from_someone"
    folder.mkdir()
    path = write(folder, "run", *plain)
    (path / "config.yaml").write_text("model: !!python/object/apply:os.mkdir [pwned]\n")
    says = "config.yaml is no readable configuration: could not determine a constructor"
    refused(path, reader, says, monkeypatch, capfd)


@pytest.mark.parametrize("reader", ["sample", "evaluate", "export"])
def test_every_script_refuses_a_hostile_exported_file(plain, tmp_path, monkeypatch, capfd, reader):
    config, data, state = plain
    key, value, says = GADGETS["unpickle"]
    folder = tmp_path / "from_someone"
    folder.mkdir()
    path = write(folder, "safetensors", placed(config, key, value), data, state)
    refused(path, reader, says, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "holds no configuration"),
        ([1], "holds no configuration"),
        ({}, "no model._target_"),
        ({"model": 3}, "no model._target_"),
        ({"model": {"x": torch.zeros(1)}}, "model.x in its configuration is no plain value"),
        ({"a${b}": 1}, "has the key a${b}"),
        ({(1, 2): 1}, "has the key (1, 2)"),
    ],
)
def test_what_is_no_configuration_is_said_so(config, says):
    with pytest.raises(ValueError, match=r"a\.ckpt") as error:
        checked(config, "a.ckpt")
    assert says in str(error.value)


def test_a_configuration_without_end_is_refused(plain):
    nest: dict = {}
    config = plain[0] | {"notes": nest}
    for _ in range(5000):
        nest["a"] = nest = {}
    with pytest.raises(ValueError, match="nested deeper than"):
        checked(config, "a.ckpt")


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"shape": (1, 8)},
        {"shape": (1, 8, 8), "num_classes": "10", "latents": None},
        {"shape": (1, 8, 8), "num_classes": 10, "latents": "vae"},
    ],
)
def test_what_the_data_was_is_checked_too(tmp_path, plain, data):
    config, _, state = plain
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        load_trained(write(tmp_path, "ckpt", config, data, state))


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_file_of_this_project_is_read(plain, tmp_path, kind):
    config, data, state = plain
    trained = load_trained(write(tmp_path, kind, config, data, state), "net")
    assert trained.step == 3
    assert all(torch.equal(trained.net.state_dict()[name], w) for name, w in state.items())


class Own(torch.nn.Module):
    def __init__(self, channels, image_size, num_classes, attention):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(image_size))


def test_a_class_of_the_users_own_is_read_when_the_user_says_so(plain, tmp_path):
    config, data, _ = plain
    target = f"{__name__}.Own"
    config = config | {"model": {"_target_": target, "attention": config["attention"]}}
    path = write(tmp_path, "ckpt", config, data, {"weight": torch.ones(8)})
    with pytest.raises(ValueError, match=rf"trusted=\[{target}\]"):
        load_trained(path, "net")
    registry.register("sampler", target)
    with pytest.raises(ValueError, match="is no model of this project"):
        load_trained(path, "net")
    registry.register("model", target)
    assert load_trained(path, "net").net.weight.sum() == 8
    registry._TARGETS["model"].remove(target)
    registry.trust([target])
    assert load_trained(path, "net").net.weight.sum() == 8


def test_what_the_users_own_configuration_names_is_known_in_that_place(plain):
    config = placed(plain[0], "model.trunk", {"_target_": "mine.Trunk", "_convert_": "all"})
    with pytest.raises(ValueError, match=r"mine\.Trunk"):
        checked(config, "a.ckpt")
    registry.trust_own(DictConfig(config))
    assert checked(config, "a.ckpt") == config
    with pytest.raises(ValueError, match=r"mine\.Trunk"):
        checked(placed(config, "model.branch", {"_target_": "mine.Trunk"}), "a.ckpt")


def test_a_wrong_registration_raises():
    with pytest.raises(ValueError, match="role must be one of attention, model"):
        registry.register("network", "mine.Net")
    with pytest.raises(ValueError, match="dotted name"):
        registry.register("model", "mine Net")
    with pytest.raises(TypeError, match="trusted must be a list"):
        registry.trust("mine.Net")
