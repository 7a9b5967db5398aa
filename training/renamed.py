"""Names that changed, which work for one release more: with one line that says the new one.

Keys of configurations (on the command line, in a user's own files, in checkpoints and in the
config.yaml of a run), classes that a ``_target_`` names, arguments and methods in Python.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

F = TypeVar("F", bound=Callable[..., Any])

# Former key -> its last word now. The groups are the same ones.
KEYS = {
    "ckpt_changes": "allow_config_changes",
    "objective.equal_share": "data_proportion",
    "objective.finest": "denoise_timesteps",
    "optimizer.floor": "min_lr_ratio",
    "data.held_out": "val_fraction",
    "data.held_out_split": "val_split",
    "callbacks.guard": "non_finite_guard",
    "callbacks.buckets": "loss_by_timestep",
    "callbacks.accuracy": "sample_quality",
}
TARGETS = {
    "training.trained.load_flow": "training.loading.load_flow",
    "training.callbacks.guard.Guard": "training.callbacks.non_finite_guard.NonFiniteGuard",
    "training.callbacks.buckets.TimeBuckets": "training.callbacks.loss_by_timestep.LossByTimestep",
    "training.callbacks.accuracy.Accuracy": "training.callbacks.sample_quality.SampleQuality",
}
OURS = "training."  # how the target of a class of this project begins
STATES = {"Guard": "NonFiniteGuard"}  # callbacks that a checkpoint holds the state of
METHODS = {"attach": "setup", "start": "on_fit_start", "draw": "sample"}  # of an objective
_said: set[str] = set()


def key(name: str) -> str:
    """The present key: ``callbacks.guard.patience`` -> ``callbacks.non_finite_guard.patience``."""
    for old, new in KEYS.items():
        if name == old or name.startswith(f"{old}."):
            return old.rpartition(".")[0] + "." * ("." in old) + new + name[len(old) :]
    return name


def command_line(arguments: Iterable[str]) -> list[str]:
    """KEY=VALUE under present keys, those in a list (of overrides, of keys) too.

    Raises:
        ValueError: a key is given under both names.
    """
    parts = [_parts(argument) for argument in arguments]
    given, done = {name for _, name, _ in parts}, []
    for sign, name, rest in parts:
        new = key(name)
        if new != name:
            if new in given:
                raise ValueError(_both(name, new))
            _warn([(name, new)])
        if rest.startswith("=["):
            rest = re.sub(r"(?<=[\[,\s'\"])[a-z_.]+(?=[=,\]])", _inner, rest)
        done.append(f"{sign}{new}{rest}")
    return done


def _parts(argument: str) -> tuple[str, ...]:
    """(+ or ~, key, = and value)"""
    return re.fullmatch(r"([+~]*)([^=]*)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]


def _inner(found: re.Match[str]) -> str:
    old, new = found[0], key(found[0])
    if new != old:
        _warn([(old, new)])
    return new


def composed(config: DictConfig, overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra composed, with a user's own files in it, under present keys.

    ``overrides``: from the command line, where the same key under its present name is refused.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False)
    given = {_parts(override)[1] for override in overrides}
    if not (changed := _update(plain, given)):
        return config
    _warn(changed)
    found = DictConfig(plain)
    OmegaConf.set_struct(found, True)
    return found


def stored(config: Any, path: Path | str) -> None:
    """In place: the configuration that the file at ``path`` holds, as plain values."""
    if isinstance(config, dict):
        changed = _update(config, set())
        _warn([pair for pair in changed if pair[0] not in TARGETS], f"{path}: ")


def states(checkpoint: dict[str, Any]) -> None:
    """In place: the callbacks' states of a checkpoint."""
    callbacks = checkpoint.get("callbacks")
    if isinstance(callbacks, dict):
        for old, new in STATES.items():
            if old in callbacks:
                callbacks.setdefault(new, callbacks.pop(old))


def _update(config: dict[Any, Any], given: set[str]) -> list[tuple[str, str]]:
    """What was renamed, in place."""
    changed = []
    for old, last in KEYS.items():
        group, _, word = old.rpartition(".")
        node = config.get(group) if group else config
        if not isinstance(node, dict) or word not in node:
            continue
        if not str(node.get("_target_", OURS)).startswith(OURS):  # a class of the user's own
            continue
        new = key(old)
        if new in given:
            raise ValueError(_both(old, new))
        if last in node:  # the default of what a user's own file sets
            value = node.pop(word)
            both = isinstance(value, dict) and isinstance(node[last], dict)
            node[last] = node[last] | value if both else value
        else:  # in its place: callbacks are called in order
            items = [(last if name == word else name, value) for name, value in node.items()]
            node.clear()
            node.update(items)
        changed.append((old, new))
    return changed + _retarget(config)


def _retarget(config: dict[Any, Any]) -> list[tuple[str, str]]:
    """In any place of a tree that nobody has checked yet: it may hold itself."""
    changed, seen, left = [], set(), [config]
    while left:
        node: Any = left.pop()
        if not isinstance(node, dict | list) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, list):
            left += node
            continue
        left += node.values()
        old = node.get("_target_")
        if isinstance(old, str) and old in TARGETS:
            node["_target_"] = TARGETS[old]
            changed.append((old, TARGETS[old]))
    return changed


def _both(old: str, new: str) -> str:
    return f"{old} is the former name of {new}; give {new} alone"


def _warn(pairs: Sequence[tuple[str, str]], where: str = "") -> None:
    """One line on stderr, once, of the first process."""
    names = ", ".join(f"{old} is now {new}" for old, new in pairs)
    line = f"warning: {where}{names}; former names work for one release"
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))
    if pairs and first and line not in _said:
        _said.add(line)
        print(line, file=sys.stderr)


def keywords(**names: str) -> Callable[[F], F]:
    """A function takes its arguments under their former names too: ``keywords(old="new")``."""

    def decorate(function: F) -> F:
        @wraps(function)
        def called(*arguments: Any, **options: Any) -> Any:
            for old, new in names.items():
                if old in options:
                    if new in options:
                        raise TypeError(_both(old, new))
                    text = f"{old} is now {new}; the former name works for one release"
                    warnings.warn(text, FutureWarning, stacklevel=2)
                    options[new] = options.pop(old)
            return function(*arguments, **options)

        return called  # type: ignore[return-value]

    return decorate


def methods(objective: type) -> None:
    """An objective of a user's own, whose methods have former names, has the present ones. Its
    bases have both, for ``super()``.
    """
    for old, new in METHODS.items():
        if callable(own := vars(objective).get(old)) and new not in vars(objective):
            text = f"{objective.__name__}.{old} is now {new}; the former name works for one release"
            warnings.warn(text, FutureWarning, stacklevel=3)
            setattr(objective, new, own)
        elif new in vars(objective) and old not in vars(objective):
            setattr(objective, old, vars(objective)[new])
