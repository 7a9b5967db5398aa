"""What every script does around its work: one clear line for a user's error, quiet libraries."""

import logging
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.callbacks.checkpoint import Interrupted
from training.callbacks.guard import Diverged

USER_ERRORS = (
    ValueError,
    TypeError,
    NotImplementedError,
    OSError,
    ModuleNotFoundError,
    MisconfigurationException,
    HydraException,
    OmegaConfBaseException,
    Diverged,
)
NOISE = (
    "does not have many workers",
    "before the epoch ended",
    r"isinstance\(treespec",
    "in eval mode at the start",  # an objective's teacher
)
# Values that have no default.
EXAMPLES = {"ckpt": "RUN/checkpoints/last.ckpt, or a file that scripts/export.py wrote"}
EXAMPLES |= {"comparison": "DIRECTORY, which scripts/compare.py wrote"}
CONFIGS = Path(__file__).parents[1] / "configs"
FULL = "HYDRA_FULL_ERROR"
TRACEBACKS = os.environ.get(FULL) == "1"  # the user wants to see where errors come from


LONGEST = 200  # bytes of a file's name are 255 at most


def short(name: str) -> str:
    """A folder's name for a run of a sweep: its overrides, cut and told apart by a checksum where
    they are too many.
    """
    if len(name.encode()) <= LONGEST:
        return name
    cut = name.replace("/", "_").encode()[: LONGEST - 9].decode(errors="ignore")
    return f"{cut}_{zlib.crc32(name.encode()):08x}"


OmegaConf.register_new_resolver("short", short, replace=True)


def run(main: Callable[[], None], adopted: str = "") -> None:
    """Run a Hydra main, whose task wraps its work in ``one_line_errors`` too.

    ``adopted``: a group whose keys may be set though it is not chosen here but comes from a run.
    """
    if adopted:
        sys.argv[1:] = [f"++{a}" if a.startswith(f"{adopted}.") else a for a in sys.argv[1:]]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in NOISE:
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    with one_line_errors():
        os.environ[FULL] = "1"  # so that Hydra hands errors of the configuration on to here
        main()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of the user's making end with one line on stderr and exit code 1; HYDRA_FULL_ERROR=1
    shows where they came from. An interrupt ends with 128 + the signal's number.
    """
    os.environ[FULL] = str(int(TRACEBACKS))
    try:
        yield
    except Interrupted as interrupt:
        print(interrupt, file=sys.stderr)
        sys.exit(128 + interrupt.signal)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except USER_ERRORS as error:
        if TRACEBACKS:
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        sys.exit(1)


def message(error: BaseException) -> str:
    """What an error says, without Hydra's wrapping, on one line."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]  # below the worker's traceback
    text = " ".join(text.split()) or type(error).__name__
    if unknown := re.match(r"Could not override '([^']*)'", text):
        meant = f" did you mean {key}?" if (key := _resembling(unknown[1])) else ""
        lists = "--cfg job lists all keys, --help the groups"
        return f"unknown configuration key '{unknown[1]}';{meant} {lists}"
    if missing := re.match(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]} must be given: {missing[1]}={EXAMPLES.get(missing[1], 'VALUE')}"
    if "No supported gpu backend" in text:
        return (
            "trainer.accelerator=gpu: this machine has no GPU that PyTorch can use; use trainer=cpu"
        )
    return re.split(r" Config search path:| full_key: | object_type=", text)[0]


def _resembling(key: str) -> str:
    """The key most like this one among those of the script whose last word is like its, if any."""
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
    last = {name: name.rpartition(".")[2] for name in known}
    words = get_close_matches(key.rpartition(".")[2], set(last.values()), cutoff=0.8)
    names = [name for name in known if last[name] in words]
    return max(names, key=lambda name: SequenceMatcher(None, key, name).ratio(), default="")


def _keys(values: Any, prefix: str = "") -> list[str]:
    if not isinstance(values, dict):
        return []
    names = [f"{prefix}{name}" for name in values]
    return names + [k for n in values for k in _keys(values[n], f"{prefix}{n}.")]


def _unreadable(argument: str) -> str:
    """An argument that is no override, or whose value Hydra cannot read."""
    key, equals, value = argument.partition("=")
    if equals:
        return f"{argument}: Hydra cannot read the value; give it in quotes: '{key}=\"{value}\"'"
    ckpt = Path(argument).exists() or argument.endswith((".ckpt", ".safetensors"))
    return f"{argument}: arguments are KEY=VALUE; write {'ckpt' if ckpt else 'KEY'}={argument}"
