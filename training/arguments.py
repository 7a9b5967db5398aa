"""What a user types, as Hydra reads it: KEY=VALUE with paths as the shell writes them, and
Lightning's own arguments without a sign.
"""

import inspect
import re
import shutil
import sys
from collections.abc import Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from training.renamed import command_line

CONFIGS = Path(__file__).parents[1] / "configs"
# Last words of keys whose values are paths.
PATHS = ("path", "ckpt", "ckpt_path", "init_from", "resume", "output", "dir", "subdir")
PATHS += ("classifier", "inception", "reference", "directory", "root", "comparison")
PLAIN = re.compile(r"[\w./@%+*?|:-]*", re.ASCII)  # what Hydra reads as it stands
DROPPED = ("budget", "recipe")  # groups that a run can do without
TRAINS = ("train", "compare", "plan", "profile_step")  # scripts with a trainer
OURS = ("callbacks", "logger", "plugins")  # arguments of Trainer that scripts/train.py gives
# Hydra's own switches; all else is a key.
SWITCHES = ("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run")
SWITCHES += ("--multirun", "--shell-completion", "--config-path", "--config-name", "--config-dir")
SWITCHES += ("--experimental-rerun", "--info")


def prepared(arguments: Sequence[str], adopted: str = "") -> list[str]:
    """The arguments of a script for Hydra.

    ``adopted``: a group whose keys may be set though it is not chosen here but comes from a run.

    Raises:
        ValueError: an argument is written as no key is; the message has the right spelling.
    """
    arguments = command_line(arguments)
    many = any(a in ("-m", "--multirun") for a in arguments)
    if "hydra=slurm" in arguments and not any(a in ("--cfg", "-c") for a in arguments):
        if not many:
            raise ValueError("hydra=slurm needs -m, which sends the run; without it, it runs here")
        if shutil.which("srun") is None:
            raise ValueError(
                "hydra=slurm: there is no srun on this machine; start it where Slurm is, or leave"
                " hydra=slurm out"
            )
    done = []
    for i, argument in enumerate(arguments):
        _check(argument, arguments[i + 1] if i + 1 < len(arguments) else "")
        if adopted and argument.startswith(f"{adopted}."):
            argument = f"++{argument}"
        if (argument := _without(argument)) is not None:
            done.append(_readable(_lightnings(argument), many))
    return done


def _without(argument: str) -> str | None:
    """``GROUP=null`` as Hydra leaves a group out, which it has no words for otherwise. None: there
    is nothing to leave out.

    Raises:
        ValueError: the group cannot be left out; the message has its choices.
    """
    group, _, value = argument.partition("=")
    if value != "null" or Path(sys.argv[0]).stem not in TRAINS or not (CONFIGS / group).is_dir():
        return argument
    if group in DROPPED:
        return f"~{group}"
    if group == "experiment":  # by default there is none
        return None
    choices = ", ".join(sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")))
    raise ValueError(f"{group} must be one of {choices}, got null")


def _check(argument: str, following: str) -> None:
    name, equals, value = argument.partition("=")
    if equals and name.startswith("--") and name not in SWITCHES:
        key = name.lstrip("-")
        known = _known()
        key = key if key in known else _resembling(key, known) or key
        raise ValueError(f"{argument}: keys have no dashes; write {key}={value}")
    key = re.fullmatch(r"[+]{0,2}[a-z_]+([.][a-z_0-9]+)+", argument)
    if key and not Path(argument).exists() and following and "=" not in following:
        raise ValueError(f"{argument} {following}: write {argument}={following}")


def _lightnings(argument: str) -> str:
    """Lightning's Trainer has more arguments than configs/trainer lists: they may be given too."""
    name = argument.partition("=")[0].removeprefix("trainer.")
    if name == argument.partition("=")[0] or Path(sys.argv[0]).stem not in TRAINS:
        return argument
    listed: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "trainer" / "default.yaml"))
    if name in listed or name in OURS:
        return argument
    from lightning import Trainer  # it takes seconds, and few need it

    if name not in inspect.signature(Trainer).parameters:
        return argument
    return f"++{argument}"


def _readable(argument: str, many: bool) -> str:
    """A path with ``~`` expanded, in quotes where Hydra would read a part of it otherwise."""
    key, equals, value = argument.partition("=")
    if not equals or key.rpartition(".")[2].lstrip("+~") not in PATHS or "${" in value:
        return argument
    if value.startswith("[") and value.endswith("]"):
        return argument  # a list
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    path = value[1:-1] if quoted else value
    if path == "~" or path.startswith("~/"):
        path = str(Path(path).expanduser())
        value = path if not quoted else value[0] + path + value[0]
    if quoted or PLAIN.fullmatch(path) or (many and PLAIN.fullmatch(path.replace(",", ""))):
        return f"{key}={value}"
    # A backslash is itself but before a quote.
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + m[2].replace('"', '\\"'), path)
    return f'{key}="{escaped}"'


def unknown_key(key: str) -> str:
    """What is said of a key that the script has not."""
    known, group = _known(), key.rpartition(".")[0]
    lists = "--cfg job lists all keys, --help the groups"
    if key == "data.path" and "data.path" not in known:
        return (
            "unknown configuration key 'data.path': the data set that is chosen has no path; name"
            " the kind of yours too, as data=image_folder, data=hugging_face, data=latents or"
            " data=packed"
        )
    meant = f" did you mean {found}?" if (found := _resembling(key, known)) else ""
    inside = [k.removeprefix(f"{group}.") for k in known if k.startswith(f"{group}.")]
    if group and not meant and inside:
        names = ", ".join(k for k in inside if "." not in k and not k.startswith("_"))
        return f"unknown configuration key '{key}'; {group} has {names}"
    return f"unknown configuration key '{key}';{meant} {lists}"


def _known() -> list[str]:
    """The keys of the script, with the groups that are chosen."""
    script, arguments = Path(sys.argv[0]).stem, [a for a in sys.argv[1:] if not a.startswith("-")]
    groups = [a for a in arguments if "." not in a.partition("=")[0]]  # they bring keys
    known: list[str] = []
    for chosen in (groups, []):
        try:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                known = _keys(OmegaConf.to_container(compose(script, chosen)))
                break
        except HydraException:  # the unknown key is one of them
            continue
    return known


def _resembling(key: str, known: list[str]) -> str:
    """The key most like this one among those whose last word is like its, if any."""
    last = {name: name.rpartition(".")[2] for name in known}
    words = get_close_matches(key.rpartition(".")[2], set(last.values()), cutoff=0.8)
    names = [name for name in known if last[name] in words]
    return max(names, key=lambda name: SequenceMatcher(None, key, name).ratio(), default="")


def _keys(values: Any, prefix: str = "") -> list[str]:
    if not isinstance(values, dict):
        return []
    names = [f"{prefix}{name}" for name in values]
    return names + [k for n in values for k in _keys(values[n], f"{prefix}{n}.")]


def unreadable(argument: str) -> str:
    """An argument that is no override, or whose value Hydra cannot read."""
    key, equals, value = argument.partition("=")
    if equals:
        return f"{argument}: Hydra cannot read the value; give it in quotes: '{key}=\"{value}\"'"
    ckpt = Path(argument).exists() or argument.endswith((".ckpt", ".safetensors"))
    return f"{argument}: arguments are KEY=VALUE; write {'ckpt' if ckpt else 'KEY'}={argument}"
