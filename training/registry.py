"""What a configuration that was read from a file may name.

A checkpoint, an exported network and the config.yaml of a run hold a configuration, and Hydra calls
whatever the ``_target_`` in one names. A file is data: before anything is built from it,
``checked`` goes through the whole tree and refuses every name that is not listed here for its
place, every other instruction to Hydra (``_args_``, ``_recursive_``, ...) and every interpolation.

What a user writes on the command line is free. A file that was trained with classes of the user's
own is read after ``register(role, target)``, or with ``trusted=[TARGET]`` on the command line.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from training import renamed

# Where in a configuration a target may stand, and as what. * is any name.
PLACES = {
    ("attention",): "attention",
    ("model",): "model",
    ("model", "attention"): "attention",
    ("objective",): "objective",
    ("objective", "jvp"): "jvp",
    ("objective", "teacher"): "teacher",
    ("sampler",): "sampler",
    ("data",): "data",
    ("optimizer",): "optimizer",
    ("trainer",): "trainer",
    ("trainer", "strategy"): "strategy",
    ("callbacks", "*"): "callback",
    ("callbacks", "*", "sampler"): "sampler",
    ("logger", "*"): "logger",
}
PARTIAL = ("attention", "teacher", "optimizer")  # roles that are functions, called later

_objectives, _data = "training.objectives", "training.data"
_TARGETS: dict[str, set[str]] = {
    "attention": {
        "jvp_flash_attention.attention",
        "training.attentions.sdpa",
        "training.attentions.sdpa_fused",
    },
    "model": {"training.models.dit.DiT", "training.models.unet.UNet"},
    "objective": {
        f"{_objectives}.alphaflow.AlphaFlow",
        f"{_objectives}.dmf.DMF",
        f"{_objectives}.flow_map.FlowMap",
        f"{_objectives}.flow_matching.FlowMatching",
        f"{_objectives}.imf.IMF",
        f"{_objectives}.meanflow.MeanFlow",
        f"{_objectives}.meanflow_distillation.MeanFlowDistillation",
        f"{_objectives}.scm.SCM",
        f"{_objectives}.shortcut.Shortcut",
        f"{_objectives}.tvm.TVM",
    },
    "jvp": {f"{_objectives}.tangents.Jvp"},
    "teacher": {"training.loading.load_flow"},
    "sampler": {
        "training.samplers.consistency.ConsistencySampler",
        "training.samplers.flow.FlowSampler",
        "training.samplers.meanflow.MeanFlowSampler",
        "training.samplers.meanflow.ShortcutSampler",
    },
    "data": {
        f"{_data}.digits.Digits",
        f"{_data}.hugging_face.HuggingFace",
        f"{_data}.idx.Idx",
        f"{_data}.image_folder.ImageFolder",
        f"{_data}.latents.Latents",
        f"{_data}.packed.Packed",
        f"{_data}.synthetic.Blobs",
        f"{_data}.synthetic.EightGaussians",
        f"{_data}.synthetic.Gaussian",
    },
    "optimizer": {"training.optimizers.adamw", "training.optimizers.radam"},
    "trainer": {"lightning.Trainer"},
    "strategy": {
        "lightning.pytorch.strategies.DDPStrategy",
        "training.strategies.Replicated",
        "training.strategies.Sharded",
    },
    "callback": {
        "training.callbacks.sample_quality.SampleQuality",
        "training.callbacks.loss_by_timestep.LossByTimestep",
        "training.callbacks.checkpoint.LastCheckpoint",
        "training.callbacks.divergence.Divergence",
        "training.callbacks.ema.EMA",
        "training.callbacks.fingerprint.Fingerprint",
        "training.callbacks.non_finite_guard.NonFiniteGuard",
        "training.callbacks.page.Page",
        "training.callbacks.progress.RichProgress",
        "training.callbacks.samples.Samples",
        "training.callbacks.summary.Summary",
        "training.callbacks.throughput.Throughput",
    },
    "logger": {"training.loggers.csv.CSVFile", "training.loggers.wandb.wandb_logger"},
}
NEEDED = ("model",)  # built from every file
DEEPEST = 32  # nested groups; the project's own have four
Key = tuple[str | int, ...]

# What the user named: in any place, and in one place.
_trusted: set[str] = set()
_own: set[tuple[Key, str]] = set()


def register(role: str, target: str) -> None:
    """Let files name a class or function of yours: ``register("model", "mine.nets.UNet")``.

    Whoever registers a target answers for it: a file chooses the arguments that it is called with.
    """
    if role not in _TARGETS:
        raise ValueError(f"role must be one of {', '.join(_TARGETS)}; got {role!r}")
    _TARGETS[role].add(_dotted(target))


def trust(targets: Any) -> None:
    """What ``trusted=[TARGET,...]`` of a script lists: files may name it anywhere."""
    if not OmegaConf.is_list(targets) and not isinstance(targets, list | tuple):
        raise TypeError(f"trusted must be a list as [mine.nets.UNet]; got {targets!r}")
    _trusted.update(_dotted(target) for target in targets)


def trust_own(config: DictConfig) -> None:
    """What the user's own configuration names, in the same places: a run may be resumed, compared
    and distilled with the classes that it was started with.
    """
    for key, value in _nodes(OmegaConf.to_container(config, resolve=True)):
        if isinstance(value, dict) and isinstance(target := value.get("_target_"), str):
            _own.add((key, target))


def stored(path: Path) -> DictConfig:
    """The configuration in a run's config.yaml, ``checked``."""
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # of the YAML, which may ask for Python's objects
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no readable configuration: {_short(reason)}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} holds no keys; give that of a run")
    return checked(config, path)


