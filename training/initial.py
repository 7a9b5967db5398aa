"""Initial weights from a file: ``init_from=FILE``, weights alone, nothing else of that run.

A file is data: it is read as tensors (safetensors, or ``torch.load(weights_only=True)``), and no
configuration inside it is looked at. It is a checkpoint of this project, a file that
``scripts/export.py`` wrote, or a published one (``training.official``).
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from training.callbacks.ema import choose
from training.checksums import verify
from training.official import State, is_official, translate

PREFIX = "net."  # of the network's weights in a checkpoint's state
FEW = 3  # names that a message lists


def initialise(
    net: nn.Module,
    path: str | Path,
    weights: str = "ema",
    form: str | None = None,
    exceptions: Sequence[str] = (),
) -> None:
    """Put the weights of a file into a network.

    Args:
        weights: ``ema``, ``net``, or an average by its name (of a checkpoint of this project).
        form: what a published file holds, see ``official.translate``.
        exceptions: parts by the beginning of their names (``second_time``) that may be missing on
            either side, or have another shape: the network keeps its own there.
    """
    state = read_weights(Path(path), weights, form)
    own = net.state_dict()
    excepted = lambda name: any(_under(name, part) for part in exceptions)  # noqa: E731
    if unknown := [e for e in exceptions if not any(_under(n, e) for n in {*state, *own})]:
        raise ValueError(
            f"init_except: neither the network nor {path} has a part {unknown[0]}; parts are"
            f" {', '.join(sorted({_part(name) for name in own}))}"
        )
    state = {name: value for name, value in state.items() if not excepted(name)}
    missing = [name for name in own if name not in state and not excepted(name)]
    unused = [name for name in state if name not in own]
    for names, which in ((missing, "the network has and it has not"), (unused, "it has alone")):
        if names:
            parts = ",".join(dict.fromkeys(map(_part, names)))
            raise ValueError(
                f"init_from: {path} does not fit the network in what {which}: {_listed(names)};"
                f" choose the model that it was made with, or init_except=[{parts}]"
            )
    shapes = [
        f"{name} is {tuple(value.shape)} there and {tuple(own[name].shape)} here"
        for name, value in state.items()
        if value.shape != own[name].shape
    ]
    if shapes:
        raise ValueError(
            f"init_from: {path} holds weights of other shapes: {_listed(shapes)}; choose the model"
            " that it was made with, or name what differs in init_except"
        )
    net.load_state_dict(state, strict=False)  # what may be missing is known


def read_weights(path: Path, weights: str, form: str | None) -> State:
    """The weights under this project's names."""
    if not path.is_file():
        raise FileNotFoundError(f"init_from: there is no file {path}; give an existing one")
    content = _read(path)
    if isinstance(content.get("state_dict"), dict) and "config" in content:  # of this project
        found = content["state_dict"].items()
        state = {name.removeprefix(PREFIX): w for name, w in found if name.startswith(PREFIX)}
        return state | (choose(content, weights) or {})
    nested = content.get("ema" if weights == "ema" else "model")  # of a published trainer
    state = nested if isinstance(nested, dict) else content
    state = {str(name).removeprefix("module."): w for name, w in state.items()}
    if not state or not all(isinstance(w, torch.Tensor) for w in state.values()):
        raise ValueError(
            f"init_from: {path} is no checkpoint of this project and no state dict of tensors;"
            f" its keys are {_listed(map(str, content))}"
        )
    return translate(state, form, path) if is_official(state) else state


def _read(path: Path) -> dict[str, Any]:
    verify(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # published: a run's arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"init_from: {path} is no readable safetensors file ({error})") from error
    except Exception as error:
        raise ValueError(
            f"init_from: {path} is not readable as weights alone; nothing of it was run"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"init_from: {path} holds a {type(content).__name__}, no weights")
    return content


def _under(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _part(name: str) -> str:
    """Of which part of the network a weight is: the first word of its name, of blocks the block."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "blocks" else words[0]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more
