"""Another distribution has this import name; what is said where its files and ours are mixed.

`pip install jvp_flash_attention` brings the package of github.com/amorehead/jvp_flash_attention. In
one environment with ours its `__init__.py` and `jvp_attention.py` overwrite ours, or ours its, and
removing either takes files of the other along.
"""

import sys
import warnings
from pathlib import Path

PACKAGE = __name__.rpartition(".")[0]

MIXED = (
    "the distributions flash-jvp and jvp_flash_attention (github.com/amorehead/jvp_flash_attention)"
    " have the same import name, and one has overwritten or removed files of the other here: pip"
    " uninstall -y jvp_flash_attention flash-jvp, then install the one that you want"
)
BESIDE = (
    "the distribution jvp_flash_attention (github.com/amorehead/jvp_flash_attention) is installed"
    " too, under the same import name: whichever is installed or removed next breaks the other. pip"
    " uninstall -y jvp_flash_attention flash-jvp, then install the one that you want"
)


def check() -> None:
    """Raises ImportError where the package's `__init__.py` is not ours."""
    if not _ours():
        raise ImportError(MIXED)


def not_a_module(name: str) -> ImportError:
    """What a module raises that has the name of a function of the package: `from package import
    name` comes to it only where the package's `__init__.py` is not ours."""
    if not _ours():
        return ImportError(MIXED)
    return ImportError(f"{PACKAGE}.{name} is no module: from {PACKAGE} import {name}")


def warn_of_the_other(folder: Path = Path(__file__).parents[1]) -> None:
    """Warns where the other distribution is installed into the folder that holds the package."""
    if next(folder.glob("jvp_flash_attention-*.dist-info"), None) is not None:
        warnings.warn(BESIDE, stacklevel=3)


def _ours() -> bool:
    return getattr(sys.modules.get(PACKAGE), "__distribution__", None) == "flash-jvp"