def checked(config: Any, path: Path | str, needed: Sequence[str] = NEEDED) -> DictConfig:
    """The configuration that the file at ``path`` holds, as data that is safe to instantiate.

    Raises:
        ValueError: it names something that is not registered for its place, or it is not plain
            values; the message names file, key and target.
    """
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=False)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no configuration: {type(config).__name__} in its place")
    renamed.stored(config, path)
    nodes = list(_nodes(config, path))
    for key, value in nodes:
        _check_value(key, value, path)
    for key, value in nodes:
        if isinstance(value, dict):
            _check_group(key, value, path)
    for group in needed:
        part = config.get(group)
        if not isinstance(part, dict) or "_target_" not in part:
            raise ValueError(f"{path}: its configuration has no {group}._target_")
    return DictConfig(config)


def _check_value(key: Key, value: Any, path: Path | str) -> None:
    if not isinstance(value, dict | list | str | int | float | None):
        kind = type(value).__name__
        raise ValueError(f"{path}: {_name(key)} in its configuration is no plain value but {kind}")
    if isinstance(value, str) and "${" in value:
        raise ValueError(
            f"{path}: {_name(key)} in its configuration is an interpolation, {_short(value)}; a"
            " configuration from a file holds plain values only"
        )


def _check_group(key: Key, group: dict[Any, Any], path: Path | str) -> None:
    instructions = [name for name in group if isinstance(name, str) and name.startswith("_")]
    target, role = group.get("_target_"), _role(key)
    if not instructions or (isinstance(target, str) and _is_users(key, target)):
        return
    known = _TARGETS.get(role, set())
    if "_target_" in group and not (isinstance(target, str) and target in known):
        what = f"no {role} of this project" if role else "named where none may be"
        names = f" (it has {', '.join(sorted(known))})" if known else ""
        raise ValueError(
            f"{path}: {_name((*key, '_target_'))}={_short(target)} in its configuration is"
            f" {what}{names}; nothing was built. If it is a class of your own, read the file with"
            f" trusted=[{_short(target)}]; otherwise do not use the file"
        )
    for name in instructions:
        if name == "_target_" or (name == "_partial_" and group[name] is (role in PARTIAL)):
            continue
        raise ValueError(
            f"{path}: {_name((*key, name))}={_short(group[name])} in its configuration is an"
            " instruction to Hydra that a file may not give; do not use the file"
        )


def _is_users(key: Key, target: str) -> bool:
    return target in _trusted or (key, target) in _own


def _dotted(target: Any) -> str:
    if isinstance(target, str) and all(part.isidentifier() for part in target.split(".")):
        return target
    raise ValueError(f"a target is a dotted name as package.module.Class; got {target!r}")


def _name(key: Key) -> str:
    return _short(".".join(map(str, key)) or "what stands there")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _role(place: Key) -> str:
    """As what a target may stand at this place, or nothing."""
    for pattern, role in PLACES.items():
        if len(pattern) == len(place) and all(
            isinstance(b, str) and a in ("*", b) for a, b in zip(pattern, place, strict=True)
        ):
            return role
    return ""


def _nodes(value: Any, path: Path | str = "", key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every node of the tree, a group before what it holds."""
    if len(key) > DEEPEST:
        raise ValueError(f"{path}: its configuration is nested deeper than {DEEPEST} groups")
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str | int) or "${" in str(name):
                raise ValueError(f"{path}: its configuration has the key {_short(name)}")
            yield from _nodes(inner, path, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _nodes(inner, path, (*key, index))


def description(data: Any, path: Path | str) -> dict[str, Any]:
    """``DataModule.description`` as the file at ``path`` holds it, checked."""
    found = data if isinstance(data, dict) else {}
    shape, classes, latents = (found.get(k) for k in ("shape", "num_classes", "latents"))
    whole = isinstance(shape, list | tuple) and len(shape) == 3
    whole = whole and all(_count(n) for n in (*shape, classes))  # type: ignore[misc]
    if latents is not None:
        named = isinstance(latents, dict) and isinstance(latents.get("vae"), str)
        whole = whole and named and all(_number(latents.get(k)) for k in ("scale", "shift"))
    if not whole:
        raise ValueError(
            f"{path} does not say what it was trained on: shape (C, H, W), num_classes, latents"
        )
    return found


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
