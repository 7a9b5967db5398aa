"""A trained network from a checkpoint or from an exported file, without its data set.

trained = load_trained(Path("last.ckpt"), weights="ema")
images = generate(trained.net, instantiate(trained.config.sampler), y, trained.shape, seed=0)
"""

import json
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from torch import nn

from training.build import build_net
from training.callbacks.ema import choose, with_weights
from training.checkpoints import load_checkpoint
from training.checksums import damaged, verify_safetensors
from training.config_checks import check_guidance
from training.registry import checked, description

PREFIX = "net."  # of the network's weights in the module's state


class Trained(NamedTuple):
    net: nn.Module  # in evaluation mode, on the CPU
    config: DictConfig
    shape: tuple[int, int, int]  # (C, H, W) of an image
    num_classes: int
    step: int
    averages: list[str]  # names of the averages (or of the exported weights) that the file holds
    data: dict[str, Any]  # ``DataModule.description`` of what it was trained on


def load_trained(
    path: str | Path, weights: str = "ema", attention: DictConfig | None = None
) -> Trained:
    """The network of a checkpoint with the weights of this name (see ``callbacks.ema.choose``), or
    of an exported file, which has one set of weights; ``attention`` replaces the one trained with.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        meta, state = _read_exported(path)
        averages = [meta["weights"]]
        if weights not in ("ema", meta["weights"]):
            raise ValueError(f"weights: {path} holds {meta['weights']} only; got {weights!r}")
    else:
        meta = checkpoint = load_checkpoint(path)
        meta["step"] = checkpoint.get("global_step")
        if not isinstance(meta["step"], int) or not isinstance(checkpoint.get("state_dict"), dict):
            raise ValueError(f"ckpt: {path} was not written by scripts/train.py")
        state = {
            name.removeprefix(PREFIX): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(PREFIX)
        }
        averages = list(checkpoint.get("ema", {}).get("averages", {}))
    config = checked(meta.get("config"), path)
    data, step = description(meta.get("data"), path), meta["step"]
    if attention is not None:
        config.attention = config.model.attention = attention
    shape, num_classes = tuple(data["shape"]), data["num_classes"]
    net = build_net(config, shape, num_classes)
    load_state(net, state, path)
    if path.suffix != ".safetensors" and (average := choose(meta, weights)) is not None:
        net = with_weights(net, average)
    return Trained(net.eval(), config, shape, num_classes, step, averages, data)


def sampler_of(config: DictConfig, given: DictConfig | None) -> DictConfig:
    """The sampler of a trained network's configuration with the keys that were ``given``, or
    another one that was chosen.
    """
    own, given = config.sampler, given or DictConfig({})
    same = given.get("_target_", own._target_) == own._target_
    sampler: Any = OmegaConf.merge(own, given) if same else given
    kind = get_class(sampler._target_)
    known = list(signature(kind).parameters)
    for name in sampler:
        if name not in known and not str(name).startswith("_"):
            raise ValueError(f"sampler.{name}: {kind.__name__} has {', '.join(known)} only")
    check_guidance(sampler, config)
    return sampler


def load_flow(ckpt: str | None, weights: str = "ema") -> nn.Module:
    """A trained network as a teacher: at r = t the velocity of the linear path.

    ``weights``: as in ``load_trained``.
    """
    if ckpt is None:
        raise ValueError(
            "objective.teacher.ckpt must name the checkpoint to distil, of a run with"
            " objective=flow_matching (any other but scm and scd will do too); got null"
        )
    try:
        trained = load_trained(Path(ckpt), weights)
    except (FileNotFoundError, ValueError) as error:
        if not str(error).startswith(("ckpt:", "weights:")):
            raise
        raise type(error)(f"objective.teacher.{error}") from error
    objective = trained.config.objective
    kind = get_class(objective._target_)
    if not getattr(kind, "teaches_velocity", False) or objective.get("data_proportion") == 0:
        raise ValueError(
            "objective.teacher.ckpt must be of a network that learned the velocity u(z, t, t) of"
            " the linear path (objective=flow_matching, or any other but scm and scd, with"
            f" data_proportion > 0 where there is one); {ckpt} is of {kind.__name__}"
        )
    trained.net.trained_on = (trained.shape, trained.num_classes)  # type: ignore[assignment]
    return trained.net


def load_state(net: nn.Module, state: dict[str, Any], path: Path) -> None:
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the network that its own configuration describes: it was written"
            " by another version of the model"
        ) from error


def _read_exported(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"ckpt: there is no file {path}; give an existing one")
    has_checksum = verify_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"ckpt: {path} is not a readable safetensors file ({error})") from error
    if "flash_jvp" not in found:
        raise ValueError(f"ckpt: {path} was not written by scripts/export.py")
    try:
        meta = json.loads(found["flash_jvp"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"ckpt: {path} has unreadable metadata ({error})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("step"), int):
        raise ValueError(f"ckpt: {path} was not written by scripts/export.py")
    if meta.get("checksum") and not has_checksum:
        raise ValueError(damaged(path))
    return meta, state
