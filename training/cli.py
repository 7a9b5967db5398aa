"""What every script does around its work: one clear line for a user's error, quiet libraries."""

import logging
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.arguments import prepared, unknown_key, unreadable

USER_ERRORS = (
    ValueError,
    TypeError,
    NotImplementedError,
    OSError,
    ModuleNotFoundError,
    HydraException,
    OmegaConfBaseException,
)
# Errors of modules that take seconds to import; who has not imported them has not met them.
INTERRUPTED = ("training.callbacks.checkpoint.Interrupted",)
LATER = (
    "lightning.fabric.utilities.exceptions.MisconfigurationException",
    "training.callbacks.non_finite_guard.Diverged",
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


def run(
    main: Callable[[], None],
    adopted: str = "",
    prepare: Callable[[list[str]], list[str]] = list,
) -> None:
    """Run a Hydra main, whose task wraps its work in ``one_line_errors`` too.

    ``adopted``: a group whose keys may be set though it is not chosen here but comes from a run.
    ``prepare``: what else is to be done to the arguments.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in NOISE:
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    with one_line_errors():
        sys.argv[1:] = prepare(prepared(sys.argv[1:], adopted))
        os.environ[FULL] = "1"  # so that Hydra hands errors of the configuration on to here
        main()


class Failed(Exception):
    """A run of a sweep, which has said why; the sweep goes on and ends with exit code 1."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of the user's making end with one line on stderr and exit code 1; HYDRA_FULL_ERROR=1
    shows where they came from. An interrupt ends with 128 + the signal's number.
    """
    before = os.environ.get(FULL, "0")
    os.environ[FULL] = str(int(TRACEBACKS))
    try:
        yield
    except Failed:
        sys.exit(1)
    except _imported(INTERRUPTED) as interrupt:
        from lightning.pytorch.utilities import rank_zero_only  # is there by now

        if not rank_zero_only.rank:  # the others know the same
            print(interrupt, file=sys.stderr)
        sys.exit(128 + interrupt.signal)  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (*USER_ERRORS, *_imported(LATER)) as error:
        if TRACEBACKS:
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise Failed from None
        sys.exit(1)
    finally:
        os.environ[FULL] = before


def _imported(names: Sequence[str]) -> tuple[type[BaseException], ...]:
    """The classes of these names whose modules are there already."""
    places = (name.rpartition(".") for name in names)
    return tuple(getattr(sys.modules[m], name) for m, _, name in places if m in sys.modules)


def message(error: BaseException) -> str:
    """What an error says, without Hydra's wrapping, on one line."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]  # below the worker's traceback
    text = " ".join(text.split()) or type(error).__name__
    if unknown := re.match(r"Could not override '([^']*)'", text):
        return unknown_key(unknown[1])
    if missing := re.match(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]} must be given: {missing[1]}={EXAMPLES.get(missing[1], 'VALUE')}"
    text = re.split(r" Config search path:| full_key: | object_type=", text)[0]
    if choice := re.search(r"Could not find '(.*)/(.*)' Available options in '.*?': (.*)", text):
        group, name, choices = choice.groups()
        return f"{group} must be one of {', '.join(choices.split())}, got {name}"
    if "No supported gpu backend" in text:
        return (
            "trainer.accelerator=gpu: this machine has no GPU that PyTorch can use; use trainer=cpu"
        )
    return text
